"""Paired comparisons of cells on the same held-out prompts, in place of eyeballing two columns.

Both cells are measured on the same prompts, so what counts is the difference per prompt: prompts that are hard for
one are hard for the other, and the interval of the difference is far narrower than either cell's own. Prompts are
resampled, never tokens. What this does not cover is the noise of training: another seed gives another cell.

    cell -> Units(amount [units], weight [units])      amount/weight is the metric: squared error per element,
                                                       nats per predicted token
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hubsae.core.errors import DataError
from hubsae.evals import bootstrap

from .cells import LABELS, Cell, Kind

RESAMPLES = 10_000
LEVEL = 0.05
"""A comparison counts as decided when its corrected p is below this."""


class Units(NamedTuple):
    """One cell's metric, taken apart by prompt (or by group of whole prompts)."""

    amount: np.ndarray
    """[units] summed over the unit's tokens"""
    weight: np.ndarray
    """[units] how many tokens (or elements) it was summed over"""

    @property
    def value(self) -> float:
        """The metric over all units."""
        return float(self.amount.sum() / self.weight.sum())


class Comparison(NamedTuple):
    """`a` against `b` in one metric where small is good."""

    metric: str
    a: str
    b: str
    value_a: float
    value_b: float
    difference: float
    """a - b: below zero where a is better."""
    low: float
    high: float
    """95 % interval of the difference, paired bootstrap over units."""
    p: float
    """Two-sided, from the same resamples; never below 2 / (resamples + 1)."""
    units: int
    a_better: int
    """Units in which a is better; ties count for neither."""
    b_better: int
    p_sign: float
    """Two-sided exact sign test over units."""
    p_holm: float = math.nan
    """p corrected for all comparisons of the same question (Holm)."""

    @property
    def relative(self) -> float:
        """The difference as a share of b's value."""
        return self.difference / self.value_b if self.value_b else math.nan

    @property
    def verdict(self) -> str:
        """Which cell is ahead: "a", "b", or "open" where the prompts do not decide it."""
        p = self.p if math.isnan(self.p_holm) else self.p_holm
        if p >= LEVEL or self.difference == 0:
            return "open"
        return "a" if self.difference < 0 else "b"


def compare(metric: str, names: tuple[str, str], a: Units, b: Units, resamples: int = RESAMPLES) -> Comparison:
    """Compare two cells on the same units.

    >>> rng = np.random.default_rng(0)
    >>> hard = rng.uniform(1, 9, 200)              # prompts differ far more than the cells do
    >>> ones = np.ones(200)
    >>> c = compare("mse", ("a", "b"), Units(hard + rng.normal(0, .1, 200), ones), Units(hard + .1, ones))
    >>> c.verdict, round(c.difference, 1)
    ('a', -0.1)
    """
    if a.weight.shape != b.weight.shape or not np.array_equal(a.weight, b.weight):
        raise DataError(
            f"{names[0]} and {names[1]} were not measured on the same tokens, so their {metric} cannot be paired",
            hint="evaluate both in one pass over the same held-out prompts",
        )
    kept = a.weight > 0
    first, second, weight = a.amount[kept], b.amount[kept], a.weight[kept]
    if weight.size < 2:
        raise DataError(f"{weight.size} prompt(s) are too few for a paired comparison", hint="hold out more prompts")
    each = first - second
    draws = _draws(weight.size, resamples)
    drawn = (draws @ each) / (draws @ weight)
    return _finish(metric, names, Units(first, weight), Units(second, weight), each, drawn)


def compare_between(
    metric: str,
    names: tuple[str, str],
    a: Units,
    lower: Units,
    upper: Units,
    share: float,
    *,
    geometric: bool,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare `a` with what lies between two other cells, `share` of the way from `lower` to `upper`.

    For matching by L0 where no cell has the same one. `geometric` interpolates the logarithm, which suits errors
    that fall as a power of L0; differences of loss may be negative and are interpolated as they are.
    """
    kept = a.weight > 0
    weight = a.weight[kept]
    draws = _draws(weight.size, resamples)

    def between(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        if geometric:
            return np.exp((1 - share) * np.log(one) + share * np.log(other))
        return (1 - share) * one + share * other

    with np.errstate(divide="ignore"):
        each_b = between(lower.amount[kept], upper.amount[kept])
        sums = [draws @ units.amount[kept] for units in (a, lower, upper)]
        drawn = (sums[0] - between(sums[1], sums[2])) / (draws @ weight)
        total = float(between(lower.amount[kept].sum(), upper.amount[kept].sum()))
    # the units' own interpolations only serve the sign test; the value interpolates the sums
    scaled = each_b * (total / each_b.sum()) if each_b.sum() else each_b
    return _finish(metric, names, Units(a.amount[kept], weight), Units(scaled, weight), a.amount[kept] - each_b, drawn)


@lru_cache(maxsize=2)
def _draws(units: int, resamples: int) -> np.ndarray:
    """[resamples, units]; all comparisons on the same prompts share the same resamples."""
    return bootstrap.weights(units, resamples)


def _finish(metric: str, names: tuple[str, str], a: Units, b: Units, each: np.ndarray, drawn: np.ndarray) -> Comparison:
    low, high = (float(v) for v in np.percentile(drawn, [2.5, 97.5]))
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    better, worse = int((each < 0).sum()), int((each > 0).sum())
    return Comparison(
        metric=metric,
        a=names[0],
        b=names[1],
        value_a=a.value,
        value_b=b.value,
        difference=a.value - b.value,
        low=low,
        high=high,
        p=min(1.0, 2 * (min(below, above) + 1) / (drawn.size + 1)),
        units=int(each.size),
        a_better=better,
        b_better=worse,
        p_sign=sign_test(better, worse),
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact sign test: how likely so uneven a split is, if both were equally good.

    >>> round(sign_test(10, 2), 4), sign_test(3, 3)
    (0.0386, 1.0)
    """
    n, few = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(few + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with p corrected for there being several (Holm), in the same order."""
    order = sorted(range(len(comparisons)), key=lambda i: comparisons[i].p)
    corrected, running = list(comparisons), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(comparisons) - rank) * comparisons[index].p))
        corrected[index] = comparisons[index]._replace(p_holm=running)
    return corrected


def matched(metric: str, units: Mapping[Cell, Units], a: Kind, b: Kind, resamples: int = RESAMPLES) -> list[Comparison]:
    """All pairs of cells that differ only in kind, corrected for their number; in order of the cells."""
    pairs = [(cell, cell.twin(b)) for cell in sorted(units) if cell.kind == a and cell.twin(b) in units]
    return holm([compare(metric, (x.id, y.id), units[x], units[y], resamples) for x, y in pairs])


def matched_by_l0(
    metric: str,
    units: Mapping[Cell, Units],
    l0: Mapping[Cell, float],
    a: Kind,
    b: Kind,
    *,
    geometric: bool,
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """Cells of kind `a` against kind `b` at the same expansion, interpolated to the same L0 between two cells of b.

    A cell whose L0 lies outside what b covers at its expansion has no match and is left out.
    """
    out = []
    for cell in sorted(c for c in units if c.kind == a and c in l0):
        peers = sorted(
            (l0[c], c)
            for c in units
            if c.kind == b and (c.expansion, c.seed) == (cell.expansion, cell.seed) and c in l0
        )
        for (low, lower), (high, upper) in pairwise(peers):
            if 0 < low <= l0[cell] <= high and low < high:
                share = math.log(l0[cell] / low) / math.log(high / low)
                name = f"{LABELS[b]} at L0 {l0[cell]:.1f} (between {lower.id} and {upper.id})"
                out.append(
                    compare_between(
                        metric, (cell.id, name), units[cell], units[lower], units[upper], share,
                        geometric=geometric, resamples=resamples,
                    )
                )  # fmt: skip
                break
    return holm(out)
