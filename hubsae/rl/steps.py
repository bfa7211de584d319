"""Solutions in steps: as text, as tokens with the place where each step is read, and a score for each of them.

    StepText(prompt, steps) -> tokens -> one state per step -> one score per step

A step is read at the token that ends its separator, or at the last token of its own text. The second is how a model
that does not know the separator (`<extra_0>` of a process reward model, say) reads the same steps: two models are
aligned by the text of the steps, never by index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.batching import token_budget_batches
from hubsae.activations.capture import padded
from hubsae.core.errors import ConfigError, DataError

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class StepText:
    """A rendered prompt, and the steps of an answer to it."""

    prompt: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class StepFormat:
    """How steps become text, and where they are read."""

    separator: str = "\n"
    """Stands after every step, the last one included"""
    read: Literal["separator", "step"] = "separator"
    """At the token that ends the separator, or at the last token of the step itself"""


class StepTokens(NamedTuple):
    """A tokenised solution."""

    ids: list[int]
    prompt_length: int
    ends: list[int]
    """Index of the token at which each step is read"""
    step: list[int]
    """Which step each token is of, separators included, from 1; 0 for the prompt"""


def tokenize(
    tokenizer: Any, texts: Sequence[StepText], how: StepFormat, *, max_length: int | None = None
) -> list[StepTokens]:
    """Tokens of solutions. Every step has its own place to be read at, or it is an error that says which has not."""
    own = tokenizer(how.separator, add_special_tokens=False)["input_ids"]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if how.read == "separator" and (len(own) != 1 or own[0] == unknown):
        raise ConfigError(
            f"the step separator {how.separator!r} is {len(own)} tokens of this tokenizer, where a model that reads "
            "steps there knows it as one",
            hint="take the reward model's own tokenizer and separator, or read='step'",
        )
    for number, text in enumerate(texts):
        if not text.steps:
            raise DataError(f"solution {number} has no step", hint="split it at its separator first")
        if wrong := [s for s in text.steps if how.separator in s]:
            raise DataError(f"solution {number}: a step holds the separator {how.separator!r}: {wrong[0][:60]!r}")
    whole = [text.prompt + "".join(step + how.separator for step in text.steps) for text in texts]
    if not whole:
        return []
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for number, (text, ids, offsets) in enumerate(
        zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        starts = np.array([start for start, _ in offsets])
        borders = len(text.prompt) + np.cumsum([len(step) + len(how.separator) for step in text.steps])
        at = borders if how.read == "separator" else borders - len(how.separator)
        # the token that covers the character before the border: the last one that starts before it
        ends = (np.searchsorted(starts, at, side="left") - 1).tolist()
        step = np.where(starts < len(text.prompt), 0, np.searchsorted(borders, starts, side="right") + 1)
        length = int((starts < len(text.prompt)).sum())
        for place, (end, border) in enumerate(zip(ends, at.tolist(), strict=True)):
            if end < length or (place and end <= ends[place - 1]):
                raise DataError(f"solution {number}: step {place + 1} has no token of its own")
            if how.read == "separator" and (ids[end] != own[0] or offsets[end][1] != border):
                raise DataError(
                    f"solution {number}: the separator behind step {place + 1} became part of the token "
                    f"{tokenizer.decode([ids[end]])!r}, so the step token is missing",
                    hint="a separator that is a token of its own, or read='step'",
                )
        if max_length is not None and len(ids) > max_length:
            cut = sum(end < max_length for end in ends)
            raise DataError(
                f"solution {number} has {len(ids)} tokens; behind the first {max_length} lie the step tokens of "
                f"{len(ends) - cut} of its {len(ends)} steps",
                hint="raise the length, or leave long solutions out",
            )
        found.append(StepTokens(list(ids), length, ends, step.tolist()))
    return found


Aggregate = Literal["min", "mean", "prod", "last"]
AGGREGATES: dict[str, Callable[[np.ndarray], float]] = {
    "min": lambda s: float(s.min()),
    "mean": lambda s: float(s.mean()),
    "prod": lambda s: float(s.prod()),
    "last": lambda s: float(s[-1]),
}
"""How the scores of steps become that of a solution."""


class StepReward:
    """Whatever scores the steps of solutions; subclasses say what a batch of tokens gives (`read`)."""

    def __init__(self, tokenizer: Any, how: StepFormat = StepFormat(), aggregate: Aggregate = "min"):
        self.tokenizer, self.how = tokenizer, how
        self.aggregate: Aggregate = aggregate

    def read(self, ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        """Scores [kept] at the tokens that `keep` marks, row by row."""
        raise NotImplementedError

    def score(self, texts: Sequence[StepText]) -> list[np.ndarray]:
        """One score per step of each solution."""
        rows = tokenize(self.tokenizer, texts, self.how)
        return checked(self.at([row.ids for row in rows], [row.ends for row in rows]), texts)

    def at(self, sequences: Sequence[list[int]], ends: Sequence[list[int]]) -> list[np.ndarray]:
        """Scores of sequences of tokens at the places named for each, [places] each."""
        found: list[np.ndarray] = [np.zeros(0)] * len(sequences)
        for batch in token_budget_batches([len(ids) for ids in sequences], BATCH_TOKENS):
            ids, mask = padded([sequences[i] for i in batch])
            keep = torch.zeros_like(mask)
            for row, i in enumerate(batch):
                keep[row, ends[i]] = True
            with torch.inference_mode():
                scores = self.read(ids, mask, keep).double().cpu().numpy()
            cuts = np.cumsum([len(ends[i]) for i in batch])[:-1]
            for i, part in zip(batch, np.split(scores, cuts), strict=True):
                found[i] = part
        return found

    def total(self, texts: Sequence[StepText]) -> np.ndarray:
        """One score per solution. [solutions]"""
        return np.array([AGGREGATES[self.aggregate](scores) for scores in self.score(texts)])

    def responses(self, prompts: Sequence[Sequence[int]], responses: Sequence[str]) -> list[float]:
        """Rewards of sampled responses to tokenised prompts: what PPO asks for."""
        texts = [
            StepText(self.tokenizer.decode(ids), split_steps(response, self.how.separator))
            for ids, response in zip(prompts, responses, strict=True)
        ]
        return self.total(texts).tolist()


class CallableReward(StepReward):
    """A function (prompt, steps) -> one score per step, as a reward.

    >>> reward = CallableReward(lambda prompt, steps: [float("=" in step) for step in steps])
    >>> reward.total([StepText("?", ("1=1", "x"))])
    array([0.])
    """

    def __init__(self, function: Callable[[str, Sequence[str]], Sequence[float]], aggregate: Aggregate = "min"):
        super().__init__(None, aggregate=aggregate)
        self.function = function

    def score(self, texts: Sequence[StepText]) -> list[np.ndarray]:
        """One score per step of each solution."""
        return checked([np.asarray(self.function(t.prompt, t.steps), dtype=np.float64) for t in texts], texts)


def split_steps(text: str, separator: str = "\n") -> tuple[str, ...]:
    """The steps of an answer: what stands between separators, blank ones left out; an empty answer is one empty step.

    White space around a step goes: many tokenizers make one token of it and the separator, where no step could be read.

    >>> split_steps("2+3=5 \\n\\n  #### 5")
    ('2+3=5', '#### 5')
    """
    return tuple(part.strip() for part in text.split(separator) if part.strip()) or ("",)


def checked(scores: Sequence[np.ndarray], texts: Sequence[StepText]) -> list[np.ndarray]:
    """The scores, if every step has a finite one."""
    for number, (found, text) in enumerate(zip(scores, texts, strict=True)):
        if found.shape != (len(text.steps),):
            raise DataError(f"solution {number} has {len(text.steps)} steps and scores of shape {found.shape}")
        if (bad := next((i for i, s in enumerate(found.tolist()) if not math.isfinite(s)), None)) is not None:
            raise DataError(
                f"the score of step {bad + 1} of solution {number} is {found[bad]}",
                hint="float16 overflows where bfloat16 does not; a head that is not trained may hold NaN",
            )
    return list(scores)
