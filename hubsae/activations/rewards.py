"""Scores beside the tokens: a callable or a model scores samples or steps, and the scores become columns.

A scorer is a callable that takes a `ScoredText` and returns one number for the sample, one number per token, or
`StepScores`. If it has a method `score_batch`, that is called with a list of them instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hubsae.activations.samples import Sample
from hubsae.core.errors import DataError


@dataclass(frozen=True)
class ScoredText:
    """What a scorer sees of a sample."""

    item: Any
    """The item as it was given to the harvest."""
    ids: list[int]
    prompt_length: int
    prompt: str
    response: str
    """Decoded without special tokens; the whole text where there is no prompt."""


@dataclass(frozen=True)
class StepScores:
    """Scores of consecutive steps. A token gets the score of the step it lies in; others get NaN."""

    ends: Sequence[int]
    """Index of the last token of each step, ascending."""
    scores: Sequence[float]
    start: int = 0
    """First token of the first step."""

    def per_token(self, tokens: int) -> np.ndarray:
        """One score per token.

        >>> StepScores(ends=[1, 3], scores=[0.5, 1.0]).per_token(5).tolist()
        [0.5, 0.5, 1.0, 1.0, nan]
        """
        out = np.full(tokens, np.nan, dtype=np.float32)
        first = self.start
        for end, score in zip(self.ends, self.scores, strict=True):
            out[first : min(end + 1, tokens)] = score
            first = end + 1
        return out


Scorer = Callable[[ScoredText], Any]


def score_samples(samples: Sequence[Sample], scorers: Mapping[str, Scorer], tokenizer: Any) -> None:
    """Let every scorer score every sample; the scores land in `sample.columns`."""
    if not scorers:
        return
    texts = [_text(sample, tokenizer) for sample in samples]
    for name, scorer in scorers.items():
        batch = getattr(scorer, "score_batch", None)
        scores = list(batch(texts)) if batch is not None else [scorer(text) for text in texts]
        if len(scores) != len(samples):
            raise DataError(f"scorer {name}: expected {len(samples)} scores, found {len(scores)}")
        for sample, score in zip(samples, scores, strict=True):
            sample.columns[name] = _column(name, score, sample)


def _text(sample: Sample, tokenizer: Any) -> ScoredText:
    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True) if tokenizer is not None and ids else ""

    at = sample.prompt_length
    return ScoredText(sample.item, sample.ids, at, decode(sample.ids[:at]), decode(sample.ids[at:]))


def _column(name: str, score: Any, sample: Sample) -> Any:
    if isinstance(score, StepScores):
        return score.per_token(len(sample.ids))
    if score is None:
        return float("nan")  # unscorable
    array = np.asarray(score.detach().cpu() if isinstance(score, torch.Tensor) else score, dtype=np.float32)
    if array.ndim == 0:
        return float(array)
    if array.shape != (len(sample.ids),):
        raise DataError(
            f"scorer {name}, sample {sample.id}: expected one score or {len(sample.ids)} (one per token), "
            f"found shape {array.shape}",
            hint="return StepScores for scores of steps",
        )
    return array


def step_ends(ids: Sequence[int], first: int, separator: str, tokenizer: Any) -> list[int]:
    """Index of the last token of each step of a response; a step ends where `separator` does, or at the end."""
    ends: list[int] = []
    text = ""
    for index in range(first, len(ids)):
        text += tokenizer.decode([ids[index]])
        if separator in text or index == len(ids) - 1:
            ends.append(index)
            text = ""
    return ends
