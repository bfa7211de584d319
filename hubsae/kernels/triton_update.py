"""The update of one matrix as one Triton kernel: gradient, projection, Adam and norm of a latent's row at once.

A program owns a latent. It sums its gradient from the entries' rows in registers, takes the step and writes the row and
its moments: no gradient exists in memory, nothing is added atomically, and the order of every sum is fixed. It has not
been timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 8192
"""Columns of a row that fit one program's registers."""


@triton.jit
def _update(
    weight, m, v, table, rows, weights, offsets, norms, scalars, d, rest1, beta2, rest2, eps,
    PROJECT: tl.constexpr, UNIT_ROWS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(scalars + 2) == 0:  # the loss was no number: nothing moves
        return
    latent = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < d
    gradient = tl.zeros((BLOCK,), dtype=tl.float32)
    end = tl.load(offsets + latent + 1)
    for entry in range(tl.load(offsets + latent), end):
        row = tl.load(rows + entry).to(tl.int64)
        value = tl.load(table + row * d + column, mask=inside, other=0.0).to(tl.float32)
        gradient += tl.load(weights + entry) * value
    at = latent.to(tl.int64) * d + column
    W = tl.load(weight + at, mask=inside, other=0.0)
    if PROJECT:
        along = tl.sum(gradient * W, axis=0)
        if not UNIT_ROWS:
            along = along / tl.maximum(tl.sum(W * W, axis=0), 1e-24)
        gradient -= along * W
    first = tl.load(m + at, mask=inside, other=0.0)
    second = tl.load(v + at, mask=inside, other=0.0)
    first += rest1 * (gradient - first)
    second = beta2 * second + rest2 * gradient * gradient
    W -= tl.load(scalars) * first / (tl.sqrt(second) / tl.load(scalars + 1) + eps)
    if NORM:
        W *= tl.load(norms + latent) / tl.maximum(tl.sqrt(tl.sum(W * W, axis=0)), 1e-12)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    tl.store(weight + at, W, mask=inside)


def fits(*matrices: Tensor) -> bool:
    """Whether these matrices can be updated here: float32 and not too wide."""
    return all(m.dtype is torch.float32 and m.shape[1] <= WIDEST for m in matrices)


def scalars(lr: float | Tensor, step: Tensor, betas: tuple[float, float], moves: Tensor | None) -> Tensor:
    """What a step's update needs beside the gradients, on the device [3]: Adam's step size and correction, and whether.

    `step` counts this step already; `moves` is false where nothing may move, and None where all does.
    """
    one, two = (1 - torch.pow(beta, step.double()) for beta in betas)
    return torch.stack([lr / one, two.sqrt(), torch.ones_like(one) if moves is None else moves.double()]).float()


def update(
    state: tuple[Tensor, Tensor, Tensor],
    table: Tensor,
    rows: Tensor,
    weights: Tensor,
    offsets: Tensor,
    scalars: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    project: bool = False,
    unit_rows: bool = False,
    norms: Tensor | None = None,
) -> None:
    """Step a matrix [n, d] and its moments, in place, by the gradient Σ weights[e] · table[rows[e]] of each latent.

    Entries of latent j are offsets[j] to offsets[j + 1]. `project` removes the part of a gradient along its row (of
    norm one already with `unit_rows`); `norms` [n] are what rows are rescaled to.
    """
    weight, m, v = state
    n, d = weight.shape
    block = triton.next_power_of_2(d)
    _update[(n,)](  # pyright: ignore[reportIndexIssue]
        weight, m, v, table, rows, weights, offsets, weight if norms is None else norms, scalars, d,
        1 - betas[0], betas[1], 1 - betas[1], eps,
        PROJECT=project, UNIT_ROWS=unit_rows, NORM=norms is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
