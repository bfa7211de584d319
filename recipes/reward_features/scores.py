"""How well one score stands for another: R², Spearman, AUC, pairs and best-of-n, each with an interval over problems.

Rows of a problem are not independent, so whole problems are drawn again, never rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hubsae.core.errors import DataError
from hubsae.evals import bootstrap

DRAWS_AT_ONCE = 50


class Measured(NamedTuple):
    """A number with its interval over problems."""

    value: float
    low: float | None
    high: float | None

    def columns(self, name: str) -> dict[str, float | None]:
        """As columns of a table.

        >>> Measured(0.5, 0.4, 0.6).columns("r2")
        {'r2': 0.5, 'r2_low': 0.4, 'r2_high': 0.6}
        """
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def r2(predicted: np.ndarray, score: np.ndarray, groups: np.ndarray, mean: float | None = None) -> Measured:
    """Share of the squared error about `mean` that the prediction removes.

    With the mean of the rows that a probe was fitted on, a probe that says nothing has exactly 0; without it the mean
    is that of these rows.

    >>> y = np.array([0.0, 1, 2, 3])
    >>> r2(y, y, np.arange(4)).value, r2(np.full(4, 1.5), y, np.arange(4)).value
    (1.0, 0.0)
    """
    about = float(np.mean(score)) if mean is None else mean
    sums = _by_group(np.stack([(score - predicted) ** 2, (score - about) ** 2], 1), groups)
    return _of(sums, lambda s: 1 - s[:, 0] / s[:, 1])


def spearman(predicted: np.ndarray, score: np.ndarray, groups: np.ndarray) -> Measured:
    """Correlation of the ranks. Resamples keep the ranks of the whole; a constant has none, and gives 0.

    >>> spearman(np.array([1.0, 5, 9]), np.array([2.0, 3, 7]), np.arange(3)).value
    1.0
    """
    a, b = ranks(predicted), ranks(score)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Measured(0.0, 0.0, 0.0)
    a, b = a - a.mean(), b - b.mean()
    sums = _by_group(np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], 1), groups)

    def statistic(s: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = s.T
        return (xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n))

    return _of(sums, statistic)


def auc(predicted: np.ndarray, good: np.ndarray, groups: np.ndarray) -> Measured:
    """Chance that a good row is scored above a bad one, ties counting half.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 0, 1, 1]), np.arange(4)).value
    0.875
    """
    good = np.asarray(good).astype(bool)
    if good.all() or not good.any():
        raise DataError(f"an AUC needs good rows and bad ones; all {len(good)} are {'good' if good.all() else 'bad'}")
    _, tie = np.unique(predicted, return_inverse=True)
    order = np.argsort(tie, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(tie[order]) > 0])
    units, which = np.unique(groups, return_inverse=True)

    def statistic(weights: np.ndarray) -> np.ndarray:
        each = weights[:, which[order]]  # [draws, rows], by rising prediction
        up = np.add.reduceat(each * good[order], starts, axis=1)
        down = np.add.reduceat(each * ~good[order], starts, axis=1)
        below = np.cumsum(down, 1) - down / 2
        return (up * below).sum(1) / (up.sum(1) * down.sum(1))

    value = float(statistic(np.ones((1, len(units))))[0])
    if len(units) < 2:
        return Measured(value, None, None)
    drawn = bootstrap.weights(len(units))
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [statistic(drawn[i : i + DRAWS_AT_ONCE]) for i in range(0, len(drawn), DRAWS_AT_ONCE)]
    return Measured(value, *(bootstrap.percentile_interval(np.concatenate(parts)) or (None, None)))


def pairs(predicted: np.ndarray, score: np.ndarray, groups: np.ndarray) -> Measured:
    """Share of pairs of the same problem that both order alike; pairs that `score` ties are left out.

    >>> pairs(np.array([1.0, 2, 1, 2]), np.array([0.0, 1, 1, 0]), np.array([0, 0, 1, 1])).value
    0.5
    """
    rows = []
    for group in np.unique(groups):
        at = groups == group
        p, s = predicted[at], score[at]
        one, two = np.triu_indices(len(p), 1)
        apart = s[one] != s[two]
        same = np.sign(p[one] - p[two]) * np.sign(s[one] - s[two])
        rows.append([float(((same[apart] + 1) / 2).sum()), float(apart.sum())])
    return _of(np.array(rows), lambda s: s[:, 0] / s[:, 1])


def best_of_n(predicted: np.ndarray, right: np.ndarray, groups: np.ndarray) -> Measured:
    """Share of problems whose highest-scored candidate is right; among equals, the share of those that are.

    >>> best_of_n(np.array([0.2, 0.9, 0.5, 0.5]), np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])).value
    0.75
    """
    found = []
    for group in np.unique(groups):
        at = groups == group
        top = predicted[at] == predicted[at].max()
        found.append([float(np.asarray(right)[at][top].mean()), 1.0])
    return _of(np.array(found), lambda s: s[:, 0] / s[:, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs.

    >>> ranks(np.array([3.0, 1, 3])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[which]


def _by_group(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    units, which = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(units), rows.shape[1]))
    np.add.at(sums, which, rows)
    return sums


def _of(sums: np.ndarray, statistic: Any) -> Measured:
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(sums.sum(0, keepdims=True))[0])
    return Measured(value, *(bootstrap.interval(sums, statistic) or (None, None)))
