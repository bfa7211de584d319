"""Where an SAE sits in a transformers model, and how to read or replace the activations there.

The hook is always on a module itself. `hidden_states` of a model's output is no substitute: its last entry is taken
after the final norm. Layers return a bare tensor in recent transformers and a tuple in older ones; everything here
accepts both and gives back the same kind.

A place has one meaning in every family, that of TransformerLens: `mlp_out` and `attn_out` are what is added to the
residual, so behind the norm where a family has one there (Gemma 2 and 3, OLMo 2, GLM 4). The test compares each family
with TransformerLens; where a family computes something else, the place is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hubsae.core.errors import HookError

KINDS: dict[str, str] = {
    "resid_post": "blocks.{}.hook_resid_post",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_out": "blocks.{}.hook_attn_out",
    "attn_z": "blocks.{}.attn.hook_z",
    "mlp_in": "blocks.{}.mlp.hook_in",
    "mlp_norm": "blocks.{}.ln2.hook_normalized",
    "embed": "hook_embed",
}
"""Places and their TransformerLens names: `attn_z` is the heads side by side before the output projection, `mlp_in`
what the MLP gets, `mlp_norm` the same before the norm's learned scale."""

# Path of the list of blocks, then the names of a block's parts, by family.
BLOCK_PATHS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "layers", "h")
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
PROJECTION_NAMES = ("o_proj", "c_proj", "out_proj", "dense", "wo")
MLP_POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
MLP_PRE_NORMS = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "ffn_norm", "ln_2")
POSITION_NAMES = ("wpe", "embed_positions", "position_embeddings")

_TL = {re.compile("^" + re.escape(name).replace(r"\{\}", r"(\d+)") + "$"): kind for kind, name in KINDS.items()}
_SHORT = re.compile(r"^(?:l|L|layers?[_. ]?)?(\d+)(?:[.:]([a-z_]+))?$")
_MODULE = re.compile(
    r"^(?:[\w.]*\.)?(?:layers|h|blocks|block)[._](\d+)(?:\.((?!hook_|(?:in|out)put$)[\w.]+?))?(?:\.(input|output))?$"
)
_EMBED = re.compile(r"^(?:embed|hook_embed|(?:[\w.]+\.)?(?:embed_tokens|wte)(?:\.output)?)$")
# modules whose name says the place in every family that has them
_ALWAYS = {
    "post_feedforward_layernorm.output": "mlp_out",
    "post_mlp_layernorm.output": "mlp_out",
    "post_self_attn_layernorm.output": "attn_out",
    "pre_feedforward_layernorm.output": "mlp_in",
    "pre_feedforward_layernorm.input": "resid_mid",
}
# families with a norm behind the MLP, by the name of the base model, for paths that are written without a model
_POST_NORM_MODELS = re.compile(r"gemma-?[23]|olmo-?[23]|exaone-?4", re.IGNORECASE)


# blocks in which what attention and MLP return is not what they add to the residual
_SCALES = ("residual_multiplier", "residual_scale", "layer_scalar", "altup", "attn_alpha_factor", "mamba")
_OTHERWISE = (
    "BloomBlock", "BeamDecoderLayer", "DogeDecoderLayer", "FalconH1", "Inkling", "MiniMaxDecoderLayer",
    "DeepseekV4DecoderLayer", "modeling_openai.Block",
)  # fmt: skip


class Place(NamedTuple):
    """What a hook goes on."""

    path: str
    """Module, from the model."""
    side: str
    """input or output."""
    normalised: bool = False
    """Whether the input is normalised first, as the module itself does before its learned scale."""


@dataclass(frozen=True, order=True)
class HookPoint:
    """A layer and a place in it: one of `KINDS`, or a module of the block with its side (`mlp.down_proj.input`).

    >>> HookPoint.parse("model.layers.18")
    HookPoint(layer=18, kind='resid_post')
    >>> HookPoint.parse("blocks.3.hook_mlp_out").transformer_lens
    'blocks.3.hook_mlp_out'
    >>> HookPoint.parse("model.layers.0.self_attn.o_proj.input")
    HookPoint(layer=0, kind='attn_z')
    >>> HookPoint.parse(6).name
    'layers.6'
    """

    layer: int
    kind: str = "resid_post"
    said: str = field(default="", compare=False, repr=False)
    """The part of the block that was named for it; refused where the family adds something else to the residual."""

    @staticmethod
    def parse(text: str | int | HookPoint) -> HookPoint:
        """Read a layer number, a module path, a TransformerLens name, or `6.mlp_out`."""
        if isinstance(text, HookPoint):
            return text
        if isinstance(text, int):
            return HookPoint(text)
        text = text.strip()
        if _EMBED.match(text):
            return HookPoint(0, "embed")
        for pattern, kind in _TL.items():
            if match := pattern.match(text):
                return HookPoint(int(match[1]), kind)
        if (match := _SHORT.match(text)) and (match[2] or "resid_post") in KINDS:
            return HookPoint(int(match[1]), match[2] or "resid_post")
        name, _, kind = text.rpartition(".")
        if kind in KINDS and (match := _MODULE.match(name)) and not match[2]:
            return HookPoint(int(match[1]), kind)
        if match := _MODULE.match(text):
            return _in_block(int(match[1]), match[2] or "", match[3])
        raise HookError(
            f"cannot read {text!r} as a hook point",
            hint="write a layer number (18), a module path (model.layers.18), a TransformerLens name "
            "(blocks.18.hook_resid_post), or a layer and a place (18.mlp_out)",
        )

    @property
    def name(self) -> str:
        """Short name, used for dataset configs and folders: `layers.6`, `layers.6.mlp_out`, `embed`."""
        if self.kind == "embed":
            return "embed"
        return f"layers.{self.layer}" + ("" if self.kind == "resid_post" else f".{self.kind}")

    @property
    def transformer_lens(self) -> str | None:
        """The name TransformerLens and SAELens use; None for a module that has none there."""
        return KINDS[self.kind].format(self.layer) if self.kind in KINDS else None

    def module_path(self, model: nn.Module | None = None, *, base_model: str | None = None) -> str:
        """The module to hook, with `.input` behind it where it is what goes in.

        Without a model it is the path in Llama-like families (`model.layers.N`); the id of the base model tells
        those with a norm behind attention and MLP.
        """
        if model is not None:
            place = self.place(model)
            return place.path + (".input" if place.side == "input" else "")
        block, post = f"model.layers.{self.layer}", bool(_POST_NORM_MODELS.search(base_model or ""))
        paths = {
            "resid_post": block,
            "resid_pre": f"{block}.input",
            "resid_mid": f"{block}.{'pre_feedforward_layernorm' if post else 'post_attention_layernorm'}.input",
            "mlp_out": f"{block}.{'post_feedforward_layernorm' if post else 'mlp'}",
            "attn_out": f"{block}.{'post_attention_layernorm' if post else 'self_attn'}",
            "attn_z": f"{block}.self_attn.o_proj.input",
            "mlp_in": f"{block}.mlp.input",
            "mlp_norm": f"{block}.{'pre_feedforward_layernorm' if post else 'post_attention_layernorm'}.input",
            "embed": "model.embed_tokens",
        }
        return paths.get(self.kind) or f"{block}.{self.kind}"

    def place(self, model: nn.Module) -> Place:
        """The module of this model and its side; a place that the family does not have is refused by name."""
        path, blocks = find_blocks(model)
        if not 0 <= self.layer < len(blocks):
            raise HookError(
                f"{type(model).__name__} has no layer {self.layer}: it has {len(blocks)} blocks",
                hint=f"choose a layer from 0 to {len(blocks) - 1}",
            )
        block, base = blocks[self.layer], f"{path}.{self.layer}"
        if self.kind in ("resid_post", "resid_pre"):
            return Place(base, "output" if self.kind == "resid_post" else "input")
        if self.kind == "embed":
            return _embedding(model, base)
        if self.kind not in KINDS:
            part, _, side = self.kind.rpartition(".")
            if _walk(block, part) is None:
                raise HookError(f"{type(block).__name__} has no module {part}", hint=_parts_hint(block))
            return Place(f"{base}.{part}", side)
        if self.kind in ("mlp_out", "attn_out"):
            return Place(f"{base}.{self._added(block)}", "output")
        if self.kind == "attn_z":
            attention = _part(block, ATTENTION_NAMES, self)
            return Place(f"{base}.{attention}.{_part(getattr(block, attention), PROJECTION_NAMES, self)}", "input")
        if self.kind == "mlp_in":
            return Place(f"{base}.{_part(block, MLP_NAMES, self)}", "input")
        norm = _mlp_pre_norm(block)
        if norm is None and self.kind == "resid_mid" and _has(block, MLP_POST_NORMS) and not _parallel(block):
            return Place(f"{base}.{_part(block, MLP_NAMES, self)}", "input")  # OLMo 2: nothing before the MLP
        if norm is None:
            raise HookError(
                f"{type(block).__name__} has no {self.kind}: its MLP does not read the residual behind the attention",
                hint=_parts_hint(block),
            )
        return Place(f"{base}.{norm}", "input", self.kind == "mlp_norm")

    def _added(self, block: nn.Module) -> str:
        """The part of a block whose output is added to the residual."""
        name = f"{type(block).__module__}.{type(block).__name__}"
        if any(hasattr(block, attribute) for attribute in _SCALES) or any(family in name for family in _OTHERWISE):
            raise HookError(
                f"{type(block).__name__} does not just add what its parts return (it scales it, or adds before they "
                f"return), so {self.kind} is no module's output there",
                hint="use resid_post or resid_mid, or name the module with its side: 3.mlp.output",
            )
        mlp = self.kind == "mlp_out"
        post = _has(block, MLP_POST_NORMS if mlp else ("post_self_attn_layernorm",))
        if not mlp and post is None and _has(block, MLP_POST_NORMS):
            post = _has(block, ("post_attention_layernorm",))
        found = post or _part(block, MLP_NAMES if mlp else ATTENTION_NAMES, self)
        if self.said and post is not None and self.said != post:
            raise HookError(
                f"{type(block).__name__} normalises what {self.said} returns before adding it to the residual, so "
                f"{self.said} and {self.kind} differ",
                hint=f"write {self.layer}.{self.kind} for what is added (behind {post}, as in TransformerLens), or "
                f"layers.{self.layer}.{self.said}.output for the module itself",
            )
        return found


def _in_block(layer: int, part: str, side: str | None) -> HookPoint:
    """A module of a block as the place that it is in every family, or as itself."""
    if not part:
        return HookPoint(layer, "resid_pre" if side == "input" else "resid_post")
    raw = f"{part}.{side or 'output'}"
    if raw in _ALWAYS:
        return HookPoint(layer, _ALWAYS[raw])
    outer, _, inner = part.partition(".")
    if side == "input" and outer in ATTENTION_NAMES and inner in PROJECTION_NAMES:
        return HookPoint(layer, "attn_z")
    if not inner and outer in (*ATTENTION_NAMES, *MLP_NAMES):
        mlp = outer in MLP_NAMES
        if side == "input" and mlp:
            return HookPoint(layer, "mlp_in")
        if side is None:
            return HookPoint(layer, "mlp_out" if mlp else "attn_out", part)
    return HookPoint(layer, raw)


def _has(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def _part(module: nn.Module, names: tuple[str, ...], hook: HookPoint) -> str:
    if (name := _has(module, names)) is not None:
        return name
    raise HookError(f"{type(module).__name__} has no part for {hook.kind}", hint=_parts_hint(module))


def _parts_hint(module: nn.Module) -> str:
    return f"its parts are: {', '.join(name for name, _ in module.named_children())}"


def _parallel(block: nn.Module) -> bool:
    """Whether attention and MLP read the same residual."""
    return bool(getattr(block, "use_parallel_residual", False))


def _mlp_pre_norm(block: nn.Module) -> str | None:
    """The norm between the residual behind the attention and the MLP."""
    if _parallel(block):
        return None
    if (norm := _has(block, MLP_PRE_NORMS)) is not None:
        return norm
    post_attention_is_behind = _has(block, MLP_POST_NORMS) and not _has(block, ("post_self_attn_layernorm",))
    return None if post_attention_is_behind else _has(block, ("post_attention_layernorm", "final_layer_norm"))


def _embedding(model: nn.Module, first_block: str) -> Place:
    """Token embeddings before positions are added: without learned positions, what the first block gets (so scaled)."""
    inner = model.get_submodule(first_block.rpartition(".")[0].rpartition(".")[0]) if "." in first_block else model
    if _has(inner, POSITION_NAMES) is None:
        return Place(first_block, "input")
    get = getattr(model, "get_input_embeddings", None)
    table = get() if get is not None else None
    path = next((name for name, module in model.named_modules() if module is table), None)
    if table is None or path is None:
        raise HookError(f"cannot find the token embeddings of {type(model).__name__}")
    return Place(path, "output")


def hook_record(hook: str | None, layer: int | None, base_model: str | None = None) -> dict[str, Any]:
    """The hook part of a record from a hook name or a layer; what cannot be parsed is kept as it stands."""
    if hook is None and layer is None:
        return {}
    try:
        point = HookPoint.parse(hook if hook is not None else layer)  # pyright: ignore[reportArgumentType]
    except HookError:
        key = "transformer_lens" if str(hook).startswith(("blocks.", "hook_")) else "module_path"
        return {key: hook, "kind": "other"} | ({"layer": layer} if layer is not None else {})
    if point.said and _POST_NORM_MODELS.search(base_model or ""):
        point = HookPoint(point.layer, f"{point.said}.output")
    record = {"layer": point.layer, "kind": point.kind, "transformer_lens": point.transformer_lens}
    # which module these are depends on the family, so without a model it is not known
    by_family = point.kind in ("mlp_out", "attn_out", "resid_mid", "mlp_norm") and not point.said
    if base_model is None and by_family:
        return record
    return record | {"module_path": point.module_path(base_model=base_model)}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of a transformers model and their path, whatever it is wrapped in (peft, a head).

    >>> toy = nn.Module(); toy.layers = nn.ModuleList([nn.Linear(2, 2)])
    >>> find_blocks(toy)[0]
    'layers'
    """
    for prefix in ("", "base_model.model.", "module.", "model.", "language_model.", "model.language_model."):
        for path in BLOCK_PATHS:
            found = _walk(model, prefix + path)
            if isinstance(found, nn.ModuleList) and len(found):
                return prefix + path, found
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


def _normalised(norm: nn.Module, hidden: Tensor) -> Tensor:
    """What a norm computes before its learned scale."""
    eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    if eps is None:
        raise HookError(f"{type(norm).__name__} does not say its epsilon, so its normalised input is not known")
    wide = hidden.float()
    if isinstance(norm, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + float(eps))).to(hidden.dtype)


@contextmanager
def edit_hook(
    model: nn.Module, hook: HookPoint | str | int, edit: Callable[[Tensor, dict[str, Any]], Tensor | None]
) -> Iterator[nn.Module]:
    """Call `edit(activations [batch, seq, d], kwargs of the module)` at the hook point on every forward.

    What it returns takes the place of the activations; None leaves them. The hook is always removed.
    """
    point = HookPoint.parse(hook)
    place = point.place(model)
    module = model.get_submodule(place.path)

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        new = edit(_normalised(module, hidden) if place.normalised else hidden, kwargs)
        if new is None:
            return None
        if place.normalised:
            raise HookError(f"{point.name} can be read, not replaced: it lies inside {place.path}")
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_: nn.Module, __: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        new = edit(hidden_of(output), kwargs)
        return None if new is None else with_hidden(output, new)

    if place.side == "input":
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
