"""The exact top-k of x @ W.T + b by way of a product in bf16, which takes half the time of one in float32 (numba).

A product of rounded operands differs from the exact one by at most

    |dx| |w| + |bf16(x)| |dw| + |db| + half a unit of the output + float32 summation,       dx = x - bf16(x), ...

The norms of the rounding errors are measured, so the bound holds for these very rows and latents (Cauchy-Schwarz). An
entry whose upper bound lies below the k-th largest lower bound cannot be among the k largest. The rest, 1.5 to 2
times k, get their dot product in float32, latent by latent, and the k largest of those are selected. The values
are float32 dot products and the set is that of a float32 product, up to the rounding of float32 sums.

Where the bound lets too many through (a few huge dimensions, small pre-activations), the caller is told
and multiplies in float32.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from hubsae.kernels import linear as products
from hubsae.kernels.select import topk

MOST_THREADS = numba.get_num_threads()
GROUP = 16
"""Entries whose maximum is looked at first; groups of groups follow where there are enough for a bound."""
ROWS = 512
"""Rows multiplied at once."""
SHARE = 1 / 24
"""Of a row's entries may be candidates, and of the rows may have more, before the product in float32 is cheaper."""
SMALLEST = (256, 2048)
"""d_in and latents below which halving the product does not pay."""

TILE = 256
"""Latents whose rows of W stay in cache while their candidates are rescored."""
OUTPUT = np.float32(0.00395)
"""Half a unit of a bf16 number, relative to it (2^-8), and a little more."""
SLACK = np.float32(2.02)
"""Twice the bound, and a little more for the rounding of the bound itself."""

_alone = threading.Lock()
"""numba's own pool of threads, its default where OpenMP is missing, ends the process when two threads enter it."""
# Python's error model checks each division and index; without it the loops become vector code
_jit = numba.njit(cache=True, error_model="numpy")
_sums = {"reassoc", "contract", "nsz"}


@_jit
def _kth_largest(a, n, k):
    """Reorder a[:n] so that its k largest come first; the smallest of those is returned."""
    low, high, want = 0, n - 1, k - 1
    while low < high:
        mid = (low + high) >> 1
        x, y, z = a[low], a[mid], a[high]
        pivot = max(min(x, y), min(max(x, y), z))
        i, j = low, high
        while i <= j:
            while a[i] > pivot:
                i += 1
            while a[j] < pivot:
                j -= 1
            if i <= j:
                a[i], a[j] = a[j], a[i]
                i += 1
                j -= 1
        if want <= j:
            high = j
        elif want >= i:
            low = i
        else:
            break
    return a[want]


@_jit
def _max_into(out, row):
    for i in range(out.shape[0]):
        out[i] = max(out[i], row[i])


@_jit
def _maxima(row, groups, out):
    """out[g] = max of row[g], row[g + groups], ... over the whole groups. [groups]"""
    out[:] = row[:groups]
    for start in range(groups, row.shape[0] - groups + 1, groups):
        _max_into(out, row[start : start + groups])


@numba.njit(parallel=True, cache=True, error_model="numpy", fastmath=_sums)
def _round(source, target, norms, errors):
    """Rows rounded to bf16 (to nearest, ties to even); norms of the rows and of what rounding took away."""
    rows, d = source.shape
    bits = source.view(np.uint32)
    parts = min(rows, 64)
    for part in numba.prange(parts):
        back = np.empty(d, np.uint32)
        rounded = back.view(np.float32)
        for r in range(part * rows // parts, (part + 1) * rows // parts):
            for i in range(d):
                b = bits[r, i]
                back[i] = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
            size, lost = np.float32(0), np.float32(0)
            for i in range(d):
                v = source[r, i]
                size += v * v
                lost += (v - rounded[i]) * (v - rounded[i])
                target[r, i] = np.uint16(back[i] >> np.uint32(16))
            norms[r] = np.sqrt(size)
            errors[r] = np.sqrt(lost)


@_jit
def _ordered(row):
    """bf16 bits as int16 that compare like the numbers, in place; its own inverse."""
    for i in range(row.shape[0]):
        b = row[i]
        row[i] = b ^ ((b >> 15) & 0x7FFF)


@_jit
def _code_below(number, word):
    """The largest ordered int16 that is not above `number`."""
    word.view(np.float32)[0] = number
    code = np.int64(word[0] >> np.uint32(16))
    if code < 0x8000:
        return code
    ordered = (code - 0x10000) ^ 0x7FFF
    return ordered - 1 if (word[0] & np.uint32(0xFFFF)) else ordered


@_jit
def _kth_code(row, where, count, k, floor, tally):
    """The k-th largest of row[where[:count]], none below `floor`, by counting: bf16 has few numbers."""
    last = tally.shape[0] - 1
    tally[:] = 0
    for c in range(count):
        tally[min(np.int64(row[where[c]]) - floor, last)] += 1
    left = k - tally[last]
    if left <= 0:
        return floor + last
    step = last
    while left > 0:
        step -= 1
        left -= tally[step]
    return floor + step


@_jit
def _at_least(row, inner, floor, groups, where):
    """Places of the entries of `row` that are not below `floor`; `inner` holds the maxima of its strided groups."""
    chosen = 0
    m1 = inner.shape[0]
    for g in range(m1):  # without branches: half of them would be guessed wrong
        groups[chosen] = g
        chosen += inner[g] >= floor
    count = 0
    whole = row.shape[0] // m1 * m1
    for c in range(chosen):
        for i in range(groups[c], whole, m1):
            where[count] = i
            count += row[i] >= floor
    for i in range(whole, row.shape[0]):
        where[count] = i
        count += row[i] >= floor
    return count


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _find(approx, k, m1, m2, shares, flats, w_size, counts, latents, near, bound):
    """Candidates of every row; a row with more than fit has count -1.

    The bound of entry a of row r and latent j is shares[r] * w_size[j] + flats[r] + |a| * OUTPUT.
    """
    rows, n = approx.shape
    most = latents.shape[1]
    largest = w_size.max()
    parts = min(rows, 64)
    for part in numba.prange(parts):
        inner, outer = np.empty(m1, np.int16), np.empty(max(m1, m2), np.int16)
        groups, where = np.empty(m1 + 1, np.int64), np.empty(n + 1, np.int32)
        bits, tally, word = np.empty(n, np.uint32), np.empty(512, np.int32), np.empty(1, np.uint32)
        value = bits.view(np.float32)
        error = np.empty(n, np.float32)
        for r in range(part * rows // parts, (part + 1) * rows // parts):
            row = approx[r]
            _ordered(row)
            _maxima(row, m1, inner)
            if m2 > 0:
                _maxima(inner, m2, outer[:m2])
                floor = _kth_largest(outer, m2, k)
            else:
                outer[:m1] = inner
                floor = _kth_largest(outer, m1, k)
            word[0] = np.uint32((floor ^ ((floor >> 15) & 0x7FFF)) & 0xFFFF) << np.uint32(16)
            at = word.view(np.float32)[0]
            limit = at - SLACK * (shares[r] * largest + flats[r] + OUTPUT * abs(at))
            if not np.isfinite(limit):
                counts[r] = -1
                continue
            floor = _code_below(limit, word)
            count = _at_least(row, inner, floor, groups, where)
            code = _kth_code(row, where, count, k, floor, tally)
            cut = np.float32(np.inf)
            for c in range(count):
                b = row[where[c]]
                bits[c] = np.uint32((b ^ ((b >> 15) & 0x7FFF)) & 0xFFFF) << np.uint32(16)
            for c in range(count):
                error[c] = shares[r] * w_size[where[c]] + flats[r] + OUTPUT * abs(value[c])
            for c in range(count):
                if row[where[c]] >= code:
                    cut = min(cut, value[c] - error[c])
            kept = 0
            for c in range(count):
                if value[c] + error[c] >= cut:
                    if kept < most:
                        latents[r, kept], near[r, kept], bound[r, kept] = where[c], value[c], error[c]
                    kept += 1
            counts[r] = kept if kept <= most else -1


@_jit
def _tiled(counts, latents, n):
    """Counting sort: rows and places of the candidates, tile of latents by tile, by row within."""
    tiles = (n + TILE - 1) // TILE
    offsets = np.zeros(tiles + 1, np.int64)
    for r in range(counts.shape[0]):
        for c in range(counts[r]):
            offsets[latents[r, c] // TILE + 1] += 1
    for j in range(tiles):
        offsets[j + 1] += offsets[j]
    rows, places = np.empty(offsets[tiles], np.int32), np.empty(offsets[tiles], np.int32)
    at = offsets[:-1].copy()
    for r in range(counts.shape[0]):
        for c in range(counts[r]):
            j = latents[r, c] // TILE
            rows[at[j]], places[at[j]] = r, c
            at[j] += 1
    return offsets, rows, places


@numba.njit(cache=True, error_model="numpy", fastmath=_sums)
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _rescore(x, W, b, latents, offsets, rows, places, exact):
    """Float32 dot products of the candidates. A tile of W stays in the second-level cache while x runs past it."""
    for tile in numba.prange(offsets.shape[0] - 1):
        for e in range(offsets[tile], offsets[tile + 1]):
            r, c = rows[e], places[e]
            j = latents[r, c]
            exact[r, c] = _dot(x[r], W[j]) + b[j]


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _choose(counts, latents, near, bound, exact, k, values, indices, wrong):
    """The k largest of each row's candidates; a row whose bound did not hold is marked."""
    rows = counts.shape[0]
    parts = min(rows, 64)
    for part in numba.prange(parts):
        scratch = np.empty(latents.shape[1], np.float32)
        for r in range(part * rows // parts, (part + 1) * rows // parts):
            count = counts[r]
            bad = count < k
            for c in range(count):
                bad |= not abs(exact[r, c] - near[r, c]) <= bound[r, c]
            wrong[r] = bad
            if bad:
                continue
            scratch[:count] = exact[r, :count]
            cut = _kth_largest(scratch, count, k)
            taken = 0
            for c in range(count):
                if exact[r, c] > cut:
                    values[r, taken], indices[r, taken] = exact[r, c], latents[r, c]
                    taken += 1
            for c in range(count):
                if taken < k and exact[r, c] == cut:
                    values[r, taken], indices[r, taken] = exact[r, c], latents[r, c]
                    taken += 1


class _Rounded(NamedTuple):
    """A matrix in bf16 and what that cost it."""

    matrix: Tensor
    sizes: np.ndarray
    errors: np.ndarray

    @staticmethod
    def of(source: Tensor) -> _Rounded:
        target = torch.empty(source.shape, dtype=torch.bfloat16)
        sizes, errors = np.empty(len(source), np.float32), np.empty(len(source), np.float32)
        with _alone:
            _round(source.numpy(), target.view(torch.int16).numpy().view(np.uint16), sizes, errors)
        return _Rounded(target, sizes, errors)


def pays(x: Tensor, W: Tensor, k: int) -> bool:
    """Whether this shape is faster this way; decided once by a trial on random numbers."""
    n, d = W.shape
    if d < SMALLEST[0] or n < SMALLEST[1] or 16 * k > n or not (x.is_contiguous() and W.is_contiguous()):
        return False
    rows, width = min(len(x), ROWS), min(n, 8192)

    def trial() -> str:
        generator = torch.Generator().manual_seed(0)
        some, weight = torch.randn(rows, d, generator=generator), torch.randn(width, d, generator=generator)
        bias = torch.zeros(width)
        try:
            ours = products.fastest(lambda: encode_topk(some, weight, bias, k))
        except (AttributeError, NotImplementedError, RuntimeError):  # no such operator, no bf16
            return "whole"
        theirs = products.fastest(lambda: topk(products.linear(some, weight, bias), k))
        return "candidates" if 1.1 * ours < theirs else "whole"

    return products.decide((rows, d, width, torch.get_num_threads(), k), trial) == "candidates"


def encode_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k largest entries of each row of x @ W.T + b: values and int64 indices [rows, k], unordered.

    x [rows, d], W [n, d], float32 on the CPU. None where the bound lets too many through: multiply in float32 then.

    >>> g = torch.Generator().manual_seed(0)
    >>> x, W, b = torch.randn(4, 64, generator=g), torch.randn(512, 64, generator=g), torch.zeros(512)
    >>> values, indices = encode_topk(x, W, b, 8)
    >>> bool((indices.sort(1)[0] == (x @ W.T).topk(8)[1].sort(1)[0]).all())
    True
    """
    n, d = W.shape
    numba.set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
    weights = _Rounded.of(W)
    bias = b.bfloat16()
    # errors of rows of W as a share of their norms: one number serves all
    share = float((weights.errors / np.maximum(weights.sizes, 1e-30)).max())
    flat = np.float32(1.01 * float((b - bias.float()).abs().max()))
    most = max(4 * k, round(n * SHARE))
    m1 = max(n // GROUP, min(n, round(1.5 * k)))
    m2 = m1 // 4 if m1 // 4 >= 1.5 * k else 0
    counts = np.empty(x.shape[0], np.int32)
    latents = np.empty((x.shape[0], most), np.int32)
    near, bound = np.empty((x.shape[0], most), np.float32), np.empty((x.shape[0], most), np.float32)
    for start in range(0, x.shape[0], ROWS):
        part = slice(start, start + ROWS)
        rows = _Rounded.of(x[part])
        approx = torch.ops.mkldnn._linear_pointwise(rows.matrix, weights.matrix, bias, "none", [], "")
        # |dx| |w| + |bf16(x)| |dw| + float32 summation on both sides, per |w|
        shares = 1.01 * (rows.errors + (rows.sizes + rows.errors) * share + 4 * d * 2.0**-24 * rows.sizes)
        flats = np.full(len(shares), flat)
        codes = approx.view(torch.int16).numpy()
        with _alone:
            _find(codes, k, m1, m2, shares, flats, weights.sizes, counts[part], latents[part], near[part], bound[part])
        if (counts[part] < 0).mean() > SHARE:
            return None
    offsets, owners, places = _tiled(counts, latents, n)
    exact = np.empty_like(near)
    with _alone:
        _rescore(x.numpy(), W.numpy(), b.numpy(), latents, offsets, owners, places, exact)
    values = torch.empty(x.shape[0], k)
    indices = torch.empty(x.shape[0], k, dtype=torch.int64)
    wrong = np.empty(x.shape[0], np.bool_)
    with _alone:
        _choose(counts, latents, near, bound, exact, k, values.numpy(), indices.numpy(), wrong)
    if wrong.any():
        again = torch.from_numpy(wrong.nonzero()[0])
        values[again], indices[again] = topk(products.linear(x[again], W, b), k)
    return values, indices
