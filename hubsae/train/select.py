"""Which latents of an SAE fire on a batch: the encoder's product and the selection, for every architecture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hubsae.kernels import chosen, entries
from hubsae.kernels.linear import linear, rows_at_once
from hubsae.kernels.select import largest, topk
from hubsae.train import aux
from hubsae.train.dense import DenseCodes
from hubsae.train.parallel import Solo
from hubsae.train.state import Cell

# above this share of active entries the dense products win (measured: even at 20 %)
DENSE_ABOVE = 0.18
# with Triton kernels, entries that a row of a jumprelu SAE has room for, and times k of a batch_topk SAE
ROOM = 512
ROOM_FOR_K = 4


class Selected(NamedTuple):
    """One cell's choice for a batch, in row order."""

    rows: Tensor
    """[nnz] int64, within the batch."""
    latents: Tensor
    """[nnz] within the cell."""
    values: Tensor
    """[nnz]"""
    near: Tensor | None = None
    """jumprelu: 1.0 where the pre-activation is within half a bandwidth of the threshold."""
    dead_pre: Tensor | None = None
    """AuxK: pre-activations of the dead latents [rows, n_dead]."""
    dense: DenseCodes | None = None
    """Set instead of entries where the codes are too dense for them."""


def encode(cell: Cell, xc: Tensor) -> Tensor:
    """Pre-activations [rows, n]."""
    if cell.config.precision == "bf16":
        with torch.autocast(xc.device.type, dtype=torch.bfloat16):
            return torch.nn.functional.linear(xc, cell.W_enc).to(xc.dtype) + cell.vectors["b_enc"]
    return linear(xc, cell.W_enc, cell.vectors["b_enc"])


def select(cell: Cell, xc: Tensor, comm: Solo, rows_in_all: int) -> Selected:
    """Encode a batch and choose its active entries, some rows at a time where the block is large."""
    B, arch = xc.shape[0], cell.config.architecture
    if arch == "gated":
        return Selected(*_none(xc), dense=DenseCodes.gated(cell, linear(xc, cell.W_enc)))
    dead = aux.dead_ids(cell, comm)
    step = rows_at_once(B, cell.n)
    if arch == "batch_topk":
        return _batch_topk(cell, xc, step, dead, comm, rows_in_all)
    if _in_one_kernel(xc):
        found = None
        if arch == "topk":
            found = _topk_entries(cell, *_triton_topk(cell, xc), 0, comm)
        elif arch == "jumprelu" and cell.widest <= ROOM:
            theta = cell.vectors["theta"]
            found = _triton_above(cell, xc, theta - cell.config.sparsity.bandwidth / 2, ROOM)
            found = found and _gate(cell, *found, theta)
        if found is not None:
            rows, latents, values, near = _joined([found])
            return Selected(rows, latents, values, near, _dead_pre(cell, xc, dead))
    parts, dead_pre, is_dense, widest = [], [], None, 0
    for start in range(0, B, step):
        pre = encode(cell, xc[start : start + step])
        if dead is not None:
            dead_pre.append(pre.index_select(1, dead))
        if arch in ("jumprelu", "relu"):
            theta = cell.vectors.get("theta")
            edge = theta - cell.config.sparsity.bandwidth / 2 if theta is not None else 0.0
            mask = entries.above(pre, edge)
            if theta is not None and chosen() == "triton":
                widest = max(widest, int(mask.sum(1).max()))
                cell.widest = widest
            if is_dense is None:
                is_dense = entries.count(mask) > DENSE_ABOVE * mask.numel()
            parts.append(pre if is_dense else _entries(cell, pre, mask, theta, start))
        else:
            parts.append(_topk_entries(cell, *topk(pre, min(cell.config.k or 0, cell.n)), start, comm))
    kept_dead = torch.cat(dead_pre) if dead_pre else None
    if is_dense:
        pre = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Selected(*_none(xc), dense=DenseCodes.thresholded(cell, pre), dead_pre=kept_dead)
    rows, latents, values, near = _joined(parts)
    return Selected(rows, latents, values, near, kept_dead)


def _in_one_kernel(xc: Tensor) -> bool:
    """Whether a Triton kernel encodes and selects at once."""
    return chosen() == "triton" and xc.dtype is torch.float32


def _triton_topk(cell: Cell, xc: Tensor) -> tuple[Tensor, Tensor]:
    from hubsae.kernels import triton_encode

    k, precise = min(cell.config.k or 0, cell.n), cell.config.precision == "fp32"
    return triton_encode.topk(xc, cell.W_enc, cell.vectors["b_enc"], k, precise=precise)


def _triton_above(cell: Cell, xc: Tensor, floor: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Entries above their latent's floor; None where a row has more of them than `room`."""
    from hubsae.kernels import triton_encode

    room, precise = min(cell.n, room), cell.config.precision == "fp32"
    *found, fits = triton_encode.above(xc, cell.W_enc, cell.vectors["b_enc"], floor, room, precise=precise)
    return (found[0], found[1], found[2]) if bool(fits) else None


def _dead_pre(cell: Cell, xc: Tensor, dead: Tensor | None) -> Tensor | None:
    """Pre-activations of the dead latents alone [rows, n_dead]."""
    if dead is None:
        return None
    return linear(xc, cell.W_enc.index_select(0, dead), cell.vectors["b_enc"].index_select(0, dead))


def _none(xc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.empty(0, dtype=torch.int64, device=xc.device)
    return empty, empty, xc.new_empty(0)


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if len(parts) == 1:
        joined = parts[0]
    else:
        joined = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return joined[0], joined[1], joined[2], joined[3] if len(joined) > 3 else None


def _topk_entries(cell: Cell, values: Tensor, latents: Tensor, start: int, comm: Solo) -> tuple[Tensor, ...]:
    rows = torch.arange(start, start + values.shape[0], device=values.device).repeat_interleave(values.shape[1])
    latents, keep = latents.reshape(-1), comm.keep_topk(values, cell.config.k or 0)
    values = (values if cell.signed else values.relu_()).reshape(-1)
    if keep is not None:
        keep = keep.reshape(-1)
        rows, latents, values = rows[keep], latents[keep], values[keep]
    return rows, latents, values


def _entries(cell: Cell, pre: Tensor, mask: Tensor, theta: Tensor | None, start: int) -> tuple[Tensor, ...]:
    rows, latents, values = entries.at(pre, mask)
    if start:
        rows += start
    return (rows, latents, values) if theta is None else _gate(cell, rows, latents, values, theta)


def _gate(cell: Cell, rows: Tensor, latents: Tensor, values: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    """Entries of a jumprelu SAE: zero below the threshold, and which are near it."""
    at = theta.index_select(0, latents)
    near = ((values - at).abs() < cell.config.sparsity.bandwidth / 2).to(values.dtype)
    return rows, latents, torch.where(values > at, values, 0), near


def _batch_topk(cell: Cell, xc: Tensor, step: int, dead: Tensor | None, comm: Solo, rows_in_all: int) -> Selected:
    """The k * tokens largest entries of the whole batch, over all ranks.

    A share of the last batch's threshold comes first as a filter; where it leaves too few, everything is searched.
    """
    count = (cell.config.k or 0) * rows_in_all
    floor = 0.85 * cell.last_threshold
    while True:
        parts, dead_pre = [], []
        if _in_one_kernel(xc):
            room = min(cell.n, ROOM_FOR_K * (cell.config.k or 0))
            found = _triton_above(cell, xc, torch.full_like(cell.vectors["b_enc"], floor), room)
            parts = [] if found is None else [found]
            if found is not None and dead is not None:
                dead_pre.append(_dead_pre(cell, xc, dead))
        for start in () if parts else range(0, xc.shape[0], step):
            pre = encode(cell, xc[start : start + step])
            if dead is not None:
                dead_pre.append(pre.index_select(1, dead))
            rows, latents, values = entries.at(pre, entries.above(pre, floor))
            parts.append((rows + start if start else rows, latents, values))
        rows, latents, values, _ = _joined(parts)
        found = comm.sum_latents(comm.sum(torch.tensor(values.numel(), device=values.device)))
        if floor <= 0 or int(found) >= count:
            break
        floor = 0.0
    keep = comm.batch_threshold(values, count)
    if keep is None and values.numel() > count:
        keep = largest(values, count)
    if keep is not None and keep.dtype is torch.bool:
        keep = keep.nonzero().view(-1)
    if keep is not None:
        rows, latents, values = (column.index_select(0, keep) for column in (rows, latents, values))
    lowest = comm.lowest(values.min() if values.numel() else values.new_tensor(torch.inf))
    cell.last_threshold = 0.0 if lowest == torch.inf else lowest
    return Selected(rows, latents, values, None, torch.cat(dead_pre) if dead_pre else None)


def inference_threshold(cell: Cell, rows: Tensor, comm: Solo) -> float:
    """The threshold above which a batch_topk SAE fires k times per token of `rows` [m, d] (training space)."""
    center = cell.center
    guess = cell.last_threshold
    selected = select(cell, rows if center is None else rows - center, comm, rows.shape[0])
    lowest = comm.lowest(selected.values.min() if selected.values.numel() else rows.new_tensor(0.0))
    cell.last_threshold = guess
    # strictly above it fires what was selected
    return max(0.0, float(torch.nextafter(torch.tensor(lowest), torch.tensor(-1.0))))
