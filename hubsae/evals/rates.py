"""Change along training steps: at matched steps, per step, and of one chain against another.

A chain that stops at step 116 and one that runs to step 200 cannot be compared end to end when the curve
flattens: the longer one divides by steps in which little happened. So ratios are given both ways and named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hubsae.core.errors import DataError
from hubsae.evals.bootstrap import percentile_interval


class Series(NamedTuple):
    """One number along training steps, with optional resamples of it."""

    steps: np.ndarray
    """[stages] strictly rising"""
    values: np.ndarray
    """[stages]"""
    draws: np.ndarray | None = None
    """[resamples, stages]; paired across stages where the samples are the same"""


def make_series(steps: Sequence[float], values: Sequence[float], draws: np.ndarray | None = None) -> Series:
    """A series with its checks.

    >>> make_series([0, 10], [1.0, 0.5]).values
    array([1. , 0.5])
    """
    s, v = np.asarray(steps, float), np.asarray(values, float)
    if s.size != v.size or s.size == 0 or bool((np.diff(s) <= 0).any()):
        raise DataError(f"steps must rise and match the values: {list(steps)} for {len(values)} values")
    return Series(s, v, draws)


def at(series: Series, step: float) -> tuple[float, np.ndarray | None]:
    """The value at a step, linear between the stages on either side."""
    low, high = series.steps[0], series.steps[-1]
    if not low <= step <= high:
        raise DataError(f"step {step:g} lies outside {low:g} to {high:g}", hint="values are never extrapolated")
    right = int(np.searchsorted(series.steps, step))
    if series.steps[right] == step:
        return float(series.values[right]), None if series.draws is None else series.draws[:, right]
    left = right - 1
    share = (step - series.steps[left]) / (series.steps[right] - series.steps[left])
    value = (1 - share) * series.values[left] + share * series.values[right]
    if series.draws is None:
        return float(value), None
    return float(value), (1 - share) * series.draws[:, left] + share * series.draws[:, right]


class Change(NamedTuple):
    """Change since the first stage."""

    step: float
    value: float
    delta: float
    """value − first value"""
    per_step: float | None
    """delta / steps since the first; None at the first"""
    draws: np.ndarray | None
    """[resamples] of the delta"""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the delta."""
        return None if self.draws is None else percentile_interval(self.draws)


def change(series: Series, step: float) -> Change:
    """Change from the first stage to a step, interpolated where the step is not a stage.

    >>> change(make_series([0, 10, 30], [1.0, 0.5, 0.4]), 20).delta
    -0.55
    """
    value, drawn = at(series, step)
    first = float(series.values[0])
    steps = step - float(series.steps[0])
    draws = None if drawn is None or series.draws is None else drawn - series.draws[:, 0]
    delta = value - first
    return Change(step, value, delta, delta / steps if steps else None, draws)


class RateRatio(NamedTuple):
    """Rate of chain A over rate of chain B."""

    kind: str
    """end_to_end, or matched: both at the same step"""
    steps_a: float
    steps_b: float
    delta_a: float
    delta_b: float
    ratio: float | None
    """(delta_a/steps_a) / (delta_b/steps_b); None where B does not change"""
    interval: tuple[float, float] | None

    def row(self, **more: Any) -> dict[str, Any]:
        """One line of a tidy table."""
        low, high = self.interval or (None, None)
        return {
            **more,
            "comparison": self.kind,
            "steps_a": self.steps_a,
            "steps_b": self.steps_b,
            "delta_a": self.delta_a,
            "delta_b": self.delta_b,
            "ratio_of_rates": self.ratio,
            "low": low,
            "high": high,
        }


def rate_ratio(a: Series, b: Series, *, matched: bool) -> RateRatio:
    """Rate of A over rate of B, each over its whole length, or both up to the last step they share.

    >>> a, b = make_series([0, 10], [1.0, 0.8]), make_series([0, 20], [1.0, 0.8])
    >>> round(rate_ratio(a, b, matched=False).ratio, 3), round(rate_ratio(a, b, matched=True).ratio, 3)
    (2.0, 2.0)
    """
    end_a, end_b = float(a.steps[-1]), float(b.steps[-1])
    if matched:
        end_a = end_b = min(end_a, end_b)
    to_a, to_b = change(a, end_a), change(b, end_b)
    steps_a, steps_b = end_a - float(a.steps[0]), end_b - float(b.steps[0])
    if not steps_a or not steps_b:
        raise DataError("a chain of one stage has no rate")
    ratio = None if to_b.delta == 0 else (to_a.delta / steps_a) / (to_b.delta / steps_b)
    interval = None
    if ratio is not None and to_a.draws is not None and to_b.draws is not None and len(to_a.draws) == len(to_b.draws):
        with np.errstate(divide="ignore", invalid="ignore"):
            interval = percentile_interval((to_a.draws / steps_a) / (to_b.draws / steps_b))
    kind = "matched" if matched else "end_to_end"
    return RateRatio(kind, steps_a, steps_b, to_a.delta, to_b.delta, ratio, interval)
