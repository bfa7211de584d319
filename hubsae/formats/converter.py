"""A converter for SAELens: stock `SAE.from_pretrained` reads every format hubsae reads, at any revision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubsae.core.sae import HubSAE
from hubsae.formats import saelens


class _OnHub(NamedTuple):
    cfg: dict[str, Any]
    state: dict[str, Tensor]
    sparsity: Tensor | None


class saelens_converter:
    """`converter=` for `SAE.from_pretrained(repo, id, ...)` and `SAE.load_from_disk(path, ...)`.

        SAE.from_pretrained("me/my-sae", "saes/layer6", converter=hubsae.saelens_converter(revision="v1.0"))

    `revision, token, cache_dir, local_files_only` are passed to the Hub; anything else is a choice for the
    reader of a foreign format (`k=64`, `decode_adds_b_pre=False`, `format="grid"` ...).

    >>> saelens_converter(revision="v1.0").options
    {'revision': 'v1.0'}
    """

    def __init__(self, **options: Any):
        self.options = options

    def __call__(
        self,
        repo_id: str | os.PathLike[str] | None = None,
        folder_name: str | None = None,
        device: str | None = None,
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> tuple[Any, ...]:
        """SAELens calls the Hub protocol with names, and the one for disks with the path first."""
        if folder_name is None:
            source = path if path is not None else repo_id
            if source is None:
                raise TypeError("a converter is called by SAELens, with a repo id and folder or with a path")
            found = self._from_disk(Path(source), device, cfg_overrides)
            return found.cfg, found.state
        options = dict(self.options)
        if force_download:
            options["force_download"] = True
        return tuple(
            _parts(HubSAE.from_pretrained(str(repo_id), folder_name or None, **options), device, cfg_overrides)
        )

    def _from_disk(self, path: Path, device: str | None, overrides: dict[str, Any] | None) -> _OnHub:
        from hubsae.formats.registry import read

        only_hub = ("revision", "token", "cache_dir", "local_files_only", "force_download", "endpoint")
        choices = {name: value for name, value in self.options.items() if name not in only_hub}
        return _parts(read(path, **choices), device, overrides)


def _parts(sae: HubSAE, device: str | None, overrides: dict[str, Any] | None) -> _OnHub:
    sae = saelens.with_constant_norm(sae)
    cfg = saelens.cfg_of(sae.config, sae.metadata) | (overrides or {})
    if device is not None:
        cfg["device"] = device
    dtype = getattr(torch, str(cfg["dtype"]).removeprefix("torch."))
    target = cfg.get("device") or "cpu"
    state = {name: t.to(device=target, dtype=dtype) for name, t in saelens.stored_tensors(sae).items()}
    return _OnHub(cfg, state, sae.sparsity)
