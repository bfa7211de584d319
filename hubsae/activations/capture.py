"""Run a decoder on a batch and take the activations at several hook points in one pass.

No logits are computed, and the pass stops behind the last layer that is wanted. Hooks sit on the modules
themselves: the last entry of `hidden_states` is taken after the final norm, and is something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from hubsae.core.errors import HookError
from hubsae.core.hooks import HookPoint, read_hook


class _Enough(Exception):
    """Leaves the forward pass once every hook point has been seen."""


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its language-model head, whatever it is wrapped in."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    core = getattr(inner, str(getattr(inner, "base_model_prefix", "") or "-"), None)
    return core if isinstance(core, nn.Module) else inner  # pyright: ignore[reportReturnType]


def padded(sequences: Sequence[Sequence[int]], *, left: bool = False, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [batch, longest] and the mask of real tokens."""
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        at = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids[row, at] = torch.as_tensor(sequence, dtype=torch.long)
        mask[row, at] = True
    return ids, mask


@torch.inference_mode()
def capture(
    model: nn.Module, ids: Tensor, mask: Tensor, hooks: Sequence[HookPoint], keep: Tensor | None = None
) -> dict[str, Tensor]:
    """Activations [kept tokens, d] by hook name, row by row; `keep` (default: the mask) selects on the device.

    Padding is on the right, where it changes nothing for the real tokens.
    """
    found: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    chosen = mask if keep is None else keep

    def see(name: str, hidden: Tensor) -> None:
        if hidden.shape[:2] != chosen.shape:
            raise HookError(
                f"{name}: expected activations of {tuple(chosen.shape)} tokens, found {tuple(hidden.shape)}"
            )
        found[name] = hidden[chosen.to(hidden.device)]  # [kept, d]
        if len(found) == len(hooks):
            raise _Enough

    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(read_hook(model, hook, lambda hidden, name=hook.name: see(name, hidden)))
        # without padding there is nothing to mask, and attention takes its faster causal path
        attention = None if bool(mask.all()) else mask.to(device)
        try:
            backbone(model)(input_ids=ids.to(device), attention_mask=attention, use_cache=False)
        except _Enough:
            return found
    missing = [h.name for h in hooks if h.name not in found]
    raise HookError(f"the forward pass never reached {', '.join(missing)}")
