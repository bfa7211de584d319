"""What is done for every firing of a run of rows: a place in a histogram, a sum, a comparison with bounds.

All of it by columns and in place, a chunk at a time that stays in the cache. The histogram is counted bin by bin in 16
bits (`[BINS, d_sae]`): the few bins in which most firings fall are then small and near. In 32 bits it takes twice as
long, by feature three times.
"""

from __future__ import annotations

import numpy as np
import torch

BINS = 64
"""Histogram bins: two per doubling of |z|, from 2^-16 to 2^16; smaller and larger ones fall into the outermost."""
LOWEST = -16
FIRST = (127 + LOWEST) << 1
"""Of the first bin: exponent and first bit of the mantissa, as they stand in a float32."""
UNIT = np.float32(2**20)
CHUNK = 1 << 16
"""Firings at once."""
PAIRED = 16_384
"""Tokens, drawn by hash, whose features are kept whole: which features fire together."""
_ONE = np.uint16(1)


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
    np.subtract(out, FIRST, out=out)
    return np.clip(out, 0, BINS - 1, out=out)


class Tally:
    """Histogram and sum of each feature's firings, and which of them pass its bounds.

    >>> tally, feature, value = Tally(8), np.int32([[1, 3], [1, 0]]), np.float32([[2, 5], [7, 0]])
    >>> tally.count(feature, value, np.full(8, 4, np.float32), strict=True).tolist()
    [[False, True], [True, False]]
    >>> tally.histogram.sum(1).tolist()[:4], (tally.sum / UNIT).tolist()[:4]
    ([0, 2, 0, 1], [0.0, 9.0, 0.0, 5.0])
    """

    def __init__(self, d_sae: int, histogram: np.ndarray | None = None, total: np.ndarray | None = None):
        """From nothing, or from what was counted before."""
        self.d_sae = d_sae
        # laid out by bin; no memory is taken for the bins that nothing falls in
        self._histogram = np.zeros((d_sae, BINS), np.int64, order="F") if histogram is None else histogram
        self._sums = torch.zeros(d_sae, dtype=torch.float64) if total is None else torch.from_numpy(total)
        self._clear()
        self._make_buffers(CHUNK)

    def _clear(self) -> None:
        # from code 0 on, so that a firing's place needs no subtraction; of the codes below the bins no memory is taken
        self._counts, self._rows = np.zeros((FIRST + BINS) * self.d_sae, np.uint16), 0

    def _make_buffers(self, n: int) -> None:
        self._code, self._size = np.empty(n, np.int32), np.empty(n, np.float32)
        self._place, self._passes = np.empty(n, np.int64), np.empty(n, bool)

    @property
    def histogram(self) -> np.ndarray:
        """Firings by feature and bin. [d_sae, BINS] int64"""
        if self._rows:
            counts = self._counts.reshape(-1, self.d_sae)[FIRST:]
            for used in np.flatnonzero(counts.any(1)):
                self._histogram[:, used] += counts[used]
            self._clear()
        return self._histogram

    @property
    def sum(self) -> np.ndarray:
        """Sum of each feature's values, in integers of 2^-20. [d_sae] float64"""
        return self._sums.numpy()

    def merge(self, other: Tally) -> None:
        """Add what another one has counted."""
        self.histogram[:] += other.histogram
        self.sum[:] += other.sum

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
        """Count the firings in codes [rows, k]; which of them may pass a bound. [rows, k] bool

        They pass when the value is above the `bound` of the feature (`strict`: a tie does not pass), or, with `hashes`
        (int32, by row), when the hash of the row is at most the feature's `bound_hash`. A value of 0 is no firing.
        """
        rows, k = feature.shape
        step = max(1, CHUNK // max(k, 1))
        if step * k > len(self._code):
            self._make_buffers(step * k)
        found = np.empty(feature.shape, bool)
        for low in range(0, rows, step):
            flat, size = feature[low : low + step].reshape(-1), value[low : low + step].reshape(-1)
            here = None if hashes is None else np.broadcast_to(hashes[low : low + step, None], (len(flat) // k, k))
            if self._rows + step > 2**16 - 1:  # a feature fires once on a row, so no count is larger
                _ = self.histogram
            self._rows += step
            passes = self._count(flat, size, bound, strict, here, bound_hash)
            found[low : low + step] = passes.reshape(-1, k)
        return found

    def _count(
        self,
        of: np.ndarray,
        value: np.ndarray,
        bound: np.ndarray,
        strict: bool,
        hashes: np.ndarray | None,
        bound_hash: np.ndarray | None,
    ) -> np.ndarray:
        """`count` for some firings [n]; `hashes` are as many, of any shape. Which pass: bool [n]"""
        n, index = len(of), torch.from_numpy(of)
        code, size, place, passes = self._code[:n], self._size[:n], self._place[:n], self._passes[:n]
        np.right_shift(value.view(np.int32), 22, out=code)
        if code.min(initial=FIRST) < FIRST or code.max(initial=FIRST) >= FIRST + BINS:
            if not np.not_equal(value, 0, out=passes).all():
                passes = passes.copy()
                chosen = None if hashes is None else hashes.reshape(-1)[passes]
                passes[passes] = self._count(of[passes], value[passes], bound, strict, chosen, bound_hash)
                return passes
            np.add(bins_of(value, out=code), FIRST, out=code)
        np.multiply(code, self.d_sae, out=code)
        np.add(code, of, out=code)
        place[:] = code
        np.add.at(self._counts, place, _ONE)
        np.multiply(value, UNIT, out=size)
        np.rint(size, out=size)
        wide = place.view(np.float64)
        wide[:] = size
        self._sums.add_(torch.bincount(index, weights=torch.from_numpy(wide), minlength=self.d_sae))
        torch.index_select(torch.from_numpy(bound), 0, index, out=torch.from_numpy(size))
        (np.greater if strict else np.greater_equal)(value, size, out=passes)
        if hashes is not None and bound_hash is not None:
            torch.index_select(torch.from_numpy(bound_hash), 0, index, out=torch.from_numpy(code))
            passes |= (code.reshape(hashes.shape) >= hashes).reshape(-1)
        return passes


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
