"""Statistics of activations, gathered while they are written and exactly mergeable afterwards.

Every shard keeps the accumulators of its own rows in its footer, so the statistics of a dataset are a merge of
small tables and no second pass over the vectors is ever needed. Position 0 is accumulated apart: its
massive activations would otherwise hide what the other tokens look like.

    x [rows, d] -> Moments (count, mean [d], M2 [d], float64) + histogram of token norms, for position 0 and the rest
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubsae.core.normalizer import Normalizer

TILE = 1024
"""Rows taken at once: 1024 x 896 floats stay in the second-level cache."""

PER_OCTAVE, LOWEST, HIGHEST = 64, -24, 40
"""Norms are counted in bins of 1/64 octave (1.1 %), from 2^-24 to 2^40; smaller ones fall in the first bin."""
BINS = (HIGHEST - LOWEST) * PER_OCTAVE
MASSIVE = 10.0
"""A token is massive when its norm exceeds this many times the median norm."""


def norm_bin(norms: np.ndarray) -> np.ndarray:
    """The bin of each norm: it begins at `bin_edge`; zero has one far below all others.

    >>> norm_bin(np.array([1.0, 2.0, 171.0])).tolist(), bin_edge(64)
    ([0, 64, 474], 2.0)
    """
    return np.floor(np.log2(np.maximum(norms, 1e-30)) * PER_OCTAVE).astype(np.int64)


def bin_edge(number: float) -> float:
    """Where a bin begins."""
    return 2.0 ** (number / PER_OCTAVE)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations per dimension, in float64."""

    mean: np.ndarray
    m2: np.ndarray
    count: int = 0

    @staticmethod
    def zero(d: int) -> Moments:
        """Nothing seen yet."""
        return Moments(np.zeros(d), np.zeros(d))

    def add(self, count: int, mean: np.ndarray, m2: np.ndarray) -> None:
        """Merge another set of rows (Chan's update: no difference of large sums)."""
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta * delta * (self.count * count / total)
        self.count = total

    def see(self, x: Tensor) -> None:
        """Add rows x [rows, d] of float32."""
        mean = x.mean(0)
        self.add(len(x), mean.double().numpy(), (x - mean).square_().sum(0).double().numpy())


@dataclass
class NormTable:
    """Token norms as a fine histogram with their extremes and moments."""

    bins: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = float("inf")
    high: float = 0.0

    def see(self, norms: np.ndarray) -> None:
        """Add norms [rows]."""
        if not len(norms):
            return
        index = np.clip(norm_bin(norms) - LOWEST * PER_OCTAVE, 0, BINS - 1)
        self.bins += np.bincount(index, minlength=BINS)
        wide = norms.astype(np.float64)
        self.count += len(norms)
        self.total += float(wide.sum())
        self.squares += float((wide * wide).sum())
        self.low, self.high = min(self.low, float(wide.min())), max(self.high, float(wide.max()))

    def merge(self, other: NormTable) -> None:
        """Add another table."""
        self.bins = self.bins + other.bins
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def quantile(self, share: float) -> float:
        """The norm below which `share` of the tokens lie, to within a bin (1.1 %); 0 and 1 are exact."""
        if self.count == 0:
            return float("nan")
        if share <= 0 or share >= 1:
            return self.low if share <= 0 else self.high
        reached = np.cumsum(self.bins)
        index = int(np.searchsorted(reached, share * self.count, side="left"))
        before = int(reached[index - 1]) if index else 0
        inside = (share * self.count - before) / max(1, int(self.bins[index]))
        value = bin_edge(LOWEST * PER_OCTAVE + index + inside)
        return float(min(max(value, self.low), self.high))

    def share_above(self, norm: float) -> float:
        """Share of the tokens whose norm exceeds `norm`, to within a bin."""
        if self.count == 0:
            return 0.0
        index = int(np.ceil((np.log2(max(norm, 2.0**LOWEST)) - LOWEST) * PER_OCTAVE))
        return float(self.bins[max(0, index) :].sum() / self.count)


TOP_TOKENS = 16
"""Token ids of the largest norms that are kept by name."""


@dataclass
class Group:
    """Norms of the tokens that one boolean label names."""

    count: int = 0
    total: float = 0.0
    high: float = 0.0

    def merge(self, other: Group) -> None:
        """Add another."""
        self.count, self.total = self.count + other.count, self.total + other.total
        self.high = max(self.high, other.high)


class ActivationStats:
    """What is known of the activations of a dataset: gathered as rows pass by, merged, and read off.

    >>> stats = ActivationStats(2)
    >>> norms = stats.see(torch.tensor([[3.0, 4.0], [3.0, 0.0]]), np.array([0, 1]))
    >>> stats.count, stats.mean.tolist()
    (2, [3.0, 2.0])
    """

    def __init__(self, d: int):
        self.d = d
        self.rest, self.first = Moments.zero(d), Moments.zero(d)
        """Of all tokens but those at position 0, and of these."""
        self.rest_norms, self.first_norms = NormTable(), NormTable()
        self.groups: dict[str, Group] = {}
        """Norms by boolean label."""
        self.tops: dict[int, float] = {}
        """The largest norm of each of the token ids that have the largest, position 0 left out."""

    def see(self, x: Tensor, position: np.ndarray, labels: Mapping[str, np.ndarray] | None = None) -> Tensor:
        """Add rows x [rows, d] of float32 with their positions; returns their norms [rows]."""
        norms = torch.linalg.vector_norm(x, dim=1)
        if labels:
            self._see_labels(norms.numpy(), position, labels)
        at_start = np.flatnonzero(position == 0)
        if len(at_start):
            others = torch.from_numpy(np.flatnonzero(position != 0))
            starts = torch.from_numpy(at_start)
            self.first.see(x[starts])
            self.first_norms.see(norms[starts].numpy())
            x, rest = x[others], norms[others]
        else:
            rest = norms
        if len(x):
            self.rest.see(x)
            self.rest_norms.see(rest.numpy())
        return norms

    def _see_labels(self, norms: np.ndarray, position: np.ndarray, labels: Mapping[str, np.ndarray]) -> None:
        for name, column in labels.items():
            if column.dtype == bool and (chosen := norms[column]).size:
                total = float(chosen.astype(np.float64).sum())
                self.groups.setdefault(name, Group()).merge(Group(len(chosen), total, float(chosen.max())))
        if "token_id" in labels:
            rest = np.flatnonzero(position != 0)
            rest = rest[np.argsort(-norms[rest], kind="stable")[: 4 * TOP_TOKENS]]
            self._keep_tops(zip(labels["token_id"][rest].tolist(), norms[rest].tolist(), strict=True))

    def _keep_tops(self, found: Iterable[tuple[int, float]]) -> None:
        for token, norm in found:
            if token >= 0:
                self.tops[token] = max(norm, self.tops.get(token, 0.0))
        self.tops = dict(sorted(self.tops.items(), key=lambda item: (-item[1], item[0]))[:TOP_TOKENS])

    def merge(self, other: ActivationStats) -> None:
        """Add another set of accumulators."""
        for name, group in other.groups.items():
            self.groups.setdefault(name, Group()).merge(group)
        self._keep_tops(other.tops.items())
        self.rest.add(other.rest.count, other.rest.mean, other.rest.m2)
        self.first.add(other.first.count, other.first.mean, other.first.m2)
        self.rest_norms.merge(other.rest_norms)
        self.first_norms.merge(other.first_norms)

    def to_json(self) -> dict[str, Any]:
        """A form for a footer: arrays as base64 of little-endian float64, histograms without their zeros."""
        out: dict[str, Any] = {"d": self.d}
        out["groups"] = {name: [g.count, g.total, g.high] for name, g in sorted(self.groups.items())}
        out["tops"] = [[token, norm] for token, norm in self.tops.items()]
        for name, moments, norms in (("rest", self.rest, self.rest_norms), ("first", self.first, self.first_norms)):
            filled = np.flatnonzero(norms.bins)
            out[name] = {
                "count": moments.count,
                "mean": _pack(moments.mean) if moments.count else "",
                "m2": _pack(moments.m2) if moments.count else "",
                "norm_bins": [filled.tolist(), norms.bins[filled].tolist()],
                "norm_sums": [norms.total, norms.squares],
                "norm_range": [norms.low, norms.high] if norms.count else [],
            }
        return out

    @staticmethod
    def from_json(data: dict[str, Any]) -> ActivationStats:
        """The inverse of `to_json`."""
        stats = ActivationStats(int(data["d"]))
        stats.groups = {name: Group(*numbers) for name, numbers in data.get("groups", {}).items()}
        stats.tops = {int(token): norm for token, norm in data.get("tops", [])}
        for name in ("rest", "first"):
            part = data[name]
            count = int(part["count"])
            if not count:
                continue
            moments = Moments(_unpack(part["mean"]), _unpack(part["m2"]), count)
            if moments.mean.shape != (stats.d,) or moments.m2.shape != (stats.d,):
                raise ValueError("statistics of another width")
            index, values = part["norm_bins"]
            norms = NormTable(count=count, total=part["norm_sums"][0], squares=part["norm_sums"][1])
            norms.bins[np.asarray(index, dtype=np.int64)] = values
            norms.low, norms.high = part["norm_range"]
            setattr(stats, name, moments)
            setattr(stats, f"{name}_norms", norms)
        return stats

    # -- reading off ---------------------------------------------------------------------------------------------

    @property
    def every(self) -> Moments:
        """Moments of all tokens."""
        out = Moments(self.rest.mean.copy(), self.rest.m2.copy(), self.rest.count)
        out.add(self.first.count, self.first.mean, self.first.m2)
        return out

    @property
    def norms(self) -> NormTable:
        """Norms of all tokens."""
        out = NormTable()
        out.merge(self.rest_norms)
        out.merge(self.first_norms)
        return out

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self.rest.count + self.first.count

    @property
    def mean(self) -> Tensor:
        """Mean per dimension [d], float64."""
        return torch.from_numpy(self.every.mean)

    @property
    def std(self) -> Tensor:
        """Standard deviation per dimension [d] (divided by the count), float64."""
        return torch.from_numpy(np.sqrt(self.every.m2 / max(1, self.count)))

    @property
    def mean_without_first(self) -> Tensor:
        """Mean per dimension over tokens not at position 0."""
        return torch.from_numpy(self.rest.mean)

    @property
    def std_without_first(self) -> Tensor:
        """Standard deviation per dimension over tokens not at position 0."""
        return torch.from_numpy(np.sqrt(self.rest.m2 / max(1, self.rest.count)))

    @property
    def mean_norm(self) -> float:
        """Mean token norm."""
        norms = self.norms
        return norms.total / max(1, norms.count)

    @property
    def norm_percentiles(self) -> dict[str, float]:
        """Percentiles of the token norms; 0 and 100 are exact, the others to within 1.1 %."""
        norms = self.norms
        return {str(p): norms.quantile(p / 100) for p in (0, 1, 5, 25, 50, 75, 95, 99, 100)}

    @property
    def massive_share(self) -> float:
        """Share of the tokens whose norm exceeds ten times the median."""
        return self.norms.share_above(self.massive_above)

    @property
    def massive_above(self) -> float:
        """The norm above which a token counts as massive: ten times the median."""
        return MASSIVE * self.norms.quantile(0.5)

    def proposal(self) -> list[str]:
        """What a training should leave out, given these norms: `position_0`, `massive`, or nothing.

        A few vectors of a hundred times the usual norm are most of the variance; an SAE then learns them alone.
        """
        first = self.first_norms
        found = []
        if first.count and first.total / first.count > self.massive_above:
            found.append("position_0")
        if self.rest_norms.share_above(self.massive_above) > 0:
            found.append("massive")
        return found

    @property
    def pooled_variance(self) -> float:
        """Variance over all elements, the mean over dimensions not removed (the denominator of a pooled NMSE)."""
        every = self.every
        spread = every.m2.sum() + every.count * np.square(every.mean - every.mean.mean()).sum()
        return float(spread / max(1, every.count * self.d))

    def normalizer(self, *, without_first: bool = False) -> Normalizer:
        """Mean and standard deviation as the normaliser a release keeps; constant dimensions get std 1."""
        mean, std = (self.mean_without_first, self.std_without_first) if without_first else (self.mean, self.std)
        count = self.rest.count if without_first else self.count
        std = torch.where(std > 0, std, torch.ones_like(std))
        return Normalizer(mean, std, count, self.norm_percentiles)

    def summary(self) -> dict[str, Any]:
        """The scalars, for a card or a listing."""
        first, massive = self.first_norms, self.massive_above
        return {
            "count": self.count,
            "mean_norm": self.mean_norm,
            "norm_percentiles": self.norm_percentiles,
            "massive_share": self.massive_share,
            "massive_above": massive,
            "exclude": self.proposal(),
            "position_0": {
                "count": first.count,
                "mean_norm": first.total / first.count if first.count else None,
                "max_norm": first.high if first.count else None,
            },
            "groups": {
                name: {"count": g.count, "mean_norm": g.total / max(1, g.count), "max_norm": g.high}
                for name, g in self.groups.items()
            },
            "largest": {token: norm for token, norm in self.tops.items() if norm > massive},
            "pooled_variance": self.pooled_variance,
            "mean_std": float(self.std.mean()),
            "max_std": float(self.std.max()),
        }

    def histogram(self, bars: int = 24) -> list[tuple[float, float, int]]:
        """The norm histogram in at most `bars` equal steps of the logarithm: (from, to, tokens)."""
        bins = self.norms.bins
        filled = np.flatnonzero(bins)
        if not len(filled):
            return []
        low, high = int(filled[0]), int(filled[-1]) + 1
        edges = np.unique(np.linspace(low, high, min(bars, high - low) + 1).astype(int))
        at = [bin_edge(LOWEST * PER_OCTAVE + e) for e in edges]
        counts = [int(bins[a:b].sum()) for a, b in itertools.pairwise(edges)]
        return list(zip(at[:-1], at[1:], counts, strict=True))


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f8").copy()
