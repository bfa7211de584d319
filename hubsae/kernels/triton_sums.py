"""The sparse sums as Triton kernels for CUDA: weighted sums of rows, and dots at the entries.

One program owns one output row (a token when decoding, a latent for the gradients) and walks its list of entries,
with the sum in registers: no atomics, no temporaries of the size of the entries, and a fixed order, so a seed gives
the same bits. With TRITON_INTERPRET=1 the same code runs on the CPU, slowly, which is how it is tested where there is
no GPU. It has not been timed on one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _bag_sum(table, indices, offsets, weights, out, entries, bags, d, BLOCK_D: tl.constexpr):
    bag = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    start = tl.load(offsets + bag)
    end = tl.load(offsets + bag + 1, mask=bag + 1 < bags, other=entries)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for entry in range(start, end):
        row = tl.load(indices + entry).to(tl.int64)
        weight = tl.load(weights + entry).to(tl.float32)
        total += weight * tl.load(table + row * d + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + bag.to(tl.int64) * d + column, total, mask=inside)


@triton.jit
def _entry_dots(weight, table, rows, offsets, out, d, BLOCK_D: tl.constexpr):
    latent = tl.program_id(0)
    start = tl.load(offsets + latent)
    end = tl.load(offsets + latent + 1)
    for entry in range(start, end):
        row = tl.load(rows + entry).to(tl.int64)
        total = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for first in range(0, d, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            inside = column < d
            mine = tl.load(weight + latent.to(tl.int64) * d + column, mask=inside, other=0.0).to(tl.float32)
            total += mine * tl.load(table + row * d + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + entry, tl.sum(total, axis=0))


def bag_sum(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[i] = Σ weights[e] · table[indices[e]] over the entries e of bag i; `offsets` are the bags' starts.

    The table may be in bf16; sums are taken in float32.
    """
    table = table.contiguous()
    bags, d = offsets.shape[0], table.shape[1]
    out = torch.empty(bags, d, dtype=weights.dtype, device=table.device)
    block = min(BLOCK, triton.next_power_of_2(d))
    _bag_sum[(bags, triton.cdiv(d, block))](  # pyright: ignore[reportIndexIssue]
        table, indices, offsets, weights, out, indices.numel(), bags, d, BLOCK_D=block
    )
    return out


def entry_dots(W: Tensor, table: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """W[latent of e] · table[row of e] for entries in latent order; `offsets` is [len(W) + 1]."""
    W, table = W.contiguous(), table.contiguous()
    out = torch.empty(rows.numel(), dtype=W.dtype, device=table.device)
    block = min(BLOCK, triton.next_power_of_2(W.shape[1]))
    _entry_dots[(W.shape[0],)](  # pyright: ignore[reportIndexIssue]
        W, table, rows, offsets, out, W.shape[1], BLOCK_D=block
    )
    return out
