"""Encoding and selecting in one Triton kernel: the k largest pre-activations of each row, never all of them in memory.

A program owns some rows and walks the latents tile by tile. A tile's pre-activations stay in registers; those above
the row's k-th largest so far go to the row's list, and a full list is sorted and cut to k. Lists hold integers
that order as (value, lowest index first), so the result is exact whatever the tiles: ties go to the lowest index and
NaN stands above everything, as on the CPU.

`topk(precise=True)` gives what a float32 product gives, at the price of a bf16 one: candidates come from the bf16
product with a proven bound on its error added, they are rescored in float32, and rows where the best of what was
left out could still reach the k-th value are done again in float32 by the same kernel. No step waits for the host.

With TRITON_INTERPRET=1 the same code runs on the CPU, slowly, which is how it is tested where there is no GPU. It has
not been timed on one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

LOWEST = tl.constexpr(-(1 << 63))
"""An empty place in a list; below every value."""
PROGRAMS = 264
"""Few rows are split over latents until there are this many programs: two for each processor of an H100 or H200."""
ACCUMULATION = 2.0**-23
"""Error of one addition in a tensor core, relative; they do not round to nearest."""


@triton.jit
def _ordered(value):
    """Integers that order as the floats do; 0 equals -0, and NaN is above infinity."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value == value, order, 0x7FFFFFFF)


@triton.jit
def _cut_lists(lists, rows, first, k, stride, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr, TOGETHER: tl.constexpr):
    """Leave the k largest in the lists of BLOCK_M rows from `first` on, TOGETHER rows at a time.

    The k-th largest is found bit by bit, by counting; it stays behind the list, where the program looks it up.
    """
    tl.debug_barrier()  # the lists were written by other threads of this program
    place = tl.arange(0, SLOTS)
    one = tl.full((), 1, dtype=tl.int64)
    for start in range(0, BLOCK_M, TOGETHER):
        row = first + start + tl.arange(0, TOGETHER)
        at = lists + row.to(tl.int64) * stride
        inside = (row < rows)[:, None] & (place < SLOTS)[None, :]
        found = tl.load(at[:, None] + place[None, :], mask=inside, other=LOWEST)
        kth = tl.where(tl.sum((found >= 0).to(tl.int32), axis=1) >= k, one * 0, one * LOWEST)
        for bit in range(63):
            higher = kth + (one << (62 - bit))
            kth = tl.where(tl.sum((found >= higher[:, None]).to(tl.int32), axis=1) >= k, higher, kth)
        keep = (found >= kth[:, None]) & (found > LOWEST)
        kept = tl.cumsum(keep.to(tl.int32), axis=1)
        dropped = tl.sum(keep.to(tl.int32), axis=1)[:, None] + place[None, :] - kept
        tl.debug_barrier()
        tl.store(
            at[:, None] + tl.where(keep, kept - 1, dropped),
            tl.where(keep, found, LOWEST),
            mask=inside,
        )
        tl.store(at + SLOTS, kth, mask=row < rows)
    tl.debug_barrier()


@triton.jit
def _select(
    x, weight, bias, floor, x_loss, x_norm, w_loss, w_norm, again, lists, rows, n, d, k, span,
    FLOOR: tl.constexpr, BOUND: tl.constexpr, AGAIN: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLOTS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    inside = row < rows
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, n)
    if AGAIN:  # only blocks with a row that is to be done again have latents to walk
        wanted = tl.max(tl.load(again + row, mask=inside, other=0), axis=0)
        end = tl.where(wanted > 0, end, begin)
    stride = tl.num_programs(1) * (SLOTS + 1)
    mine = lists + tl.program_id(1) * (SLOTS + 1)
    at = mine + row.to(tl.int64) * stride
    cut = tl.full((BLOCK_M,), -2147483648, dtype=tl.int32)
    fill = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for start in range(begin, end, BLOCK_N):
        latent = start + tl.arange(0, BLOCK_N)
        real = latent < end
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for left in range(0, d, BLOCK_K):
            column = left + tl.arange(0, BLOCK_K)
            a = tl.load(
                x + row.to(tl.int64)[:, None] * d + column[None, :],
                mask=inside[:, None] & (column < d)[None, :],
                other=0.0,
            )
            b = tl.load(
                weight + latent.to(tl.int64)[None, :] * d + column[:, None],
                mask=real[None, :] & (column < d)[:, None],
                other=0.0,
            )
            if WIDEN:  # the interpreter multiplies no bf16
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
        total += tl.load(bias + latent, mask=real, other=0.0)[None, :]
        if BOUND:  # from here on, the most that the float32 value can be
            total += (
                tl.load(x_loss + row, mask=inside, other=0.0)[:, None]
                * tl.load(w_norm + latent, mask=real, other=0.0)[None, :]
                + tl.load(x_norm + row, mask=inside, other=0.0)[:, None]
                * tl.load(w_loss + latent, mask=real, other=0.0)[None, :]
            )
        order = _ordered(total)
        # a tie with the k-th so far has a higher index, so it does not come in
        take = (order > cut[:, None]) & real[None, :] & inside[:, None]
        if FLOOR:
            take = take & (total > tl.load(floor + latent, mask=real, other=0.0)[None, :])
        count = tl.sum(take.to(tl.int32), axis=1)
        if tl.max(count, axis=0) > 0:
            place = fill[:, None] + tl.cumsum(take.to(tl.int32), axis=1) - 1
            key = (order.to(tl.int64) << 32) | (0xFFFFFFFF - latent.to(tl.int64))[None, :]
            tl.store(at[:, None] + place, key, mask=take)
            fill += count
            if tl.max(fill, axis=0) > SLOTS - BLOCK_N:
                _cut_lists(mine, rows, first, k, stride, BLOCK_M, SLOTS, TOGETHER)
                cut = (tl.load(at + SLOTS, mask=inside, other=0) >> 32).to(tl.int32)
                fill = tl.minimum(fill, k)
    if end > begin:
        _cut_lists(mine, rows, first, k, stride, BLOCK_M, SLOTS, TOGETHER)


@triton.jit
def _rescore(x, weight, bias, entries, out, wide, k, d, BLOCK: tl.constexpr):
    """Float32 values of a row's candidates, best first, until none that is left can reach the k best so far.

    A candidate's list entry holds the most that its value can be; those that are not looked at stay LOWEST.
    """
    row = tl.program_id(0).to(tl.int64)
    lowest = tl.full((), 0x7FFFFFFF, dtype=tl.int32)
    c = 0
    entry = tl.load(entries + row * wide)
    while (c < wide) & (entry > LOWEST) & ((c < k) | ((entry >> 32).to(tl.int32) >= lowest)):
        latent = 0xFFFFFFFF - (entry & 0xFFFFFFFF)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for left in range(0, d, BLOCK):
            column = left + tl.arange(0, BLOCK)
            inside = column < d
            mine = tl.load(x + row * d + column, mask=inside, other=0.0)
            total += mine * tl.load(weight + latent * d + column, mask=inside, other=0.0)
        order = _ordered(tl.sum(total, axis=0) + tl.load(bias + latent))
        tl.store(out + row * wide + c, (order.to(tl.int64) << 32) | (0xFFFFFFFF - latent))
        if c < k:
            lowest = tl.minimum(lowest, order)
        c += 1
        entry = tl.load(entries + row * wide + c, mask=c < wide, other=LOWEST)


@triton.jit
def _round_rows(full, half, loss, norm, d, BLOCK: tl.constexpr):
    """A row in bf16, the norm of what rounding took away, and the norm of what is left."""
    row = tl.program_id(0).to(tl.int64)
    lost = tl.zeros((BLOCK,), dtype=tl.float32)
    kept = tl.zeros((BLOCK,), dtype=tl.float32)
    for left in range(0, d, BLOCK):
        column = left + tl.arange(0, BLOCK)
        value = tl.load(full + row * d + column, mask=column < d, other=0.0)
        short = value.to(tl.bfloat16)
        tl.store(half + row * d + column, short, mask=column < d)
        wide = short.to(tl.float32)
        lost += (value - wide) * (value - wide)
        kept += wide * wide
    tl.store(loss + row, tl.sqrt(tl.sum(lost, axis=0)))
    tl.store(norm + row, tl.sqrt(tl.sum(kept, axis=0)))


def round_rows(full: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A float32 matrix in bf16, and by row the norm of what rounding took away and the norm of what is left."""
    full = full.contiguous()
    half = torch.empty_like(full, dtype=torch.bfloat16)
    loss, norm = (torch.empty(full.shape[0], device=full.device) for _ in range(2))
    block = min(1024, triton.next_power_of_2(full.shape[1]))
    _round_rows[(full.shape[0],)](full, half, loss, norm, full.shape[1], BLOCK=block)  # pyright: ignore[reportIndexIssue]
    return half, loss, norm


class _Bound:
    """How far the bf16 product of x and W may lie from the float32 one: x_loss · w_norm + x_norm · w_loss.

    |x w - x' w'| is at most |x - x'| |w| + |x'| |w - w'|, and every addition of the two products may err.
    """

    def __init__(self, x: Tensor, W: Tensor):
        self.x, lost, self.x_norm = round_rows(x)
        self.W, self.w_loss, w_norm = round_rows(W)
        self.w_norm = (w_norm + self.w_loss) * (1 + 1e-5)
        self.x_loss = (lost + (2 * x.shape[1] + 4) * ACCUMULATION * (self.x_norm + lost)) * (1 + 1e-5)
        self.x_norm = self.x_norm * (1 + 1e-5)


def _blocks(rows: int, n: int, d: int, half: bool) -> dict[str, int]:
    """Sizes of tiles: for tensor cores where the operands are bf16, smaller ones in float32."""
    most = (128, 128, 64) if half else (64, 64, 32)
    sizes = [min(m, max(16, triton.next_power_of_2(size))) for m, size in zip(most, (rows, n, d), strict=True)]
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True))


def _largest(
    x: Tensor, W: Tensor, bias: Tensor, k: int, *,
    floor: Tensor | None = None, bound: _Bound | None = None, again: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The k largest of each row as list entries [rows, k], largest first; LOWEST where fewer are above their floor."""
    rows, n, d = x.shape[0], W.shape[0], x.shape[1]
    sizes = _blocks(rows, n, d, x.dtype is torch.bfloat16)
    blocks = triton.cdiv(rows, sizes["BLOCK_M"])
    slots = triton.next_power_of_2(k + k // 4 + sizes["BLOCK_N"])
    tiles = triton.cdiv(n, sizes["BLOCK_N"])
    splits = max(1, min(PROGRAMS // blocks, n // (8 * slots), tiles))
    span = triton.cdiv(tiles, splits) * sizes["BLOCK_N"]
    splits = triton.cdiv(n, span)
    lists = torch.full((rows, splits, slots + 1), LOWEST.value, dtype=torch.int64, device=x.device)
    none = bias  # stands for what is not read
    _select[(blocks, splits)](  # pyright: ignore[reportIndexIssue]
        x, W, bias, none if floor is None else floor,
        none if bound is None else bound.x_loss, none if bound is None else bound.x_norm,
        none if bound is None else bound.w_loss, none if bound is None else bound.w_norm,
        none if again is None else again,
        lists, rows, n, d, k, span,
        FLOOR=floor is not None, BOUND=bound is not None, AGAIN=again is not None, WIDEN=knobs.runtime.interpret,
        **sizes, SLOTS=slots, TOGETHER=min(sizes["BLOCK_M"], max(1, 4096 // slots)),
        num_warps=8 if x.dtype is torch.bfloat16 else 4,
    )  # fmt: skip
    return lists[:, :, :k].reshape(rows, -1).topk(k, dim=1).values


def _unpacked(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Values and latents of list entries; -NaN and -1 of an empty one."""
    order = (entries >> 32).int()
    return torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32), 0xFFFFFFFF - (entries & 0xFFFFFFFF)


def _candidates(
    x: Tensor, W: Tensor, bias: Tensor, wide: int, k: int, floor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `wide` entries of each row that can be largest, as the most that they can be, and as they are in float32."""
    bound = _Bound(x, W)
    highest = bias + bias.abs() * (4 * ACCUMULATION)
    candidates = _largest(bound.x, bound.W, highest, wide, floor=floor, bound=bound)
    scores = torch.full_like(candidates, LOWEST.value)
    block = min(4096, triton.next_power_of_2(x.shape[1]))
    _rescore[(x.shape[0],)](  # pyright: ignore[reportIndexIssue]
        x, W, bias, candidates, scores, wide, k, x.shape[1], BLOCK=block, num_warps=4
    )
    return candidates, scores


def topk(x: Tensor, W: Tensor, bias: Tensor, k: int, *, precise: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest of x [rows, d] @ W [n, d].T + bias in each row, largest first: values and int64 latents [rows, k].

    All in float32; `precise=False` takes the values of the bf16 product as they are.
    """
    x, W, bias, n = x.contiguous(), W.contiguous(), bias.contiguous(), W.shape[0]
    if not precise:
        return _unpacked(_largest(x.bfloat16(), W.bfloat16(), bias, k))
    wide = min(n, 3 * k)
    candidates, scores = _candidates(x, W, bias, wide, k)
    found = scores.topk(k, dim=1).values
    if wide == n:
        return _unpacked(found)
    # nothing that was left out is above the last candidate
    again = (candidates[:, -1] >> 32) >= (found[:, -1] >> 32)
    second = _largest(x, W, bias, k, again=again.int())
    return _unpacked(torch.where(again.unsqueeze(1), second, found))


def above(
    x: Tensor, W: Tensor, bias: Tensor, floor: Tensor, capacity: int, *, precise: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pre-activations above their latent's `floor` [n]: rows, latents and values, and whether every row had room.

    A row has room for `capacity`; where one had not, entries are missing. Finding how many there are waits for the GPU.
    """
    x, W, bias, floor = (t.contiguous() for t in (x, W, bias, floor))
    if precise:
        candidates, found = _candidates(x, W, bias, capacity, capacity, floor)
    else:
        candidates = found = _largest(x.bfloat16(), W.bfloat16(), bias, capacity, floor=floor)
    fits = (candidates[:, -1] == LOWEST.value).all() if capacity < W.shape[0] else torch.tensor(True)
    values, latents = _unpacked(found)
    real = found != LOWEST.value
    real &= values > floor[torch.where(real, latents, 0)]
    rows, places = real.nonzero(as_tuple=True)
    return rows, latents[rows, places], values[rows, places], fits
