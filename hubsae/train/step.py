"""The training step, written by hand: one dense product (the encoder), everything after it on the active entries.

For a bank of cells and one batch:

1. `forward`: per cell, encode and select; then decode all cells at once and take the loss.
2. `signals`: what the update needs: the gradient of every entry, the biases' gradients, AuxK's.
3. `update.apply`: weight gradients, projection, Adam and norm, a tile of latents at a time.

With E = x̂ - x and G = dloss/dx̂ the gradients are  dz = <G[row], W_dec[latent]>,  gW_dec[j] = Σ z G[row],
gW_enc[j] = Σ dz (x - c)[row],  gb_enc[j] = Σ dz,  gc = -gb_enc @ W_enc:  no other product is needed.
Tests hold it to the same in a few dense lines with autograd (`tests/reference.py`).

Rows of G and rows of x are numbered over the bank: cell i owns the rows from i * B. A matryoshka cell has one
residual per prefix, hence B rows for each; an entry then belongs to the group of its latent, whose
gradient is the sum over all prefixes that contain it.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hubsae.kernels import chosen, cpu
from hubsae.kernels.active import ActiveSet, LatentOrder
from hubsae.kernels.linear import linear
from hubsae.train import aux
from hubsae.train.dense import DenseCodes
from hubsae.train.parallel import Solo
from hubsae.train.select import Selected, select
from hubsae.train.state import Bank, Cell


class Forward(NamedTuple):
    """A batch through the bank, up to the losses."""

    inputs: Tensor
    """[cells * B, d] x - c of each cell."""
    residuals: Tensor
    """[residual rows, d] gradient of the loss with respect to each reconstruction."""
    selected: list[Selected]
    entries: LatentOrder
    base: list[int]
    """First residual row of each live cell."""
    x_rows: Tensor
    """[nnz] rows of `inputs` in latent order; the entries' own rows unless there are matryoshka cells."""
    losses: Tensor
    """[live cells] reconstruction loss, in units of the config's `loss`."""
    mse: Tensor
    """[live cells]"""
    batch: Tensor
    target: Tensor
    """[B, d_out] what is to be reconstructed: the batch itself, or a transcoder's output."""


def forward(bank: Bank, batch: Tensor, comm: Solo, rows_in_all: int, target: Tensor | None = None) -> Forward:
    """Encode, select, decode. `batch` [B, d]; `rows_in_all` counts all ranks and parts; `target` is a transcoder's."""
    cells = bank.live
    B = batch.shape[0]
    target = batch if target is None else target
    inputs = _centred(bank, batch)
    parts = inputs.split(B)
    selected = [select(cell, xc, comm, rows_in_all) for cell, xc in zip(cells, parts, strict=True)]

    base, rows, latents, values = [], [], [], []
    total = 0
    by_group = any(len(cell.prefixes) > 1 for cell in cells)
    for i, (cell, s) in enumerate(zip(cells, selected, strict=True)):
        base.append(total)
        row = s.rows
        if len(cell.prefixes) > 1:
            edges = torch.tensor(cell.prefixes[:-1], device=row.device)
            group = torch.bucketize(s.latents + cell.offset, edges, right=True)
            row = group * B + row
            order = torch.sort(row, stable=True).indices
            s = selected[i] = s._replace(rows=s.rows[order], latents=s.latents[order], values=s.values[order])
            row = row[order]
        rows.append(row + total if total else row)
        latents.append(s.latents + cell.low if cell.low else s.latents)
        values.append(s.values)
        total += B * len(cell.prefixes)
    k = cells[0].config.k
    fixed = len(cells) == 1 and not by_group and k is not None and values[0].numel() == B * k
    if fixed and cells[0].config.architecture == "topk":
        active = ActiveSet.from_topk(values[0].view(B, k), latents[0].view(B, k), bank.n)
    else:
        active = ActiveSet.from_entries(torch.cat(rows), torch.cat(latents), torch.cat(values), total, bank.n)
    out = comm.sum_latents(cpu.decode(active, to_gather(cells, bank.W_dec)))  # [residual rows, d]
    plain = all(c.config.pre_bias == "tied" and c.config.loss != "fvu" for c in cells)
    if plain and not by_group and all(s.dense is None for s in selected):
        losses, mse = _residuals_of_all(cells, out, inputs, rows_in_all)
    else:
        found = []
        for i, (cell, s, start) in enumerate(zip(cells, selected, base, strict=True)):
            mine = out[start : start + B * len(cell.prefixes)].view(len(cell.prefixes), B, bank.d_out)
            if s.dense is not None:
                mine[0] += comm.sum_latents(s.dense.decode())
            rest = parts[i] if cell.config.pre_bias == "tied" else target - cell.vectors["b_dec"]
            if cell.config.skip:
                rest -= skipped(cell, batch)
            found.append(_residuals(cell, mine, target, rest, rows_in_all, comm))
        losses, mse = (torch.stack(column) for column in zip(*found, strict=True))
    ordered = active.by_latent()
    order = ordered.rows
    if by_group:
        x_rows = torch.cat([s.rows + i * B for i, s in enumerate(selected)])
        order = x_rows.int()[ordered.order]
    return Forward(inputs, out, selected, ordered, base, order, losses, mse, batch, target)


def to_gather(cells: list[Cell], table: Tensor) -> Tensor:
    """A table as entries gather its rows: in bf16 where the settings allow rounding and the kernels widen it again."""
    rounded = chosen() == "triton" and all(cell.config.precision == "bf16" for cell in cells)
    return table.bfloat16() if rounded else table


def skipped(cell: Cell, x: Tensor) -> Tensor:
    """What a transcoder's skip matrix adds [rows, d_out]."""
    return linear(x, cell.vectors["W_skip"])


def _centred(bank: Bank, x: Tensor) -> Tensor:
    """x - c of every live cell, one under another. [cells * B, d]"""
    cells, (B, d) = bank.live, x.shape
    inputs = torch.empty(len(cells), B, d, device=bank.device, dtype=bank.dtype)
    if len(cells) == len(bank.cells) and all(cell.config.pre_bias == "tied" for cell in cells):
        torch.sub(x, bank.b_dec.unsqueeze(1), out=inputs)
    else:
        for xc, cell in zip(inputs, cells, strict=True):
            if cell.center is None:
                xc.copy_(x)
            else:
                torch.sub(x, cell.center, out=xc)
    return inputs.view(-1, d)


def _residuals_of_all(cells: list[Cell], out: Tensor, inputs: Tensor, rows_in_all: int) -> tuple[Tensor, Tensor]:
    """As `_residuals`, for all cells at once: one prefix each, no dense codes, a loss whose scale is fixed."""
    out -= inputs
    elements = rows_in_all * out.shape[1]
    errors = out.view(len(cells), -1)
    squares = torch.linalg.vector_norm(errors, dim=1).square()
    scales = [(1 if cell.config.loss == "mean" else out.shape[1]) / elements for cell in cells]
    # one number needs no copy to the device, which would wait
    scale = scales[0] if len(set(scales)) == 1 else squares.new_tensor(scales).unsqueeze(1)
    errors *= 2 * scale
    return squares * (scale.view(-1) if isinstance(scale, Tensor) else scale), squares / elements


def _residuals(
    cell: Cell, out: Tensor, target: Tensor, rest: Tensor, rows_in_all: int, comm: Solo
) -> tuple[Tensor, Tensor]:
    """Turn partial reconstructions [prefixes, B, d] into loss gradients, in place; the loss and the mse.

    `rest` is the target without the decoder's bias (and what a skip matrix gives).
    """
    prefixes, _, d = out.shape
    for p in range(prefixes):
        if p:
            out[p] += out[p - 1]
    out -= rest
    elements = rows_in_all * d
    squares = [torch.linalg.vector_norm(out[p]).square() for p in range(prefixes)]
    scale = loss_scale(cell, target, elements, comm)
    loss = sum(squares[1:], squares[0]) * (scale / prefixes)
    mse = squares[-1] / elements
    out *= 2 * scale / prefixes
    for p in range(prefixes - 2, -1, -1):
        out[p] += out[p + 1]
    return loss, mse


def loss_scale(cell: Cell, target: Tensor, elements: int, comm: Solo) -> float | Tensor:
    """What the summed squared error is multiplied by to give the loss."""
    if cell.config.loss == "mean":
        return 1 / elements
    if cell.config.loss == "sum":
        return target.shape[1] / elements
    rows = elements / target.shape[1]
    mean = comm.sum(target.sum(0)) / rows
    return 1 / comm.sum((target - mean).square().sum()).clamp_min(1e-12)


class Signals(NamedTuple):
    """What an update needs from a batch."""

    dz: Tensor
    """[nnz] gradient at each entry's pre-activation, latent order."""
    dots: Tensor
    """[n] <gW_dec[j], W_dec[j]> of the entries, for the projection."""
    vectors: list[dict[str, Tensor]]
    """Gradients of the vectors, per live cell."""
    dense: list[DenseCodes | None]
    aux: list[aux.AuxGradient | None]
    fired: Tensor
    """[n] int64, on how many rows each latent of the bank fired."""
    l0: Tensor
    """[live cells]"""
    aux_loss: list[Tensor | None]
    penalty: list[Tensor | None]


def signals(bank: Bank, f: Forward, comm: Solo, rows_in_all: int) -> Signals:
    """Gradients of entries and vectors; call it before anything is updated."""
    cells, e = bank.live, f.entries
    raw = cpu.entry_dots(bank.W_dec, to_gather(cells, f.residuals), e.rows, e.offsets)  # [nnz]
    dots = cpu.segment_sum(e.values * raw, e.offsets)
    on = e.values > 0
    sizes = [s.rows.numel() for s in f.selected]
    ends = list(itertools.accumulate(sizes))
    owned = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]  # of each cell, in latent order
    signed = [cell.signed for cell in cells]
    dz = raw if all(signed) else raw * on
    if any(signed) and not all(signed):
        for mine in itertools.compress(owned, signed):
            dz[mine] = raw[mine]  # every chosen entry passes its gradient
    penalties: list[Tensor | None] = [None] * len(cells)
    for i, (cell, s) in enumerate(zip(cells, f.selected, strict=True)):
        if cell.config.architecture == "relu" and cell.config.sparsity.l1 and s.dense is None:
            rate = cell.sparsity * cell.config.sparsity.l1 / rows_in_all
            dz[owned[i]] += rate * on[owned[i]]
            penalties[i] = rate * e.values[owned[i]].sum()
    fired = cpu.segment_sum((e.values != 0).to(torch.float64), e.offsets)
    active = cpu.segment_sum(fired, bank.edges)  # [cells] entries of each
    b_enc = cpu.segment_sum(dz, e.offsets)
    hits, value_part = _near(f, raw)
    vectors, auxes, aux_losses = [], [], []
    B = f.inputs.shape[0] // len(cells)
    inputs = f.inputs.split(B)
    one_prefix = all(len(cell.prefixes) == 1 for cell in cells)
    sums = f.residuals.view(len(cells), B, -1).sum(1) if one_prefix else None  # [cells, d]
    for i, (cell, s) in enumerate(zip(cells, f.selected, strict=True)):
        latents = slice(cell.low, cell.high)
        sparsity = cell.config.sparsity
        grads: dict[str, Tensor] = {}
        xc = inputs[i]
        residual = f.residuals[f.base[i] : f.base[i] + B]
        if s.dense is not None:
            rate_of = partial(_rate, cell, comm, rows_in_all)
            fired[latents], penalties[i] = s.dense.backward(xc, residual, rows_in_all, rate_of, grads)
            active[cell.index] = fired[latents].sum()
        elif s.near is not None:
            penalties[i], rate = _rate(cell, comm, rows_in_all, active[cell.index])
            # a rectangle of height 1/bandwidth stands for the step's derivative
            slope = cell.vectors["theta"] * value_part[latents] + rate * hits[latents]
            grads["theta"] = -slope / sparsity.bandwidth
        if "theta" in grads and not sparsity.train_threshold:
            grads["theta"].zero_()
        if "b_enc" not in grads:
            grads["b_enc"] = b_enc[latents]
        grads["b_dec"] = residual.sum(0) if sums is None else sums[i]
        if cell.config.skip:
            grads["W_skip"] = linear(residual.t(), f.batch.t())
        aux_loss = gradient = None
        if s.dead_pre is not None:
            if cell.config.aux is not None and cell.config.aux.target == "full":
                wanted = f.target - skipped(cell, f.batch) if cell.config.skip else f.target
            else:
                wanted = _plain_residual(cell, f, i, B, rows_in_all, comm)
            aux_loss, gradient = aux.gradient(cell, s.dead_pre, xc, wanted, comm, rows_in_all)
            if gradient is not None:
                grads["b_enc"].index_add_(0, gradient.ids, gradient.b_enc)
                if gradient.b_dec is not None:
                    grads["b_dec"] += gradient.b_dec
        center = grads.pop("center", None)
        if cell.config.pre_bias == "tied" and center is None and not comm.splits_latents:
            grads["b_dec"].addmv_(cell.W_enc.t(), grads["b_enc"], alpha=-1)
        elif cell.config.pre_bias != "none":
            if center is None:
                center = -comm.sum_latents(grads["b_enc"] @ cell.W_enc)
            if cell.config.pre_bias == "tied":
                grads["b_dec"] += center
            else:
                grads["b_pre"] = center
        vectors.append(grads)
        auxes.append(gradient)
        aux_losses.append(aux_loss)
    l0 = comm.sum_latents(comm.sum(active)) / rows_in_all
    if len(cells) < len(bank.cells):
        l0 = l0[[cell.index for cell in cells]]
    return Signals(
        dz, dots, vectors, [s.dense for s in f.selected], auxes, fired.to(torch.int64), l0, aux_losses, penalties
    )


def _near(f: Forward, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Per latent, how many of its entries are near their threshold, and the sum of their `raw`; empty without any."""
    if all(s.near is None for s in f.selected):
        return raw[:0], raw[:0]
    near = [s.near if s.near is not None else torch.zeros_like(s.values) for s in f.selected]
    ordered = torch.cat(near).index_select(0, f.entries.order)
    return cpu.segment_sum(ordered, f.entries.offsets), cpu.segment_sum(ordered * raw, f.entries.offsets)


def _rate(cell: Cell, comm: Solo, rows_in_all: int, active: Tensor) -> tuple[Tensor, Tensor | float]:
    return l0_penalty(cell, comm.sum_latents(comm.sum(active.clone())), rows_in_all)


def l0_penalty(cell: Cell, count: Tensor, rows_in_all: int) -> tuple[Tensor, Tensor | float]:
    """The L0 loss, and its derivative by the number of active entries."""
    sparsity = cell.config.sparsity
    coefficient = cell.sparsity * sparsity.l0
    l0 = count / rows_in_all
    if sparsity.l0_target is None:
        return coefficient * l0, coefficient / rows_in_all
    off = l0 / sparsity.l0_target - 1
    return coefficient * off.square(), coefficient * 2 * off / sparsity.l0_target / rows_in_all


def _plain_residual(cell: Cell, f: Forward, i: int, B: int, rows_in_all: int, comm: Solo) -> Tensor:
    """target - x̂ of the whole dictionary, recovered from the loss gradient of the last prefix."""
    prefixes = len(cell.prefixes)
    last = f.residuals[f.base[i] + (prefixes - 1) * B : f.base[i] + prefixes * B]
    scale = loss_scale(cell, f.target, rows_in_all * f.target.shape[1], comm)
    return last * (-prefixes / (2 * scale))
