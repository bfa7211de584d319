"""Intervals: a percentile bootstrap over groups or prompts (whole units, never tokens, which are not independent), and
a closed form for a share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95


def weights(units: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """How often each unit is drawn in each resample. [resamples, units] float64

    >>> bool((weights(5).sum(1) == 5).all())
    True
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float64)


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """The central `level` of the resampled values; None when too few of them are defined."""
    finite = np.sort(values[np.isfinite(values)])
    if finite.size < 0.9 * values.size or finite.size == 0:
        return None
    tail = (1 - level) / 2
    # np.percentile gives the same and takes ten times as long for a thousand values
    low, high = np.interp([tail * (finite.size - 1), (1 - tail) * (finite.size - 1)], np.arange(finite.size), finite)
    return float(low), float(high)


def interval(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = SEED
) -> tuple[float, float] | None:
    """Interval of a statistic of sums: `sums` [units, m]; `statistic` maps resampled sums [r, m] to [r].

    >>> low, high = interval(np.array([[1.0, 1], [3.0, 1]] * 50), lambda s: s[:, 0] / s[:, 1])
    >>> low < 2 < high
    True
    """
    if sums.shape[0] < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return percentile_interval(statistic(weights(sums.shape[0], seed=seed) @ sums))


def wilson(hits: int, of: int) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of a share (Wilson's); none of nothing.

    >>> low, high = wilson(27, 128)
    >>> round(low, 3), round(high, 3)
    (0.149, 0.29)
    """
    if not of:
        return None, None
    z, p = 1.959964, hits / of
    middle, half = p + z * z / (2 * of), z * (p * (1 - p) / of + z * z / (4 * of * of)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / of)), min(1.0, (middle + half) / (1 + z * z / of))
