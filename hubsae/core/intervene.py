"""An SAE inside a running transformers model: read its codes, put its reconstruction in place, steer.

New tensors are always returned to the model: editing in place would also change what others captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hubsae.core.codes import SparseCodes
from hubsae.core.errors import HookError
from hubsae.core.hooks import HookPoint, edit_hook, read_hook
from hubsae.core.metadata import HookInfo
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
    """The hook point asked for, or the one the SAE's metadata names; of a transcoder, that of its input."""
    return HookPoint.parse(hook) if hook is not None else recorded(sae.metadata.hook, "hook='model.layers.18'")


def hook_out_of(sae: SAE, hook: Any = None) -> HookPoint:
    """Where what the SAE computes belongs: a transcoder's output, else `hook_of`."""
    if not sae.config.is_transcoder:
        return hook_of(sae, hook)
    return HookPoint.parse(hook) if hook is not None else recorded(sae.metadata.hook_out, "hook_out='18.mlp_out'")


def recorded(info: HookInfo | None, example: str = "hook='model.layers.18'") -> HookPoint:
    """The hook point that a record names; `example` is what to write where it names none."""
    names = [] if info is None else [name for name in (info.transformer_lens, info.module_path) if name]
    points, problems = [], []
    for name in names:
        try:
            points.append(HookPoint.parse(name))
        except HookError as error:
            problems.append(error)
    if info is not None and info.layer is not None and info.kind != "other":
        # a module that was named stays named, so that a family in which it is another place refuses it
        return HookPoint(info.layer, info.kind, next((p.said for p in points if p.said and p.kind == info.kind), ""))
    if points:
        return points[0]
    if problems:
        raise problems[0]
    raise HookError("this SAE's metadata names no hook point", hint=f"pass {example}, for example")


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

    def see(hidden: Tensor) -> None:
        _check_width(sae, hidden)
        with torch.no_grad():
            seen.all.append(sae.encode_sparse(hidden.to(sae.device)))

    with read_hook(model, hook_of(sae, hook), see):
        yield seen


@contextmanager
def splice(
    sae: SAE, model: nn.Module, hook: Any = None, *, mask: Tensor | None = None, hook_out: Any = None
) -> Iterator[None]:
    """Replace the activations by their reconstruction, where `mask` [batch, seq] is true (everywhere without one).

    A transcoder reads at its input and replaces at its output (`hook_out`). The SAE computes in its own dtype; the
    result is cast back to the model's.
    """
    read: list[Tensor] = []

    def see(hidden: Tensor) -> None:
        _check_width(sae, hidden)
        read[:] = [hidden]

    def edit(hidden: Tensor, _: dict[str, Any]) -> Tensor:
        if not sae.config.is_transcoder:
            see(hidden)
        if not read:
            raise HookError("the transcoder's output came before its input", hint="is hook_out behind hook?")
        rebuilt = sae(read.pop().to(sae.device)).to(hidden)
        if rebuilt.shape != hidden.shape:
            raise HookError(f"the SAE gives {tuple(rebuilt.shape)}, the model has {tuple(hidden.shape)} there")
        if mask is None:
            return rebuilt
        if mask.shape != hidden.shape[:2]:
            raise HookError(f"mask has shape {tuple(mask.shape)}, the activations are {tuple(hidden.shape[:2])}")
        return torch.where(mask.to(hidden.device)[..., None].bool(), rebuilt, hidden)

    with ExitStack() as stack:
        if sae.config.is_transcoder:
            stack.enter_context(read_hook(model, hook_of(sae, hook), see))
            hook = hook_out
        stack.enter_context(edit_hook(model, hook_out_of(sae, hook), edit))
        yield


@contextmanager
def steer(
    sae: SAE, model: nn.Module, feature: int, strength: float, hook: Any = None, *, unit: bool = True
) -> Iterator[None]:
    """Add `strength` × the unit vector of `feature` to the activations at every position.

    A transcoder's goes to its output.

    Decoder rows of folded SAEs have any norm, so the direction is scaled to norm one and strengths compare across
    features; with `unit=False` the row is taken as it is, and a strength is a value of the latent.
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
        if hidden.shape[-1] != direction.shape[0]:
            _check_width(sae, hidden)
        return hidden + (strength * direction).to(hidden)

    with edit_hook(model, hook_out_of(sae, hook), edit):
        yield
