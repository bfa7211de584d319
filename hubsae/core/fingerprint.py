"""What a model's activations at a hook point are on a short text, kept with an SAE: a few kB that tell a mistake apart.

    sae.fingerprint = Fingerprint.take(model, tokenizer, hook)      where the SAE is at home
    sae.check(model, tokenizer)                                     where it is used: the same, or in words why not

A wrong layer, a missing BOS or weights that a library has processed all give activations of the right shape, and an SAE
that looks as if it were bad.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hubsae.core.errors import HookError
from hubsae.core.hooks import KINDS, HookPoint, find_blocks, read_hook

FILE_NAME = "fingerprint.safetensors"
TEXT = "On 14 May 1987 Ann paid 3.50 euros for two books; why?"
ROWS = 4
"""Tokens whose activations are kept: the first, the last, and some between."""
SAME = 0.03
"""Relative difference below which activations are the same: bfloat16 against float32 is about 0.01."""
ROUNDED = 1e-3
"""Above this the same activations were computed in another precision."""
RELATED = 0.8
"""Cosine above which activations are of a model that is near: another revision, a fine-tune."""


@dataclass(frozen=True)
class Fingerprint:
    """Activations of a text at a hook point."""

    token_ids: Tensor
    """[tokens]"""
    positions: Tensor
    """[rows] the tokens whose activations are kept."""
    activations: Tensor
    """[rows, d]"""
    about: dict[str, str]
    """hook, text, model and dtype, as far as known."""

    @staticmethod
    def take(model: nn.Module, tokenizer: Any, hook: HookPoint | str | int) -> Fingerprint:
        """The activations of a short text at a hook point of a transformers model."""
        ids, point = torch.tensor(tokenizer(TEXT)["input_ids"]), HookPoint.parse(hook)
        found = _activations(model, ids, [point])[point]
        positions = torch.linspace(0, len(ids) - 1, min(ROWS, len(ids))).round().long()
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        about = {"hook": point.name, "dtype": dtype, "text": TEXT}
        if name := getattr(getattr(model, "config", None), "_name_or_path", ""):
            about["model"] = str(name).rsplit("/", 1)[-1]
        return Fingerprint(ids.int(), positions, found[positions].half().float(), about)

    def tensors(self) -> dict[str, Tensor]:
        """As they lie in `fingerprint.safetensors`: rows divided by their norms, so that half precision holds them."""
        norms = self.activations.norm(dim=1).clamp_min(1e-8)
        rows = (self.activations / norms[:, None]).half()
        return {"token_ids": self.token_ids, "positions": self.positions.int(), "rows": rows, "norms": norms}

    @staticmethod
    def of(tensors: dict[str, Tensor], about: str) -> Fingerprint:
        """The inverse of `tensors`, with `about` as JSON; raises KeyError or ValueError on what is none."""
        rows, norms = tensors["rows"].float(), tensors["norms"].float()
        positions, ids = tensors["positions"].long(), tensors["token_ids"]
        if rows.ndim != 2 or norms.shape != rows.shape[:1] or positions.shape != norms.shape or ids.ndim != 1:
            raise ValueError("shapes that do not fit each other")
        if int(positions.max()) >= len(ids) or int(positions.min()) < 0:
            raise ValueError("a position behind the text")
        said = json.loads(about)
        return Fingerprint(ids, positions, rows * norms[:, None], {str(k): str(v) for k, v in dict(said).items()})


@dataclass(frozen=True)
class Check:
    """Whether a model gives an SAE what it was trained on, and where not, what is different."""

    ok: bool
    findings: tuple[str, ...]
    """In words; of a model that fits, how well."""
    difference: float
    """Relative difference of the activations (1: nothing in common)."""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "; ".join(self.findings)


def check(kept: Fingerprint, model: nn.Module, tokenizer: Any, hook: HookPoint) -> Check:
    """Compare a model (and tokenizer, if given) at `hook` with what was kept."""
    said = [] if tokenizer is None else _tokens(kept, tokenizer)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(vocabulary, int) and int(kept.token_ids.max()) >= vocabulary:
        return Check(False, ("another model: its vocabulary is smaller than the token ids that were kept", *said), 1.0)
    ids, wanted = kept.token_ids.long(), kept.activations
    found = {point: x[kept.positions] for point, x in _activations(model, ids, _places(model, hook)).items()}
    if hook not in found:
        raise HookError(f"the model never reached {hook.name}")
    here = found[hook]
    if here.shape != wanted.shape:
        width = f"another model, or another place: width {here.shape[1]} at {hook.name}, {wanted.shape[1]} was kept"
        return Check(False, (width, *said), 1.0)
    off = _difference(here, wanted)
    if off <= SAME:
        how = "the same activations" + (" up to rounding" if off > ROUNDED else "")
        return Check(not said, (f"{how} at {hook.name} (relative difference {off:.1g})", *said), off)
    return Check(False, (_why(found, hook, wanted, off), *said), off)


def _why(found: dict[HookPoint, Tensor], hook: HookPoint, wanted: Tensor, off: float) -> str:
    others = {p: _difference(x, wanted) for p, x in found.items() if p != hook and x.shape == wanted.shape}
    near = min(others, key=lambda point: others[point], default=None)
    if near is not None and others[near] <= SAME:
        what = "layer" if near.kind == hook.kind else "place"
        return f"wrong {what}: these are the activations of {near.name}, and {hook.name} was asked for"
    here = found[hook]
    for name, change in _PROCESSED.items():
        for one, other in ((here, wanted), (wanted, here)):
            if _difference(change(one), other) <= SAME:
                whose = "the model's" if one is wanted else "those that were kept"
                return f"other processing: {whose} are {name}"
    factor = (here * wanted).sum() / wanted.square().sum()
    if float(factor) > 0 and _difference(here / factor, wanted) <= SAME:
        return f"other processing: the model's are {float(factor):.4g} times those that were kept"
    cosine = float(torch.nn.functional.cosine_similarity(here, wanted, dim=1).median())
    if cosine > RELATED:
        return (
            f"other revision: near at {hook.name}, not the same (relative difference {off:.2g}, cosine {cosine:.3f}): "
            "weights of another revision or fine-tune"
        )
    return f"another model: nothing like it at {hook.name} or any other layer (cosine {cosine:.2f})"


_PROCESSED = {
    "centred, as TransformerLens does with center_writing_weights": lambda x: x - x.mean(1, keepdim=True),
    "divided by their norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "normalised per token (layer norm)": lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
    "scaled to a mean square of one": lambda x: x / x.square().mean(1, keepdim=True).sqrt(),
}


def _tokens(kept: Fingerprint, tokenizer: Any) -> list[str]:
    """What the tokenizer makes of the same text, where it is something else."""
    text = kept.about.get("text")
    if text is None:
        return []
    mine, theirs = list(tokenizer(text)["input_ids"]), kept.token_ids.tolist()
    if mine == theirs:
        return []
    if mine == theirs[1:]:
        return [f"BOS missing: the text was read with token {theirs[0]} in front, and this tokenizer puts none there"]
    if mine[1:] == theirs:
        return [f"BOS added: this tokenizer puts token {mine[0]} in front, and the text was read without"]
    return ["other tokenizer: it cuts the same text into other tokens"]


def _difference(x: Tensor, wanted: Tensor) -> float:
    """The median over rows of |x - wanted| / |wanted|: one massive token decides nothing."""
    return float(((x - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-8)).median())


def _places(model: nn.Module, hook: HookPoint) -> list[HookPoint]:
    """The hook point, the same one in every layer, and the others of its layer and the ones beside."""
    layers = range(len(find_blocks(model)[1]))
    wanted = [hook, *(HookPoint(layer, hook.kind) for layer in layers if hook.kind != "embed")]
    near = [n for n in (hook.layer - 1, hook.layer, hook.layer + 1) if n in layers]
    wanted += [HookPoint(n, kind) for n in near for kind in KINDS if kind != "embed"]
    return list(dict.fromkeys(wanted))


@torch.no_grad()
def _activations(model: nn.Module, ids: Tensor, hooks: list[HookPoint]) -> dict[HookPoint, Tensor]:
    """[tokens, d] at every hook point that the model has; the first one must be there."""
    seen: dict[HookPoint, Tensor] = {}
    device = next(model.parameters()).device
    training = model.training
    model.eval()

    def keep(hidden: Tensor, hook: HookPoint) -> None:
        seen.setdefault(hook, hidden[0].float().cpu())

    try:
        with ExitStack() as stack:
            for number, hook in enumerate(hooks):
                try:
                    stack.enter_context(read_hook(model, hook, partial(keep, hook=hook)))
                except HookError:
                    if number == 0:
                        raise
            model(input_ids=ids.long()[None].to(device), use_cache=False)
    finally:
        model.train(training)
    return seen
