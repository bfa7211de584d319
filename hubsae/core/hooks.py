"""Where an SAE sits in a transformers model, and how to read or replace the activations there.

The hook is always on the module itself. `hidden_states` of a model's output is no substitute: its last entry
is taken after the final norm. Layers return a bare tensor in recent transformers and a tuple in older ones;
everything here accepts both and gives back the same kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from hubsae.core.errors import HookError

HookKind = Literal["resid_post", "resid_pre", "mlp_out", "attn_out"]

# Path of the list of blocks, then the names of a block's attention and feed-forward parts, by family.
BLOCK_PATHS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "layers", "h")
ATTENTION_NAMES = ("self_attn", "attn", "attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn")

_TL = re.compile(r"^blocks\.(\d+)\.(?:hook_(resid_post|resid_pre|mlp_out|attn_out))$")
_MODULE = re.compile(
    r"^(?:[\w.]*\.)?(?:layers|h|blocks|block)[._](\d+)(?:\.(self_attn|attn|attention|mlp))?(?:\.output)?$"
)
_SHORT = re.compile(r"^(?:l|L|layer[_ ]?)?(\d+)(?:[.:](resid_post|resid_pre|mlp_out|attn_out))?$")


@dataclass(frozen=True, order=True)
class HookPoint:
    """A layer and a place in it.

    >>> HookPoint.parse("model.layers.18")
    HookPoint(layer=18, kind='resid_post')
    >>> HookPoint.parse("blocks.3.hook_mlp_out").transformer_lens
    'blocks.3.hook_mlp_out'
    >>> HookPoint.parse(6).name
    'layers.6'
    """

    layer: int
    kind: HookKind = "resid_post"

    @staticmethod
    def parse(text: str | int | HookPoint) -> HookPoint:
        """Read a layer number, a module path, a TransformerLens name, or `6.mlp_out`."""
        if isinstance(text, HookPoint):
            return text
        if isinstance(text, int):
            return HookPoint(text)
        text = text.strip()
        if match := _TL.match(text):
            return HookPoint(int(match[1]), match[2])  # pyright: ignore[reportArgumentType]
        if match := _SHORT.match(text):
            return HookPoint(int(match[1]), match[2] or "resid_post")  # pyright: ignore[reportArgumentType]
        name, _, kind = text.rpartition(".")
        if kind in get_args(HookKind):
            return HookPoint(HookPoint.parse(name).layer, kind)  # pyright: ignore[reportArgumentType]
        if match := _MODULE.match(text):
            part = match[2]
            return HookPoint(int(match[1]), "resid_post" if not part else "mlp_out" if part == "mlp" else "attn_out")
        raise HookError(
            f"cannot read {text!r} as a hook point",
            hint="write a layer number (18), a module path (model.layers.18), a TransformerLens name "
            "(blocks.18.hook_resid_post), or a layer and a place (18.mlp_out)",
        )

    @property
    def name(self) -> str:
        """Short name, used for dataset configs and folders: `layers.6`, `layers.6.mlp_out`."""
        return f"layers.{self.layer}" + ("" if self.kind == "resid_post" else f".{self.kind}")

    @property
    def transformer_lens(self) -> str:
        """The name TransformerLens and SAELens use."""
        return f"blocks.{self.layer}.hook_{self.kind}"

    def module_path(self, model: nn.Module | None = None) -> str:
        """The module to hook. Without a model, the path in Llama-like families (`model.layers.N`).

        resid_post and resid_pre are the output and the input of the block itself.
        """
        if model is None:
            block, attention, mlp = f"model.layers.{self.layer}", "self_attn", "mlp"
        else:
            path, blocks = find_blocks(model)
            if not 0 <= self.layer < len(blocks):
                raise HookError(
                    f"{type(model).__name__} has no layer {self.layer}: it has {len(blocks)} blocks",
                    hint=f"choose a layer from 0 to {len(blocks) - 1}",
                )
            block, attention, mlp = f"{path}.{self.layer}", None, None
            if self.kind == "attn_out":
                attention = _part(blocks[self.layer], ATTENTION_NAMES, self)
            if self.kind == "mlp_out":
                mlp = _part(blocks[self.layer], MLP_NAMES, self)
        if self.kind == "attn_out":
            return f"{block}.{attention}"
        return f"{block}.{mlp}" if self.kind == "mlp_out" else block


def hook_record(hook: str | None, layer: int | None) -> dict[str, Any]:
    """The hook part of a record from a hook name or a layer; what cannot be parsed is kept as it stands."""
    if hook is None and layer is None:
        return {}
    try:
        point = HookPoint.parse(hook if hook is not None else layer)  # pyright: ignore[reportArgumentType]
    except HookError:
        key = "transformer_lens" if str(hook).startswith(("blocks.", "hook_")) else "module_path"
        return {key: hook, "kind": "other"} | ({"layer": layer} if layer is not None else {})
    return {
        "layer": point.layer,
        "kind": point.kind,
        "module_path": point.module_path(),
        "transformer_lens": point.transformer_lens,
    }


def _part(block: nn.Module, names: tuple[str, ...], hook: HookPoint) -> str:
    for name in names:
        if isinstance(getattr(block, name, None), nn.Module):
            return name
    have = ", ".join(name for name, _ in block.named_children())
    raise HookError(f"{type(block).__name__} has no part for {hook.kind}", hint=f"its parts are: {have}")


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of a transformers model and their path, whatever it is wrapped in (peft, a head).

    >>> toy = nn.Module(); toy.layers = nn.ModuleList([nn.Linear(2, 2)])
    >>> find_blocks(toy)[0]
    'layers'
    """
    for path in BLOCK_PATHS:
        found = _walk(model, path)
        if isinstance(found, nn.ModuleList) and len(found):
            return path, found
    for prefix in ("base_model.model", "module", "model", "language_model", "model.language_model"):
        inner = _walk(model, prefix)
        if isinstance(inner, nn.Module):
            for path in BLOCK_PATHS:
                found = _walk(inner, path)
                if isinstance(found, nn.ModuleList) and len(found):
                    return f"{prefix}.{path}", found
    raise HookError(
        f"cannot find the decoder blocks of {type(model).__name__}",
        hint="supported layouts keep them at " + ", ".join(BLOCK_PATHS),
    )


def _walk(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def hidden_of(output: Any) -> Tensor:
    """The activations in what a module returned: the tensor itself, or the first entry of a tuple."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise HookError(f"a hooked module returned {type(hidden).__name__}, not activations")
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with its activations replaced, of the same kind."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return [hidden, *output[1:]] if isinstance(output, list) else hidden


@contextmanager
def edit_hook(
    model: nn.Module, hook: HookPoint | str | int, edit: Callable[[Tensor, dict[str, Any]], Tensor | None]
) -> Iterator[nn.Module]:
    """Call `edit(activations [batch, seq, d], kwargs of the module)` at the hook point on every forward.

    What it returns takes the place of the activations; None leaves them. The hook is always removed.
    """
    point = HookPoint.parse(hook)
    module = model.get_submodule(point.module_path(model))

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if args:
            new = edit(args[0], kwargs)
            return None if new is None else ((new, *args[1:]), kwargs)
        new = edit(kwargs["hidden_states"], kwargs)
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    def after(_: nn.Module, __: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        new = edit(hidden_of(output), kwargs)
        return None if new is None else with_hidden(output, new)

    if point.kind == "resid_pre":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield module
    finally:
        handle.remove()


@contextmanager
def read_hook(model: nn.Module, hook: HookPoint | str | int, see: Callable[[Tensor], None]) -> Iterator[nn.Module]:
    """Call `see(activations [batch, seq, d])` at the hook point on every forward; nothing is changed."""

    def edit(hidden: Tensor, _: dict[str, Any]) -> None:
        see(hidden)

    with edit_hook(model, hook, edit) as module:
        yield module
