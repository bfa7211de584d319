"""Whether a direction steers: the numbers of continuations by direction and strength, with intervals over prompts.

How often a feature's tokens (or a judge) are found in what is written, KL and perplexity against the unsteered model,
repetition and length. A feature proves nothing alone: random features and random directions of the same norm stand
beside it, and `reliability` says for each feature whether it beats them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from hubsae.core.hooks import HookPoint
from hubsae.evals import bootstrap

FEATURE, RANDOM_FEATURE, RANDOM_DIRECTION = "feature", "random feature", "random direction"
UNSTEERED = "unsteered"
BROKEN = 0.5
"""Share of repeated n-grams above which a text counts as broken: a token said over and over is found, and says
nothing."""


@dataclass(frozen=True)
class Direction:
    """Something to add to the activations at every position."""

    name: str
    vector: Tensor
    """[d] what a strength of one adds"""
    tokens: frozenset[int]
    """Token ids that say the direction did what it is meant to do; of a control, those of its feature."""
    kind: str = FEATURE
    of: str = ""
    """The feature that a control stands beside."""
    hook: HookPoint | str | int = 0


class Row(NamedTuple):
    """One direction at one strength: numbers with their intervals over prompts."""

    direction: str
    kind: str
    of: str
    strength: float
    norm: float
    """Length of what is added"""
    said: float
    """Share of continuations in which a token of the feature is found, or the judge's mean"""
    said_interval: tuple[float, float] | None
    token_rate: float
    """Share of all generated tokens that are the feature's"""
    kl: float
    """Mean KL(p_unsteered ‖ p_steered) in nats over the tokens of the unsteered continuation"""
    kl_interval: tuple[float, float] | None
    perplexity: float
    """exp of the unsteered model's mean loss on what was generated"""
    perplexity_interval: tuple[float, float] | None
    repetition: float
    """Share of token trigrams that came before in the same continuation"""
    length: float
    """Mean number of generated tokens, the end token included"""
    prompts: int
    tokens: int
    """Generated tokens"""

    def flat(self) -> dict[str, Any]:
        """One line of a table; an interval becomes two columns."""
        out: dict[str, Any] = {}
        for name, value in self._asdict().items():
            if name.endswith("_interval"):
                low, high = value or (None, None)
                out |= {name.replace("interval", "low"): low, name.replace("interval", "high"): high}
            else:
                out[name] = value
        return out


class Reliability(NamedTuple):
    """Whether a feature steers: at one strength, how much more often its tokens are found than under the controls."""

    feature: str
    verdict: str
    """`steers`, `only where the text breaks`, or `does not steer`"""
    strength: float
    """The weakest that steers, else the one with the largest gain"""
    said: float
    unsteered: float
    controls: float
    """Mean over its controls"""
    gain: float
    """`said` above the larger of the two"""
    low: float | None
    """The interval of the gain, widened for the number of strengths that were tried"""
    high: float | None
    perplexity: float
    repetition: float
    prompts: int


@dataclass
class SteeringResult:
    """Every continuation's numbers, by direction and strength; `(UNSTEERED, 0.0)` has the untouched model's."""

    directions: list[Direction]
    strengths: list[float]
    prompts: list[str]
    sums: dict[tuple[str, float], dict[str, np.ndarray]]
    """[prompts] each: tokens, nll, kl, kl_tokens, repeated, ngrams"""
    said: dict[tuple[str, float], np.ndarray]
    """[prompts], at strength 0 of the unsteered continuations, by each direction's own tokens"""
    found: dict[tuple[str, float], np.ndarray]
    """[prompts] how many generated tokens are the direction's"""
    texts: dict[tuple[str, float], list[str]]
    seed: int = bootstrap.SEED

    def row(self, direction: Direction, strength: float) -> Row:
        """One direction at one strength; 0 is the unsteered model."""
        key = (direction.name, strength)
        sums = self.sums[key if strength else (UNSTEERED, 0.0)]

        def ratio(top: np.ndarray, bottom: np.ndarray, of: Callable = lambda x: x) -> tuple[float, Any]:
            total = bottom.sum()
            value = float(of(top.sum() / total)) if total else float("nan")
            table = np.stack([top, bottom], 1)
            drawn = bootstrap.interval(table, lambda s: of(s[:, 0] / s[:, 1]), seed=self.seed)
            return value, drawn

        ones = np.ones(len(self.prompts))
        said, said_interval = ratio(self.said[key], ones)
        kl, kl_interval = ratio(sums["kl"], sums["kl_tokens"]) if strength else (0.0, None)
        perplexity, perplexity_interval = ratio(sums["nll"], sums["tokens"], np.exp)
        return Row(
            direction.name, direction.kind, direction.of, strength, strength * float(direction.vector.norm()),
            said, said_interval, float(self.found[key].sum() / max(sums["tokens"].sum(), 1)), kl, kl_interval,
            perplexity, perplexity_interval, float(sums["repeated"].sum() / max(sums["ngrams"].sum(), 1)),
            float(sums["tokens"].mean()), len(self.prompts), int(sums["tokens"].sum()),
        )  # fmt: skip

    def rows(self) -> list[Row]:
        """The dose-response table: every direction at strength 0 and at each that was asked for."""
        return [self.row(d, s) for d in self.directions for s in (0.0, *self.strengths)]

    def reliability(self) -> list[Reliability]:
        """For each feature whether it steers: see `Reliability`."""
        return [self._reliability(d) for d in self.directions if d.kind == FEATURE]

    def _reliability(self, feature: Direction) -> Reliability:
        controls = [d for d in self.directions if d.of == feature.name]
        before, level = self.said[feature.name, 0.0], 1 - (1 - bootstrap.LEVEL) / len(self.strengths)
        drawn = bootstrap.weights(len(before), seed=self.seed) / len(before)
        tried: list[Reliability] = []
        for strength in self.strengths:
            here = self.row(feature, strength)
            beside = [self.said[d.name, strength] for d in controls]
            control = np.mean(beside, axis=0) if beside else before
            said = self.said[feature.name, strength]
            gain = said.mean() - max(before.mean(), control.mean())
            interval = bootstrap.percentile_interval(
                drawn @ said - np.maximum(drawn @ before, drawn @ control), level=level
            )
            low, high = interval if len(before) > 1 and interval else (None, None)
            beats = low is not None and low > 0
            broken = here.repetition > BROKEN
            verdict = "does not steer" if not beats else "only where the text breaks" if broken else "steers"
            numbers = here.said, float(before.mean()), float(control.mean()), float(gain), low, high
            found = Reliability(
                feature.name, verdict, strength, *numbers, here.perplexity, here.repetition, len(before)
            )
            tried.append(found)
        for wanted in ("steers", "only where the text breaks"):
            if fitting := [r for r in tried if r.verdict == wanted]:
                return min(fitting, key=lambda r: abs(r.strength))
        return max(tried, key=lambda r: r.gain)
