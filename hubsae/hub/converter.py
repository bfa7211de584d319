"""A converter for SAELens: stock `SAE.from_pretrained` reads every format hubsae reads, at any revision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hubsae.core.config import Architecture, TokenNorm
from hubsae.core.options import named_options
from hubsae.core.sae import SAE
from hubsae.formats import saelens
from hubsae.formats.registry import read
from hubsae.hub.sae import HubSAE

_OF_THE_HUB = ("revision", "token", "endpoint", "cache_dir", "local_files_only")


_Parts = tuple[dict[str, Any], dict[str, Tensor], Tensor | None]
"""Config, state dict and sparsity, as SAELens' loaders return them."""


class saelens_converter:
    """`converter=` for `SAE.from_pretrained(repo, id, ...)` and `SAE.load_from_disk(path, ...)`.

        SAE.from_pretrained("me/my-sae", "saes/layer6", converter=hubsae.saelens_converter(revision="v1.0"))

    >>> saelens_converter(revision="v1.0").hub
    {'revision': 'v1.0', 'local_files_only': False}

    Args:
        revision, token, endpoint, cache_dir, local_files_only: As for `HubSAE.from_pretrained`.
        format: Read files that no metadata.json describes as this format.
        k, architecture, topk_relu, threshold, decode_adds_b_pre, apply_b_dec_to_input, transposed, token_norm,
            input_scale, layer, hook, hook_out, map, base_model: For such files, as for `HubSAE.from_pretrained`.
    """

    @named_options
    def __init__(
        self,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        format: str | None = None,
        k: int | None = None,
        architecture: Architecture | None = None,
        topk_relu: bool | None = None,
        threshold: float | None = None,
        decode_adds_b_pre: bool | None = None,
        apply_b_dec_to_input: bool | None = None,
        transposed: bool | None = None,
        token_norm: TokenNorm | None = None,
        input_scale: float | None = None,
        layer: int | None = None,
        hook: str | None = None,
        hook_out: str | None = None,
        map: str | Mapping[str, str] | None = None,
        base_model: str | None = None,
    ):
        given = {n: v for n, v in locals().items() if n != "self" and v is not None}
        self.hub: dict[str, Any] = {name: value for name, value in given.items() if name in _OF_THE_HUB}
        self.choices: dict[str, Any] = {name: value for name, value in given.items() if name not in _OF_THE_HUB}

    def __call__(self, *args: Any, **named: Any) -> tuple[Any, ...]:
        """SAELens calls with names for the Hub (`repo_id, folder_name, ...`) and with the path first for a disk."""
        return self._from_hub(**named) if "repo_id" in named else self._from_disk(*args, **named)[:2]

    def _from_hub(
        self,
        repo_id: str,
        folder_name: str,
        device: str | None = None,
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> _Parts:
        options = {**self.hub, **self.choices, "force_download": force_download}
        return _parts(HubSAE.from_pretrained(repo_id, folder_name or None, **options), device, cfg_overrides)

    def _from_disk(
        self,
        path: str | os.PathLike[str],
        device: str | None = None,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> _Parts:
        return _parts(read(path, **self.choices), device, cfg_overrides)


def _parts(sae: SAE, device: str | None, overrides: dict[str, Any] | None) -> _Parts:
    sae = saelens.with_constant_norm(sae)
    cfg = saelens.cfg_of(sae) | (overrides or {})
    if device is not None:
        cfg["device"] = device
    dtype = getattr(torch, str(cfg["dtype"]).removeprefix("torch."))
    target = cfg.get("device") or "cpu"
    state = {name: t.to(device=target, dtype=dtype) for name, t in saelens.stored_tensors(sae).items()}
    return cfg, state, sae.sparsity
