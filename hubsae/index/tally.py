"""What is done for every firing of a run of rows: a place in a histogram, a sum, a comparison with bounds.

All of it by columns and in place, a chunk at a time that stays in the cache. The histogram is counted bin by bin
(`[BINS, d_sae]`, int32): the few bins in which most firings fall are then small and near; by feature it takes twice
as long.
"""

from __future__ import annotations

import numpy as np
import torch

BINS = 64
"""Histogram bins: two per doubling of |z|, from 2^-16 to 2^16; smaller and larger ones fall into the outermost."""
LOWEST = -16
UNIT = np.float32(2**20)
CHUNK = 1 << 16
"""Firings at once."""
PAIRED = 16_384
"""Tokens, drawn by hash, whose features are kept whole: which features fire together."""
_ONE = torch.ones(1, dtype=torch.int32)


def bin_edges() -> list[float]:
    """The 65 edges of the histogram's bins.

    >>> bin_edges()[32:35]
    [1.0, 1.5, 2.0]
    """
    return [2.0 ** (LOWEST + i // 2) * (1.5 if i % 2 else 1.0) for i in range(BINS + 1)]


def bins_of(values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The histogram bin of each float32 value, by its exponent and the first bit behind it. int32"""
    out = np.right_shift(values.view(np.int32), 22, out=out)
    np.bitwise_and(out, 0x1FF, out=out)
    np.subtract(out, (127 + LOWEST) << 1, out=out)
    return np.clip(out, 0, BINS - 1, out=out)


class Tally:
    """Histogram and sum of each feature's firings, and which of them pass its bounds.

    >>> tally, feature, value = Tally(8), np.int32([[1, 3], [1, 0]]), np.float32([[2, 5], [7, 0]])
    >>> tally.count(feature, value, np.full(8, 4, np.float32), strict=True).tolist()
    [1, 2]
    >>> histogram, total = np.zeros((8, BINS), np.int64), np.zeros(8)
    >>> tally.move_to(histogram, total)
    >>> histogram.sum(1).tolist()[:4], (total / UNIT).tolist()[:4]
    ([0, 2, 0, 1], [0.0, 9.0, 0.0, 5.0])
    """

    def __init__(self, d_sae: int):
        self.d_sae = d_sae
        self._clear()
        self._make_buffers(CHUNK)

    def _clear(self) -> None:
        self._counts = torch.zeros(BINS * self.d_sae, dtype=torch.int32)
        self._sums = torch.zeros(self.d_sae, dtype=torch.float64)
        self._counted = 0

    def _make_buffers(self, n: int) -> None:
        self._place, self._hash = np.empty(n, np.int32), np.empty(n, np.int32)
        self._scaled, self._least = np.empty(n, np.float32), np.empty(n, np.float32)
        self._exact, self._passes, self._near = np.empty(n), np.empty(n, bool), np.empty(n, bool)

    @property
    def full(self) -> bool:
        """Whether the counts have to be moved before they overflow."""
        return self._counted > 2**30

    def move_to(self, histogram: np.ndarray, total: np.ndarray) -> None:
        """Add what was counted to these tables, [d_sae, BINS] and [d_sae], and begin anew."""
        if self._counted:
            histogram += self._counts.view(BINS, self.d_sae).numpy().T
            total += self._sums.numpy()
            self._clear()

    def count(
        self,
        feature: np.ndarray,
        value: np.ndarray,
        bound: np.ndarray,
        *,
        strict: bool,
        hashes: np.ndarray | None = None,
        bound_hash: np.ndarray | None = None,
    ) -> np.ndarray:
        """Count the firings in codes [rows, k]; the places (row · k + column) of those that may pass a bound.

        They pass when the value is above the `bound` of the feature (`strict`: a tie does not pass), or, with `hashes`
        (int32, by row), when the hash of the row is at most the feature's `bound_hash`. A value of 0 is no firing.
        """
        rows, k = feature.shape
        step = max(1, CHUNK // max(k, 1))
        if step * k > len(self._place):
            self._make_buffers(step * k)
        found = []
        for low in range(0, rows, step):
            flat, size = feature[low : low + step].reshape(-1), value[low : low + step].reshape(-1)
            places = None
            fires = np.not_equal(size, 0, out=self._near[: len(size)])
            if not fires.all():
                places = np.flatnonzero(fires)
                flat, size = flat[places], size[places]
            n = len(flat)
            of = torch.from_numpy(flat)
            self._add(of, flat, size)
            least, passes = self._least[:n], self._passes[:n]
            torch.index_select(torch.from_numpy(bound), 0, of, out=torch.from_numpy(least))
            (np.greater if strict else np.greater_equal)(size, least, out=passes)
            if hashes is not None and bound_hash is not None:
                most, near = self._hash[:n], self._near[:n]
                torch.index_select(torch.from_numpy(bound_hash), 0, of, out=torch.from_numpy(most))
                here = hashes[low : low + step]
                if places is None:
                    np.greater_equal(most.reshape(-1, k), here[:, None], out=near.reshape(-1, k))
                else:
                    np.greater_equal(most, here[places // k], out=near)
                np.logical_or(passes, near, out=passes)
            passing = np.flatnonzero(passes)
            found.append((passing if places is None else places[passing]) + low * k)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _add(self, of: torch.Tensor, flat: np.ndarray, size: np.ndarray) -> None:
        n = len(flat)
        place, scaled, exact = self._place[:n], self._scaled[:n], self._exact[:n]
        bins_of(size, out=place)
        np.multiply(place, self.d_sae, out=place)
        np.add(place, flat, out=place)
        self._counts.index_add_(0, torch.from_numpy(place), _ONE.expand(n))
        np.multiply(size, UNIT, out=scaled)
        np.rint(scaled, out=scaled)
        exact[:] = scaled
        self._sums.index_add_(0, of, torch.from_numpy(exact))
        self._counted += n


class Cofiring:
    """The features of the `PAIRED` tokens of smallest hash, for which features fire together."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        """(hash of each token, how many features it has, the features)"""
        self._bound, self._held = 2**63 - 1, 0

    @staticmethod
    def of(tokens: np.ndarray, features: np.ndarray) -> Cofiring:
        """From the two columns `pairs`."""
        self = Cofiring()
        starts = np.flatnonzero(np.concatenate([[True], tokens[1:] != tokens[:-1]])) if len(tokens) else tokens
        self._parts = [(tokens[starts], np.diff(np.append(starts, len(tokens))), features)]
        self._held = len(starts)
        return self

    def add(self, hashes: np.ndarray, feature: np.ndarray, value: np.ndarray) -> None:
        """Look at codes [rows, k]."""
        row = np.flatnonzero(hashes < self._bound)
        if not len(row):
            return
        fires = value[row] != 0
        counts = fires.sum(1)
        some = counts > 0
        self._parts.append((hashes[row][some], counts[some], feature[row][fires]))
        self._held += int(some.sum())
        if self._held > 2 * PAIRED:
            self._cut()

    def merge(self, other: Cofiring) -> None:
        """Take in those of other rows."""
        self._parts, self._held = [*self._parts, *other._parts], self._held + other._held
        self._cut()

    def _cut(self) -> None:
        hashes, counts, features = (np.concatenate(columns) for columns in zip(*self._parts, strict=True))
        if len(hashes) > PAIRED:
            self._bound = int(np.partition(hashes, PAIRED)[PAIRED])
            kept = hashes < self._bound
            features, hashes, counts = features[np.repeat(kept, counts)], hashes[kept], counts[kept]
        self._parts, self._held = [(hashes, counts, features)], len(hashes)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(hash of the token, feature) of each firing, sorted."""
        if not self._parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int32)
        self._cut()
        hashes, counts, features = self._parts[0]
        different, rank = np.unique(hashes, return_inverse=True)
        packed = (np.repeat(rank.reshape(-1), counts) << 32) | features
        packed.sort()
        return different[packed >> 32], packed.astype(np.int32)
