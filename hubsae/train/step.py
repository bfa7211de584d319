"""The training step, written by hand: one dense product (the encoder), everything after it on the active entries.

For a bank of cells and one batch:

1. `forward`: per cell, encode and select; then decode all cells at once and take the loss.
2. `signals`: what the update needs: the gradient of every entry, the biases' gradients, AuxK's.
3. `update.apply`: weight gradients, projection, Adam and norm, a tile of latents at a time.

With E = x̂ - x and G = dloss/dx̂ the gradients are  dz = <G[row], W_dec[latent]>,  gW_dec[j] = Σ z G[row],
gW_enc[j] = Σ dz (x - c)[row],  gb_enc[j] = Σ dz,  gc = -gb_enc @ W_enc:  no other product is needed.
`reference.py` in kernels says the same in a few dense lines with autograd; tests hold the two together.

Rows of G and rows of x are numbered over the bank: cell i owns the rows from i * B. A matryoshka cell has one
residual per prefix, hence B rows for each; an entry then belongs to the group of its latent, whose
gradient is the sum over all prefixes that contain it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hubsae.kernels import cpu
from hubsae.kernels.active import ActiveSet, LatentOrder
from hubsae.kernels.linear import linear
from hubsae.kernels.select import halves, largest, nonzero, product_topk, topk
from hubsae.train import aux
from hubsae.train.branches import Branch, DenseBranch, GatedBranch
from hubsae.train.parallel import Solo
from hubsae.train.state import Bank, Cell

# above this share of active entries the dense products win (measured: even at 20 %)
DENSE_ABOVE = 0.18
# rows encoded at once, where the whole block of pre-activations would not stay in cache
CHUNK_ROWS = 256
CHUNK_ELEMENTS = 1 << 21
# batches multiplied whole after the search by candidates found too many
WHOLE_BATCHES = 1000


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
    dense: Branch | None = None
    """Set instead of entries where the codes are too dense for them."""


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
    losses: list[Tensor]
    """Reconstruction loss per live cell, in units of the config's `loss`."""
    mse: list[Tensor]
    batch: Tensor | list[Tensor]


def forward(bank: Bank, batch: Tensor | list[Tensor], comm: Solo, rows_in_all: int) -> Forward:
    """Encode, select, decode. `batch` [B, d], or one per live cell; `rows_in_all` counts all ranks and parts."""
    cells = bank.live
    batches = batch if isinstance(batch, list) else [batch] * len(cells)
    B = batches[0].shape[0]
    inputs = torch.empty(len(cells) * B, bank.d_in, device=bank.device, dtype=bank.dtype)
    selected = []
    for i, (cell, x) in enumerate(zip(cells, batches, strict=True)):
        xc = inputs[i * B : (i + 1) * B]
        if cell.center is None:
            xc.copy_(x)
        else:
            torch.sub(x, cell.center, out=xc)
        selected.append(select(cell, xc, comm, rows_in_all))

    base, rows, x_rows, latents, values = [], [], [], [], []
    total = 0
    by_group = False
    for i, (cell, s) in enumerate(zip(cells, selected, strict=True)):
        base.append(total)
        row = s.rows
        if len(cell.prefixes) > 1:
            by_group = True
            edges = torch.tensor(cell.prefixes[:-1], device=row.device)
            group = torch.bucketize(s.latents + cell.offset, edges, right=True)
            row = group * B + row
            order = torch.sort(row, stable=True).indices
            s = selected[i] = s._replace(rows=s.rows[order], latents=s.latents[order], values=s.values[order])
            row = row[order]
        rows.append(row + total if total else row)
        x_rows.append(s.rows + i * B if i else s.rows)
        latents.append(s.latents + cell.low if cell.low else s.latents)
        values.append(s.values)
        total += B * len(cell.prefixes)
    k = cells[0].config.k
    fixed = len(cells) == 1 and not by_group and k is not None and values[0].numel() == B * k
    if fixed and cells[0].config.architecture == "topk":
        active = ActiveSet.from_topk(values[0].view(B, k), latents[0].view(B, k), bank.n)
    else:
        active = ActiveSet.from_entries(torch.cat(rows), torch.cat(latents), torch.cat(values), total, bank.n)
    out = comm.sum_latents(cpu.decode(active, bank.W_dec))  # [residual rows, d]
    losses, mse = [], []
    for cell, s, start, x in zip(cells, selected, base, batches, strict=True):
        mine = out[start : start + B * len(cell.prefixes)].view(len(cell.prefixes), B, bank.d_in)
        if s.dense is not None:
            mine[0] += comm.sum_latents(s.dense.decode(cell))
        tied = cell.config.pre_bias == "tied"
        target = inputs[len(losses) * B : (len(losses) + 1) * B] if tied else x - cell.vectors["b_dec"]
        loss, last = _residuals(cell, mine, x, target, rows_in_all, comm)
        losses.append(loss)
        mse.append(last)
    entries = active.by_latent()
    order = torch.cat(x_rows).int()[entries.order] if by_group else entries.rows
    return Forward(inputs, out, selected, entries, base, order, losses, mse, batch)


def _residuals(
    cell: Cell, out: Tensor, x: Tensor, target: Tensor, rows_in_all: int, comm: Solo
) -> tuple[Tensor, Tensor]:
    """Turn partial reconstructions [prefixes, B, d] into loss gradients, in place; the loss and the mse.

    `target` is x without the decoder's bias.
    """
    prefixes, _, d = out.shape
    for p in range(prefixes):
        if p:
            out[p] += out[p - 1]
    out -= target
    elements = rows_in_all * d
    squares = [torch.linalg.vector_norm(out[p]).square() for p in range(prefixes)]
    scale = loss_scale(cell, x, elements, comm)
    loss = sum(squares[1:], squares[0]) * (scale / prefixes)
    mse = squares[-1] / elements
    out *= 2 * scale / prefixes
    for p in range(prefixes - 2, -1, -1):
        out[p] += out[p + 1]
    return loss, mse


def loss_scale(cell: Cell, x: Tensor, elements: int, comm: Solo) -> float | Tensor:
    """What the summed squared error is multiplied by to give the loss."""
    if cell.config.loss == "mean":
        return 1 / elements
    if cell.config.loss == "sum":
        return x.shape[1] / elements
    rows = elements / x.shape[1]
    mean = comm.sum(x.sum(0)) / rows
    return 1 / comm.sum((x - mean).square().sum()).clamp_min(1e-12)


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
        return Selected(*_none(xc), dense=GatedBranch(cell, xc))
    dead = aux.dead_ids(cell, comm)
    step = B if B * cell.n <= CHUNK_ELEMENTS else CHUNK_ROWS
    if arch == "topk" and dead is None and (found := _by_candidates(cell, xc)) is not None:
        rows, latents, values = _topk_entries(cell, *found, 0, comm)
        return Selected(rows, latents, values)
    if arch == "batch_topk":
        return _batch_topk(cell, xc, step, dead, comm, rows_in_all)
    parts, dead_pre, is_dense = [], [], None
    for start in range(0, B, step):
        pre = encode(cell, xc[start : start + step])
        if dead is not None:
            dead_pre.append(pre.index_select(1, dead))
        if arch in ("jumprelu", "relu"):
            theta = cell.vectors["log_threshold"].exp() if arch == "jumprelu" else None
            edge = theta - cell.config.sparsity.bandwidth / 2 if theta is not None else 0.0
            mask = pre > edge
            if is_dense is None:
                is_dense = int(torch.count_nonzero(mask)) > DENSE_ABOVE * mask.numel()
            parts.append(pre if is_dense else _entries(cell, pre, mask, theta, start))
        else:
            parts.append(_topk_entries(cell, *topk(pre, min(cell.config.k or 0, cell.n)), start, comm))
    kept_dead = torch.cat(dead_pre) if dead_pre else None
    if is_dense:
        pre = parts[0] if len(parts) == 1 else torch.cat(parts)
        theta = cell.vectors["log_threshold"].exp() if arch == "jumprelu" else None
        codes = DenseBranch(pre, theta, cell.config.sparsity.bandwidth)
        return Selected(*_none(xc), dense=codes, dead_pre=kept_dead)
    rows, latents, values, near = _joined(parts)
    return Selected(rows, latents, values, near, kept_dead)


def _none(xc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.empty(0, dtype=torch.int64, device=xc.device)
    return empty, empty, xc.new_empty(0)


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if len(parts) == 1:
        joined = parts[0]
    else:
        joined = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return joined[0], joined[1], joined[2], joined[3] if len(joined) > 3 else None


def _by_candidates(cell: Cell, xc: Tensor) -> tuple[Tensor, Tensor] | None:
    """The k largest of each row without a product in float32, where that pays and the data let it."""
    k = min(cell.config.k or 0, cell.n)
    if cell.config.precision != "fp32" or cell.tokens < cell.whole_until or not halves(xc, cell.W_enc, k):
        return None
    found = product_topk(xc, cell.W_enc, cell.vectors["b_enc"], k)
    if found is None:
        cell.whole_until = cell.tokens + WHOLE_BATCHES * xc.shape[0]
    return found


def _topk_entries(cell: Cell, values: Tensor, latents: Tensor, start: int, comm: Solo) -> tuple[Tensor, ...]:
    rows = torch.arange(start, start + values.shape[0], device=values.device).repeat_interleave(values.shape[1])
    latents, keep = latents.reshape(-1), comm.keep_topk(values, cell.config.k or 0)
    values = (values if cell.signed else values.relu_()).reshape(-1)
    if keep is not None:
        keep = keep.reshape(-1)
        rows, latents, values = rows[keep], latents[keep], values[keep]
    return rows, latents, values


def _entries(cell: Cell, pre: Tensor, mask: Tensor, theta: Tensor | None, start: int) -> tuple[Tensor, ...]:
    rows, latents = nonzero(mask)
    values = pre.reshape(-1)[rows * pre.shape[1] + latents]
    if theta is None:
        return rows + start, latents, values
    at = theta[latents]
    near = ((values - at).abs() < cell.config.sparsity.bandwidth / 2).to(values.dtype)
    return rows + start, latents, torch.where(values > at, values, 0), near


def _batch_topk(cell: Cell, xc: Tensor, step: int, dead: Tensor | None, comm: Solo, rows_in_all: int) -> Selected:
    """The k * tokens largest entries of the whole batch, over all ranks.

    A share of the last batch's threshold comes first as a filter; where it leaves too few, everything is searched.
    """
    count = (cell.config.k or 0) * rows_in_all
    floor = 0.85 * cell.last_threshold
    while True:
        parts, dead_pre = [], []
        for start in range(0, xc.shape[0], step):
            pre = encode(cell, xc[start : start + step])
            if dead is not None:
                dead_pre.append(pre.index_select(1, dead))
            rows, latents = nonzero(pre > floor)
            parts.append((rows + start, latents, pre.view(-1)[rows * pre.shape[1] + latents]))
        rows, latents, values, _ = _joined(parts)
        found = comm.sum_latents(comm.sum(torch.tensor(values.numel(), device=values.device)))
        if floor <= 0 or int(found) >= count:
            break
        floor = 0.0
    keep = comm.batch_threshold(values, count)
    if keep is None and values.numel() > count:
        keep = largest(values, count)
    if keep is not None:
        rows, latents, values = rows[keep], latents[keep], values[keep]
    lowest = comm.lowest(values.min() if values.numel() else values.new_tensor(torch.inf))
    cell.last_threshold = 0.0 if lowest == torch.inf else lowest
    return Selected(rows, latents, values, None, torch.cat(dead_pre) if dead_pre else None)


class Signals(NamedTuple):
    """What an update needs from a batch."""

    dz: Tensor
    """[nnz] gradient at each entry's pre-activation, latent order."""
    dots: Tensor
    """[n] <gW_dec[j], W_dec[j]> of the entries, for the projection."""
    vectors: list[dict[str, Tensor]]
    """Gradients of the vectors, per live cell."""
    dense: list[Branch | None]
    aux: list[aux.AuxGradient | None]
    fired: list[Tensor]
    """[n] on how many rows each latent fired, per live cell."""
    l0: list[Tensor]
    aux_loss: list[Tensor | None]
    penalty: list[Tensor | None]


def signals(bank: Bank, f: Forward, comm: Solo, rows_in_all: int) -> Signals:
    """Gradients of entries and vectors; call it before anything is updated."""
    cells, e = bank.live, f.entries
    raw = cpu.entry_dots(bank.W_dec, f.residuals, e.rows, e.offsets)  # [nnz]
    dots = cpu.segment_sum(e.values * raw, e.offsets)
    dz = raw
    on = e.values > 0
    if not any(cell.signed for cell in cells):
        dz = raw * on
    bounds = e.offsets[torch.tensor([[cell.low, cell.high] for cell in cells])].tolist()
    entries_before = 0
    vectors, auxes, fired, l0s, aux_losses, penalties = [], [], [], [], [], []
    B = f.inputs.shape[0] // len(cells)
    fired_all = cpu.segment_sum((e.values != 0).to(torch.float64), e.offsets)
    for i, (cell, s) in enumerate(zip(cells, f.selected, strict=True)):
        mine = slice(*bounds[i])
        arch, sparsity = cell.config.architecture, cell.config.sparsity
        if cell.signed:
            pass  # every chosen entry passes its gradient
        elif any(other.signed for other in cells):
            dz[mine] = raw[mine] * on[mine]
        grads: dict[str, Tensor] = {}
        penalty = None
        counts = fired_all[cell.low : cell.high]
        xc = f.inputs[i * B : (i + 1) * B]
        residual = f.residuals[f.base[i] : f.base[i] + B]
        if s.dense is not None:
            rate_of = partial(_rate, cell, comm, rows_in_all)
            counts, penalty = s.dense.backward(cell, xc, residual, rows_in_all, rate_of, grads)
        elif arch == "relu" and sparsity.l1:
            rate = cell.sparsity * sparsity.l1 / rows_in_all
            dz[mine] += rate * on[mine]
            penalty = rate * e.values[mine].sum()
        elif arch == "jumprelu" and s.near is not None:
            order = e.order[mine] - entries_before
            near = s.near[order]
            offsets = e.offsets[cell.low : cell.high + 1] - bounds[i][0]
            hits = cpu.segment_sum(near, offsets)
            value_part = cpu.segment_sum(near * raw[mine], offsets)
            penalty, rate = _rate(cell, comm, rows_in_all, counts.sum())
            theta = cell.vectors["log_threshold"].exp()
            # d/d log θ = θ d/dθ, with a rectangle of height 1/bandwidth for the step's derivative
            grads["log_threshold"] = -(theta / sparsity.bandwidth) * (theta * value_part + rate * hits)
        if "log_threshold" in grads and not sparsity.train_threshold:
            grads["log_threshold"] = torch.zeros_like(grads["log_threshold"])
        if "b_enc" not in grads:
            grads["b_enc"] = cpu.segment_sum(dz[mine], e.offsets[cell.low : cell.high + 1] - bounds[i][0])
        grads["b_dec"] = residual.sum(0)
        aux_loss = gradient = None
        if s.dead_pre is not None:
            target = _plain_residual(cell, f, i, B, rows_in_all, comm)
            aux_loss, gradient = aux.gradient(cell, s.dead_pre, xc, target, comm, rows_in_all)
            if gradient is not None:
                grads["b_enc"].index_add_(0, gradient.ids, gradient.b_enc)
                if gradient.b_dec is not None:
                    grads["b_dec"] += gradient.b_dec
        center = grads.pop("center", None)
        if cell.config.pre_bias != "none":
            if center is None:
                center = -comm.sum_latents(grads["b_enc"] @ cell.W_enc)
            if cell.config.pre_bias == "tied":
                grads["b_dec"] += center
            else:
                grads["b_pre"] = center
        entries_before += s.rows.numel()
        vectors.append(grads)
        auxes.append(gradient)
        fired.append(counts.to(torch.int64))
        l0s.append(comm.sum_latents(comm.sum(counts.sum().clone())) / rows_in_all)
        aux_losses.append(aux_loss)
        penalties.append(penalty)
    branches = [s.dense for s in f.selected]
    return Signals(dz, dots, vectors, branches, auxes, fired, l0s, aux_losses, penalties)


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
    """x - x̂ of the whole dictionary, recovered from the loss gradient of the last prefix."""
    x = f.batch[i] if isinstance(f.batch, list) else f.batch
    prefixes = len(cell.prefixes)
    last = f.residuals[f.base[i] + (prefixes - 1) * B : f.base[i] + prefixes * B]
    scale = loss_scale(cell, x, rows_in_all * x.shape[1], comm)
    return last * (-prefixes / (2 * scale))
