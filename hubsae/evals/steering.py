"""Steering with numbers: what a model writes with a direction added to its activations, against controls.

    direction x strength x prompt -> a continuation each (all in the same batches) -> one row per direction and strength

What the numbers are and what they prove is in `reliability`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hubsae.activations.capture import padded
from hubsae.activations.generation import answers, end_ids, generate, pad_id
from hubsae.core.errors import ConfigError, DataError
from hubsae.core.hooks import HookPoint, edit_hook
from hubsae.core.intervene import hook_out_of
from hubsae.core.progress import progress
from hubsae.core.sae import SAE
from hubsae.evals import bootstrap
from hubsae.evals.reliability import FEATURE, RANDOM_DIRECTION, RANDOM_FEATURE, UNSTEERED, Direction, SteeringResult
from hubsae.evals.running import evaluating

REPEATS = 3
"""Length of the token n-grams that repetition counts."""

Judge = Callable[["Direction", str, str], float]
"""(direction, prompt, continuation) -> from 0, the feature does not show, to 1."""


def tokens_of(tokenizer: Any, words: Iterable[str]) -> frozenset[int]:
    """Every token that reads as one of these words, whatever its case and the spaces around it."""
    wanted = {word.strip().lower() for word in words} - {""}
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ids = [i for i in range(len(tokenizer)) if i not in special]
    return frozenset(i for i in ids if tokenizer.decode([i]).strip().lower() in wanted)


def directions(
    sae: SAE,
    tokens: Mapping[int, Iterable[int]],
    *,
    maxima: Mapping[int, float] | None = None,
    controls: int = 1,
    pool: Sequence[int] | None = None,
    hook: Any = None,
    seed: int = 0,
) -> list[Direction]:
    """The features in `tokens` with their token ids, and to each `controls` random features and random directions.

    With `maxima`, each feature's largest value, a strength of one adds what the feature adds at its strongest; without
    them the directions have norm one, and a strength is the length of what is added. The controls have their feature's
    norm and look for its tokens; random features come from `pool` (default: every other row of the SAE).

    >>> from hubsae.core.config import SAEConfig
    >>> sae = SAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> [d.kind for d in directions(sae, {3: [7]}, hook=0)]
    ['feature', 'random feature', 'random direction']
    """
    place, rows = hook_out_of(sae, hook), sae.W_dec.detach().float().cpu()
    generator = np.random.default_rng(seed)
    others = [f for f in (range(len(rows)) if pool is None else pool) if f not in tokens]
    if controls > len(others):
        raise ConfigError(f"{controls} random features asked for, {len(others)} to choose from")
    found: list[Direction] = []
    for feature, ids in tokens.items():
        name, ids = f"feature {feature}", frozenset(int(i) for i in ids)
        norm = 1.0 if maxima is None else float(maxima[feature]) * float(rows[feature].norm())
        found.append(Direction(name, _unit(rows[feature]) * norm, ids, FEATURE, "", place))
        for number, other in enumerate(generator.choice(others, controls, replace=False).tolist(), 1):
            vector = _unit(rows[other]) * norm
            found.append(
                Direction(f"{name}: random feature {number} ({other})", vector, ids, RANDOM_FEATURE, name, place)
            )
            drawn = torch.from_numpy(generator.standard_normal(rows.shape[1])).float()
            label = f"{name}: random direction {number}"
            found.append(Direction(label, _unit(drawn) * norm, ids, RANDOM_DIRECTION, name, place))
    return found


def dose_response(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    directions: Sequence[Direction],
    strengths: Sequence[float],
    *,
    max_new_tokens: int = 32,
    judge: Judge | None = None,
    rows_at_once: int = 64,
    seed: int = bootstrap.SEED,
    show: bool | None = False,
) -> SteeringResult:
    """Let the model continue every prompt under every direction at every strength, and measure what it wrote.

    Prompts are strings, token ids, or chat messages; continuations are greedy, so that what differs is the steering's.
    `judge` takes the place of looking for the direction's tokens; `seed` is of the bootstrap.
    """
    if not prompts or not directions or not any(strengths):
        raise DataError("nothing to steer", hint="give prompts, directions, and strengths other than 0")
    if len({d.name for d in directions}) < len(directions) or any(d.name == UNSTEERED for d in directions):
        raise ConfigError("every direction needs a name of its own")
    ids = [_ids(prompt, tokenizer) for prompt in prompts]
    if not all(ids):
        raise DataError("a prompt has no token")
    asked = sorted({float(s) for s in strengths if s})
    writer = _Writer(model, tokenizer, ids, max_new_tokens)
    hooks: dict[HookPoint, list[_Job]] = {}
    for prompt in range(len(ids)):
        for direction in directions:
            jobs = [_Job(prompt, direction, strength) for strength in asked]
            hooks.setdefault(HookPoint.parse(direction.hook), []).extend(jobs)
    made: list[tuple[_Job, _Written]] = []
    with evaluating(model), progress("steering", sum(map(len, hooks.values())), "texts", show=show) as task:
        base = [w for part in _parts(range(len(ids)), rows_at_once) for w in writer.untouched(list(part))]
        for hook, jobs in hooks.items():
            # prompt by prompt: little padding, and the unsteered logits of a batch are those of few prompts
            for part in _parts(sorted(jobs, key=lambda job: len(ids[job.prompt])), rows_at_once):
                made += zip(part, writer.steered(part, hook, base), strict=True)
                task.advance(len(part))
    return _result(tokenizer, list(directions), asked, ids, base, made, judge, seed)


class _Job(NamedTuple):
    prompt: int
    direction: Direction
    strength: float


@dataclass
class _Written:
    """One continuation: its tokens up to the end token, the unsteered model's loss on it, KL on the unsteered one."""

    ids: list[int]
    nll: float = 0.0
    kl: float = 0.0


@dataclass
class _Writer:
    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    longest: int
    ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ends = end_ids(self.model, self.tokenizer)
        self.pad = pad_id(self.tokenizer, self.ends)
        self.device = next(self.model.parameters()).device

    def untouched(self, which: list[int]) -> list[_Written]:
        return self._scored(which, self._generate(which))

    def _scored(self, which: list[int], written: list[_Written]) -> list[_Written]:
        """With the untouched model's loss on what was written."""
        for one, logits in zip(written, self._logits(which, written), strict=True):
            one.nll = _loss(logits, one.ids)
        return written

    def steered(self, jobs: Sequence[_Job], hook: HookPoint, base: list[_Written]) -> list[_Written]:
        which = [job.prompt for job in jobs]
        # [rows, 1, d]: each row of a batch has its own direction and strength
        added = torch.stack([job.strength * job.direction.vector for job in jobs])[:, None].to(self.device)

        def edit(hidden: Tensor, _: dict[str, Any]) -> Tensor:
            return hidden + added.to(hidden)

        few = list(dict.fromkeys(which))
        with edit_hook(self.model, hook, edit):
            written = self._generate(which)
            under = self._logits(which, [base[prompt] for prompt in which])
        clean = dict(zip(few, self._logits(few, [base[prompt] for prompt in few]), strict=True))
        for row, (prompt, one) in enumerate(zip(which, written, strict=True)):
            n = len(base[prompt].ids)
            p, q = (t[:n].float().log_softmax(-1) for t in (clean[prompt], under[row]))
            one.kl = float((p.exp() * (p - q)).sum(dtype=torch.float64))
        return self._scored(which, written)

    def _generate(self, which: list[int]) -> list[_Written]:
        ids, mask = padded([self.prompts[i] for i in which], left=True, pad=self.pad)
        written = generate(
            self.model, ids.to(self.device), mask.to(self.device).long(), self.ends, self.pad,
            max_new_tokens=self.longest, do_sample=False,
        )  # fmt: skip
        return [_Written(row) for row in answers(written, self.ends)]

    def _logits(self, which: list[int], written: Sequence[_Written]) -> Tensor:
        """What predicts each token of the continuations [rows, longest continuation, vocabulary]."""
        ids, mask = padded([self.prompts[i] for i in which], left=True, pad=self.pad)
        more, real = padded([one.ids for one in written], left=False, pad=self.pad)
        tokens, mask = torch.cat([ids, more], 1).to(self.device), torch.cat([mask, real], 1).to(self.device).long()
        places = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False,
            logits_to_keep=more.shape[1] + 1,
        )  # fmt: skip
        return out.logits[:, :-1]


def _result(
    tokenizer: Any, asked: list[Direction], strengths: list[float], ids: list[list[int]], base: list[_Written],
    made: list[tuple[_Job, _Written]], judge: Judge | None, seed: int,
) -> SteeringResult:  # fmt: skip
    by_key: dict[tuple[str, float], list[_Written]] = {(UNSTEERED, 0.0): base}
    for job, one in sorted(made, key=lambda pair: pair[0].prompt):
        by_key.setdefault((job.direction.name, job.strength), []).append(one)
    texts = {
        key: [tokenizer.decode(one.ids, skip_special_tokens=True) for one in written] for key, written in by_key.items()
    }
    prompts = [tokenizer.decode(prompt) for prompt in ids]
    sums = {}
    for key, written in by_key.items():
        counted = [_repeated(one.ids) for one in written]
        sums[key] = {
            "tokens": np.array([len(one.ids) for one in written], float),
            "nll": np.array([one.nll for one in written]),
            "kl": np.array([one.kl for one in written]),
            "kl_tokens": np.array([len(one.ids) for one in base], float),
            "repeated": np.array([repeated for repeated, _ in counted], float),
            "ngrams": np.array([n for _, n in counted], float),
        }
    said, found = {}, {}
    for direction in asked:
        for strength in (0.0, *strengths):
            key = (direction.name, strength)
            source = key if strength else (UNSTEERED, 0.0)
            hits = np.array([sum(token in direction.tokens for token in one.ids) for one in by_key[source]], float)
            found[key] = hits
            said[key] = (
                (hits > 0).astype(float)
                if judge is None
                else np.array([judge(direction, p, t) for p, t in zip(prompts, texts[source], strict=True)], float)
            )
    return SteeringResult(asked, strengths, prompts, sums, said, found, texts, seed)


def _ids(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if len(prompt) and isinstance(prompt[0], Mapping):
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [int(i) for i in prompt]


def _loss(logits: Tensor, ids: list[int]) -> float:
    target = torch.tensor(ids, dtype=torch.int64, device=logits.device)
    return float(nn.functional.cross_entropy(logits[: len(ids)].float(), target, reduction="sum"))


def _repeated(ids: list[int]) -> tuple[int, int]:
    """How many n-grams came before in the same text, and how many there are."""
    grams = [tuple(ids[i : i + REPEATS]) for i in range(len(ids) - REPEATS + 1)]
    return len(grams) - len(set(grams)), len(grams)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), max(1, size))]
