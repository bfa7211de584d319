"""Which latents fire: exact top-k of each row, top-k of a whole batch, and everything above a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from hubsae.kernels import chosen

# rows narrower than this go straight to torch.topk
DIRECT = 512
GROUP = 4


def topk(pre: Tensor, k: int, *, sorted: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest of each row [rows, n]: values and int64 indices [rows, k], exact; largest first if `sorted`.

    A row's k largest lie in the k groups with the largest maxima, so the row is reduced by maxima of strided
    groups until it is short, and expanded again level by level; each level keeps k groups of four candidates.
    1.9 times torch.topk at 7168 latents, k 64 (6.2 ms against 11.9 ms for 512 rows on one core).

    >>> values, indices = topk(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 2)
    >>> sorted(indices[0].tolist())
    [1, 3]
    """
    rows, n = pre.shape
    if chosen() == "numba" and pre.dtype is torch.float32 and pre.device.type == "cpu" and pre.is_contiguous():
        from hubsae.kernels import compiled

        values, indices = compiled.topk(pre, k)
        if sorted:
            values, order = values.sort(1, descending=True)
            indices = indices.gather(1, order)
        return values, indices
    groups = n // GROUP
    # the maxima must outnumber k clearly, or the level costs more than it saves
    if n <= DIRECT or n % GROUP or groups < 4 * k or not pre.is_contiguous():
        return torch.topk(pre, k, dim=1, sorted=sorted)
    grouped = pre.view(rows, GROUP, groups)
    group = topk(grouped.amax(1), k)[1]  # [rows, k]
    candidates = grouped.gather(2, group.unsqueeze(1).expand(-1, GROUP, -1)).view(rows, GROUP * k)
    values, place = torch.topk(candidates, k, dim=1, sorted=sorted)
    member = torch.div(place, k, rounding_mode="floor")
    return values, member * groups + group.gather(1, place - member * k)


def above(pre: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """Row-major positions of the entries above a threshold (scalar or [n]): rows and columns, int64 [nnz]."""
    return nonzero(pre > threshold)


def nonzero(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row-major positions of the true entries of a mask [rows, n]: rows and columns, int64 [nnz].

    On the CPU numpy's flat search is twice as fast as torch.nonzero (1.4 against 2.8 ms for 3.7M entries).
    """
    n = mask.shape[1]
    if mask.device.type == "cpu":
        flat = torch.from_numpy(mask.contiguous().view(-1).numpy().nonzero()[0])
    else:
        flat = mask.reshape(-1).nonzero().view(-1)
    rows = torch.div(flat, n, rounding_mode="floor")
    return rows, flat - rows * n


def batch_topk(pre: Tensor, count: int, guess: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest positive entries of a whole batch [rows, n]: rows, columns, values, row-major.

    `guess` is a threshold of an earlier batch: entries above a fraction of it are looked at first, and only
    if they are too few is the whole batch searched. The result does not depend on it.

    >>> rows, columns, values = batch_topk(torch.tensor([[5.0, 4.0, -1.0], [0.5, 3.0, -2.0]]), 3)
    >>> rows.tolist(), columns.tolist(), values.tolist()
    ([0, 0, 1], [0, 1, 1], [5.0, 4.0, 3.0])
    """
    n = pre.shape[1]
    floor = 0.85 * guess if guess is not None and guess > 0 else 0.0
    found = above(pre, floor)
    if floor > 0 and found[0].numel() < count:
        found = above(pre, 0.0)
    row, column = found
    values = pre.view(-1)[row * n + column] if pre.is_contiguous() else pre[row, column]
    if values.numel() > count:
        kept = torch.topk(values, count, sorted=False).indices.sort().values
        row, column, values = row[kept], column[kept], values[kept]
    return row, column, values
