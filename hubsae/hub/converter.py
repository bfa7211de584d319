"""A converter for SAELens: stock `SAE.from_pretrained` reads every format hubsae reads, at any revision."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubsae.core.sae import SAE
from hubsae.formats import saelens
from hubsae.hub.load import load_pretrained


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

    def __call__(self, *args: Any, **named: Any) -> tuple[Any, ...]:
        """SAELens calls with names for the Hub (`repo_id, folder_name, ...`) and with the path first for a disk."""
        if "repo_id" in named:
            return tuple(self._from_hub(**named))
        found = self._from_disk(*args, **named)
        return found.cfg, found.state

    def _from_hub(
        self,
        repo_id: str,
        folder_name: str,
        device: str | None = None,
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> _OnHub:
        options = dict(self.options)
        if force_download:
            options["force_download"] = True
        return _parts(load_pretrained(repo_id, folder_name or None, **options), device, cfg_overrides)

    def _from_disk(
        self,
        path: str | os.PathLike[str],
        device: str | None = None,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> _OnHub:
        from hubsae.formats.registry import read

        only_hub = ("revision", "token", "cache_dir", "local_files_only", "force_download", "endpoint")
        choices = {name: value for name, value in self.options.items() if name not in only_hub}
        return _parts(read(path, **choices), device, cfg_overrides)


def _parts(sae: SAE, device: str | None, overrides: dict[str, Any] | None) -> _OnHub:
    sae = saelens.with_constant_norm(sae)
    cfg = saelens.cfg_of(sae) | (overrides or {})
    if device is not None:
        cfg["device"] = device
    dtype = getattr(torch, str(cfg["dtype"]).removeprefix("torch."))
    target = cfg.get("device") or "cpu"
    state = {name: t.to(device=target, dtype=dtype) for name, t in saelens.stored_tensors(sae).items()}
    return _OnHub(cfg, state, sae.sparsity)
