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
from torch import nn

from hubsae.activations.samples import Sample
from hubsae.core.errors import ConfigError, DataError
from hubsae.core.extras import require


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


class ModelScorer:
    """A transformers model as a scorer.

    A sequence classifier with one label scores samples: its logit. A token classifier scores steps: at the
    last token of each step, the logit (one label) or the probability of the last label (two labels).
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, separator: str | None = None, batch_size: int = 16, raw: bool = False
    ):
        """`separator` ends a step (a blank line, say); it makes the model a scorer of steps. `raw` gives logits."""
        self.model, self.tokenizer, self.separator, self.batch_size, self.raw = (
            model,
            tokenizer,
            separator,
            batch_size,
            raw,
        )
        self.labels = int(model.config.num_labels)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType,reportCallIssue]
        if separator is None and self.labels != 1:
            raise ConfigError(f"a scorer of samples has one label, not {self.labels}")
        if separator is not None and self.labels > 2:
            raise ConfigError(f"a scorer of steps has one or two labels, not {self.labels}")

    @staticmethod
    def from_pretrained(
        path: str, *, separator: str | None = None, device: str | None = None, **options: Any
    ) -> ModelScorer:
        """Load a classifier, and refuse one whose head is not in the checkpoint (transformers would invent it)."""
        transformers = require("transformers", extra="train")
        kind = transformers.AutoModelForSequenceClassification
        if separator is not None:
            kind = transformers.AutoModelForTokenClassification
        model, report = kind.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
        wrong = sorted(
            set(report["missing_keys"]) | set(report["unexpected_keys"]) | {str(k) for k in report["mismatched_keys"]}
        )
        if wrong:
            raise DataError(
                f"{path} is not a whole {kind.__name__.removeprefix('AutoModelFor')} checkpoint: "
                + ", ".join(wrong[:4]),
                hint="missing weights would be random numbers, and so would the scores",
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        return ModelScorer(model.to(device or "cpu").eval(), tokenizer, separator=separator, **options)

    def __call__(self, text: ScoredText) -> Any:
        return self.score_batch([text])[0]

    @torch.inference_mode()
    def score_batch(self, texts: Sequence[ScoredText]) -> list[Any]:
        """Scores of samples, longest first inside so that little is padded."""
        from hubsae.activations.capture import padded

        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
        scores: list[Any] = [None] * len(texts)
        device = next(self.model.parameters()).device
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            ids, mask = padded([texts[i].ids for i in chosen], pad=int(self.tokenizer.pad_token_id or 0))
            if self.separator is None:
                # the head reads the last token that is not padding; run the backbone and find it by the mask
                for row, index in enumerate(chosen):
                    one = ids[row : row + 1, : int(mask[row].sum())].to(device)
                    scores[index] = float(self._sequence_logit(one))
            else:
                logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()
                for row, index in enumerate(chosen):
                    scores[index] = self._steps(texts[index], logits[row])
        return scores

    def _sequence_logit(self, ids: torch.Tensor) -> torch.Tensor:
        # an end token that doubles as padding would be skipped by id, so the last position is read by hand
        core = getattr(self.model, str(self.model.base_model_prefix))
        hidden = core(input_ids=ids, use_cache=False)[0]
        head = getattr(self.model, "score", None) or getattr(self.model, "classifier", None)
        if head is None:
            raise ConfigError(f"{type(self.model).__name__} has no score head")
        return head(hidden[:, -1])[0, 0]

    def _steps(self, text: ScoredText, logits: torch.Tensor) -> StepScores:
        assert self.separator is not None
        ends = step_ends(text.ids, text.prompt_length, self.separator, self.tokenizer)
        picked = logits[torch.tensor(ends, dtype=torch.long)]  # [steps, labels]
        if self.labels == 1 or self.raw:
            values = picked[:, -1]
        else:
            values = picked.softmax(-1)[:, -1]
        return StepScores(ends, values.tolist(), start=text.prompt_length)


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
