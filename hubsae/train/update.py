"""The update: weight gradients, projection, Adam and unit norm, one tile of latents at a time.

A tile's rows of W, m and v are read and written once while they are in cache, and its gradient lives only that
long: no gradient of the size of the weights exists. All tiles of the encoder come before those of the decoder, so
that rows are gathered from one table at a time, the inputs or the residuals. Clipping, accumulation and data-parallel
training need the whole gradient before any weight moves; they `collect` it into stored buffers first (+8 bytes per
weight) and then apply the same tiles.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubsae.kernels import chosen, cpu
from hubsae.train.config import TrainConfig
from hubsae.train.parallel import Solo
from hubsae.train.state import SHARED, Bank, Cell
from hubsae.train.step import Forward, Signals, to_gather

# elements of a tile: its rows, their moments and the gradient are 4 x 2 MB
TILE_ELEMENTS = 512 * 896


def apply(bank: Bank, f: Forward, s: Signals, moves: Tensor | None = None) -> None:
    """Take one optimiser step straight from a batch's signals; where `moves` is false on the device, nothing moves."""
    cells = bank.live
    for run in _runs(cells, s):
        if chosen() == "triton" and _in_one_kernel(bank, f, s, run, moves):
            continue
        tiles = _entry_tiles(f, run[0].low, run[-1].high, bank.d_in)
        for tile in tiles:
            _step_encoder(bank, run[0], tile.rows, _encoder_gradient(bank, f, s, run, tile), moves)
        for tile in tiles:
            _step_decoder(bank, run[0], tile.rows, *_decoder_gradient(bank, f, s, run, tile), moves)
    _step_vectors(cells, s.vectors, moves)


def _in_one_kernel(bank: Bank, f: Forward, s: Signals, run: list[Cell], moves: Tensor | None) -> bool:
    """Update the rows of neighbouring cells by a Triton program each; False where that cannot be."""
    from hubsae.kernels import triton_update

    cell, (i, rows) = run[0], (bank.live.index(run[0]), slice(run[0].low, run[-1].high))
    if s.dense[i] is not None or s.aux[i] is not None or not triton_update.fits(bank.W_enc, bank.W_dec):
        return False
    c = cell.config
    scalars = triton_update.scalars(cell.lr, cell.step + 1, c.betas, moves)
    offsets = f.entries.offsets[rows.start : rows.stop + 1]
    options = {"betas": c.betas, "eps": c.eps}
    state = (bank.W_enc[rows], bank.m_enc[rows], bank.v_enc[rows])
    triton_update.update(state, to_gather(run, f.inputs), f.x_rows, s.dz, offsets, scalars, **options)
    state = (bank.W_dec[rows], bank.m_dec[rows], bank.v_dec[rows])
    norms = bank.row_norms[rows] if c.unit_norm else None
    options |= {"project": c.project, "unit_rows": cell.unit_rows, "norms": norms}
    triton_update.update(
        state, to_gather(run, f.residuals), f.entries.rows, f.entries.values, offsets, scalars, **options
    )
    return True


def collect(bank: Bank, f: Forward, s: Signals) -> None:
    """Add a batch's weight gradients to the stored ones."""
    g_enc, g_dec = bank.stored_gradients()
    for run in _runs(bank.live, s):
        tiles = _entry_tiles(f, run[0].low, run[-1].high, bank.d_in)
        for tile in tiles:
            g_enc[tile.rows] += _encoder_gradient(bank, f, s, run, tile)
        for tile in tiles:
            g_dec[tile.rows] += _decoder_gradient(bank, f, s, run, tile)[0]


def apply_stored(bank: Bank, vectors: list[dict[str, Tensor]], fired: Tensor, comm: Solo) -> None:
    """Reduce the stored gradients over ranks, clip, step, and clear them.

    `fired` [n] bool says which rows can be other than zero.
    """
    g_enc, g_dec = bank.stored_gradients()
    if comm.splits_rows:
        comm.reduce_rows(fired, g_enc, g_dec)
        for grads in vectors:
            for name in sorted(grads):
                grads[name] = comm.sum(grads[name])
    for cell, grads in zip(bank.live, vectors, strict=True):
        rows = slice(cell.low, cell.high)
        if cell.config.clip is not None:
            shared = sum(g.double().square().sum() for name, g in grads.items() if name in SHARED)
            own = sum(g.double().square().sum() for name, g in grads.items() if name not in SHARED)
            own = own + _square(g_enc[rows]) + _square(g_dec[rows])
            norm = float((comm.sum_latents(own) + shared).sqrt())
            factor = cell.config.clip / (norm + 1e-6)
            if factor < 1:
                for gradient in (g_enc[rows], g_dec[rows], *grads.values()):
                    gradient *= factor
        for tile in _tiles(cell.low, cell.high, bank.d_in):
            _step_encoder(bank, cell, tile, g_enc[tile])
            _step_decoder(bank, cell, tile, g_dec[tile], None)
    _step_vectors(bank.live, vectors)
    g_enc.zero_()
    g_dec.zero_()


def _square(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix).double().square()


class _Tile(NamedTuple):
    """Rows of the weights, and the entries in latent order that belong to them."""

    rows: slice
    entries: slice


def _tiles(low: int, high: int, d: int) -> list[slice]:
    size = max(1, TILE_ELEMENTS // d)
    return [slice(a, min(a + size, high)) for a in range(low, high, size)]


def _entry_tiles(f: Forward, low: int, high: int, d: int) -> list[_Tile]:
    tiles, offsets = _tiles(low, high, d), f.entries.offsets
    edges = torch.tensor([low, *(rows.stop for rows in tiles)], device=offsets.device)
    entries = itertools.pairwise(offsets.index_select(0, edges).tolist())
    return [_Tile(rows, slice(*edge)) for rows, edge in zip(tiles, entries, strict=True)]


def _runs(cells: list[Cell], s: Signals) -> list[list[Cell]]:
    """Neighbouring cells that one tile may span: same optimiser settings, nothing but entries."""
    runs: list[list[Cell]] = []
    last = None
    for i, cell in enumerate(cells):
        c = cell.config
        alone = s.aux[i] is not None or s.dense[i] is not None
        key = None if alone else (cell.lr, c.betas, c.eps, c.unit_norm, cell.unit_rows, c.project, cell.tokens)
        if runs and key is not None and key == last and runs[-1][-1].high == cell.low:
            runs[-1].append(cell)
        else:
            runs.append([cell])
        last = key
    return runs


def _encoder_gradient(bank: Bank, f: Forward, s: Signals, run: list[Cell], tile: _Tile) -> Tensor:
    """Of W_enc, for the latents of a tile."""
    cell, i = run[0], bank.live.index(run[0])
    if (branch := s.dense[i]) is not None:
        gradient = branch.encoder_gradient(_within(tile.rows, cell))
    else:
        offsets = f.entries.offsets[tile.rows] - tile.entries.start
        gradient = cpu.bag_sum(f.inputs, f.x_rows[tile.entries], offsets, s.dz[tile.entries])
    if (extra := s.aux[i]) is not None:
        ids, part = extra.of(_within(tile.rows, cell))
        gradient.index_add_(0, ids, extra.W_enc[part])
    return gradient


def _decoder_gradient(bank: Bank, f: Forward, s: Signals, run: list[Cell], tile: _Tile) -> tuple[Tensor, Tensor | None]:
    """Of W_dec, for the latents of a tile, and <gradient, W_dec> by row where known."""
    cell, i = run[0], bank.live.index(run[0])
    if (branch := s.dense[i]) is not None:
        gradient, dots = branch.decoder_gradient(_within(tile.rows, cell)), None
    else:
        offsets = f.entries.offsets[tile.rows] - tile.entries.start
        entries = f.entries.rows[tile.entries], offsets, f.entries.values[tile.entries]
        gradient, dots = cpu.bag_sum(f.residuals, *entries), s.dots[tile.rows]
    if (extra := s.aux[i]) is not None:
        ids, part = extra.of(_within(tile.rows, cell))
        if ids.numel():
            gradient.index_add_(0, ids, extra.W_dec[part])
            dots = None
    return gradient, dots


def _within(rows: slice, cell: Cell) -> slice:
    """Rows of the bank as latents of the cell."""
    return slice(rows.start - cell.low, rows.stop - cell.low)


def _step_encoder(bank: Bank, cell: Cell, rows: slice, gradient: Tensor, moves: Tensor | None = None) -> None:
    state = [bank.W_enc[rows]], [gradient], [bank.m_enc[rows]], [bank.v_enc[rows]]
    _adam(cell.config, cell.lr, *state, cell.step + 1, moves)


def _step_decoder(
    bank: Bank, cell: Cell, rows: slice, gradient: Tensor, dots: Tensor | None, moves: Tensor | None = None
) -> None:
    W_dec = bank.W_dec[rows]
    if cell.config.project:
        along = torch.linalg.vecdot(gradient, W_dec) if dots is None else dots
        if not cell.unit_rows:
            along = along / torch.linalg.vecdot(W_dec, W_dec).clamp_min_(1e-24)
        gradient.addcmul_(W_dec, along.unsqueeze(1), value=-1.0)
    _adam(cell.config, cell.lr, [W_dec], [gradient], [bank.m_dec[rows]], [bank.v_dec[rows]], cell.step + 1, moves)
    if cell.config.unit_norm:
        norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-12)
        scale = torch.div(bank.row_norms[rows], norms, out=norms)
        W_dec *= scale if moves is None else torch.where(moves, scale, 1.0)


def _step_vectors(cells: list[Cell], vectors: list[dict[str, Tensor]], moves: Tensor | None = None) -> None:
    """Adam on the biases and thresholds; one call for all cells of the same settings."""
    groups: dict[tuple[Any, ...], list[tuple[Cell, str, Tensor]]] = {}
    for cell, grads in zip(cells, vectors, strict=True):
        cell.step += 1
        c = cell.config
        for name in sorted(grads):
            scale = c.sparsity.threshold_lr if name == "theta" else 1.0
            groups.setdefault((cell.lr * scale, c.betas, c.eps, cell.tokens), []).append((cell, name, grads[name]))
    for (lr, *_), members in groups.items():
        first = members[0][0]
        _adam(
            first.config,
            lr,
            [cell.vectors[name] for cell, name, _ in members],
            [gradient for *_, gradient in members],
            [cell.m[name] for cell, name, _ in members],
            [cell.v[name] for cell, name, _ in members],
            first.step,
            moves,
        )
    for cell in cells:
        if "theta" in cell.vectors:
            cell.vectors["theta"].clamp_(min=0)  # below zero the gate would let negative values pass


def _adam(
    c: TrainConfig,
    lr: float | Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    step: Tensor,
    moves: Tensor | None,
) -> None:
    """Fused Adam in place; `step` counts this step already, and where `moves` is false nothing moves."""
    torch._fused_adam_(
        params,
        grads,
        m,
        v,
        [],
        [step] * len(params),
        lr=lr,
        beta1=c.betas[0],
        beta2=c.betas[1],
        weight_decay=0.0,
        eps=c.eps,
        amsgrad=False,
        maximize=False,
        found_inf=None if moves is None else (~moves).float(),
    )
