"""An SAE inside a running transformers model: read its codes, put its reconstruction in place, steer.

New tensors are always returned to the model: editing in place would also change what others captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hubsae.core.codes import SparseCodes
from hubsae.core.errors import HookError
from hubsae.core.hooks import HookPoint, edit_hook
from hubsae.core.sae import SAE


class Recorded:
    """What `attach` saw: one SparseCodes per forward, in order."""

    def __init__(self) -> None:
        self.all: list[SparseCodes] = []

    def __len__(self) -> int:
        return len(self.all)

    @property
    def codes(self) -> SparseCodes:
        """Codes of the latest forward [batch, seq, k]."""
        if not self.all:
            raise HookError("no forward has run yet", hint="call model(...) inside the `with sae.attach(model)` block")
        return self.all[-1]

    def dense(self) -> Tensor:
        """Dense codes of the latest forward [batch, seq, d_sae]."""
        return self.codes.dense()


def hook_of(sae: SAE, hook: Any = None) -> HookPoint:
    """The hook point asked for, or the one the SAE's metadata names."""
    if hook is not None:
        return HookPoint.parse(hook)
    info = sae.metadata.hook
    if info.layer is not None and info.kind != "other":
        said = HookPoint.parse(info.module_path).said if info.module_path else ""
        return HookPoint(info.layer, info.kind, said)
    for name in (info.transformer_lens, info.module_path):
        if name:
            return HookPoint.parse(name)
    raise HookError("this SAE's metadata names no hook point", hint="pass hook=, for example hook='model.layers.18'")


def _check_width(sae: SAE, hidden: Tensor) -> None:
    if hidden.shape[-1] != sae.d_in:
        raise HookError(
            f"the model's activations have width {hidden.shape[-1]}, the SAE takes {sae.d_in}",
            hint="is this the model the SAE was trained on? its metadata says: "
            f"{sae.metadata.base_model.id or 'unknown'}",
        )


@contextmanager
def attach(sae: SAE, model: nn.Module, hook: Any = None) -> Iterator[Recorded]:
    """Record the codes at the hook point on every forward; the model is not changed."""
    seen = Recorded()

    def see(hidden: Tensor, _: dict[str, Any]) -> None:
        _check_width(sae, hidden)
        with torch.no_grad():
            seen.all.append(sae.encode_sparse(hidden.to(sae.device)))

    with edit_hook(model, hook_of(sae, hook), see):
        yield seen


@contextmanager
def splice(sae: SAE, model: nn.Module, hook: Any = None, *, mask: Tensor | None = None) -> Iterator[None]:
    """Replace the activations by their reconstruction, where `mask` [batch, seq] is true (everywhere without one).

    The SAE computes in its own dtype; the result is cast back to the model's.
    """

    def edit(hidden: Tensor, _: dict[str, Any]) -> Tensor:
        _check_width(sae, hidden)
        rebuilt = sae(hidden.to(sae.device)).to(hidden)
        if mask is None:
            return rebuilt
        if mask.shape != hidden.shape[:2]:
            raise HookError(f"mask has shape {tuple(mask.shape)}, the activations are {tuple(hidden.shape[:2])}")
        return torch.where(mask.to(hidden.device)[..., None].bool(), rebuilt, hidden)

    with edit_hook(model, hook_of(sae, hook), edit):
        yield


@contextmanager
def steer(
    sae: SAE, model: nn.Module, feature: int, strength: float, hook: Any = None, *, unit: bool = False
) -> Iterator[None]:
    """Add `strength` × the decoder row of `feature` to the activations at every position.

    With `unit` the direction is first scaled to norm one, so that strengths compare across features.
    """
    rows = range(sae.d_sae) if sae.features is None else sae.features
    if feature not in rows:
        raise HookError(
            f"feature {feature} is not in this SAE",
            hint=f"features run from 0 to {sae.d_sae - 1}" if sae.features is None else f"loaded: {list(rows)[:20]}",
        )
    row = feature if sae.features is None else sae.features.index(feature)
    direction = sae.W_dec.detach()[row]
    if unit:
        direction = direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)

    def edit(hidden: Tensor, _: dict[str, Any]) -> Tensor:
        _check_width(sae, hidden)
        return hidden + (strength * direction).to(hidden)

    with edit_hook(model, hook_of(sae, hook), edit):
        yield
