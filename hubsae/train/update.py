"""The update: weight gradients, projection, Adam and unit norm, one tile of latents at a time.

A tile's rows of W, m and v are read and written once while they are in cache, and its gradient lives only that
long: no gradient of the size of the weights exists. Clipping, accumulation and data-parallel training need the
whole gradient before any weight moves; they `collect` it into stored buffers first (+8 bytes per weight) and then apply
the same tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hubsae.kernels import chosen, cpu
from hubsae.train.config import TrainConfig
from hubsae.train.parallel import Solo
from hubsae.train.state import SHARED, Bank, Cell
from hubsae.train.step import Forward, Signals, to_gather

# elements of one matrix in a tile: with two matrices, their moments and gradients about 8 x 1 MB (measured: flat
# between 256 and 512 rows of 896, slower outside)
TILE_ELEMENTS = 256 * 896


def apply(bank: Bank, f: Forward, s: Signals, moves: Tensor | None = None) -> None:
    """Take one optimiser step straight from a batch's signals; where `moves` is false on the device, nothing moves."""
    cells = bank.live
    for run in _runs(cells, s):
        low, high = run[0].low, run[-1].high
        if chosen() == "triton" and _in_one_kernel(bank, f, s, run, moves):
            continue
        tiles = _tiles(low, high, bank.d_in)
        starts = _starts(f, [*(a for a, _ in tiles), high])
        for i, (a, b) in enumerate(tiles):
            gW_enc, gW_dec, dots = _tile(bank, f, s, run, a, b, starts[i], starts[i + 1])
            _step_matrices(bank, run[0], a, b, gW_enc, gW_dec, dots, moves)
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
        low, high = run[0].low, run[-1].high
        tiles = _tiles(low, high, bank.d_in)
        starts = _starts(f, [*(a for a, _ in tiles), high])
        for i, (a, b) in enumerate(tiles):
            gW_enc, gW_dec, _ = _tile(bank, f, s, run, a, b, starts[i], starts[i + 1])
            g_enc[a:b] += gW_enc
            g_dec[a:b] += gW_dec


def apply_stored(bank: Bank, vectors: list[dict[str, Tensor]], fired: Tensor, comm: Solo) -> list[float | None]:
    """Reduce the stored gradients over ranks, clip, step, and clear them. Returns each live cell's gradient norm.

    `fired` [n] bool says which rows can be other than zero.
    """
    g_enc, g_dec = bank.stored_gradients()
    if comm.splits_rows:
        comm.reduce_rows(fired, g_enc, g_dec)
        for grads in vectors:
            for name in sorted(grads):
                grads[name] = comm.sum(grads[name])
    norms: list[float | None] = []
    for cell, grads in zip(bank.live, vectors, strict=True):
        rows = slice(cell.low, cell.high)
        norm = None
        if cell.config.clip is not None:
            shared = sum(g.double().square().sum() for name, g in grads.items() if name in SHARED)
            own = sum(g.double().square().sum() for name, g in grads.items() if name not in SHARED)
            own = own + _square(g_enc[rows]) + _square(g_dec[rows])
            norm = float((comm.sum_latents(own) + shared).sqrt())
            factor = cell.config.clip / (norm + 1e-6)
            if factor < 1:
                for gradient in (g_enc[rows], g_dec[rows], *grads.values()):
                    gradient *= factor
        norms.append(norm)
        for a, b in _tiles(cell.low, cell.high, bank.d_in):
            _step_matrices(bank, cell, a, b, g_enc[a:b], g_dec[a:b], None)
    _step_vectors(bank.live, vectors)
    g_enc.zero_()
    g_dec.zero_()
    return norms


def _starts(f: Forward, latents: list[int]) -> list[int]:
    """Where latents begin among the entries in latent order."""
    return f.entries.offsets.index_select(0, torch.tensor(latents, device=f.entries.offsets.device)).tolist()


def _square(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix).double().square()


def _tiles(low: int, high: int, d: int) -> list[tuple[int, int]]:
    size = max(1, TILE_ELEMENTS // d)
    return [(a, min(a + size, high)) for a in range(low, high, size)]


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


def _tile(
    bank: Bank, f: Forward, s: Signals, run: list[Cell], a: int, b: int, start: int, end: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of W_enc and W_dec for latents a to b, and <gW_dec, W_dec> by row where known."""
    i = bank.live.index(run[0])
    cell = run[0]
    branch, extra = s.dense[i], s.aux[i]
    if branch is not None:
        gW_enc, gW_dec = branch.tile(a - cell.low, b - cell.low)
        dots = None
    else:
        offsets = f.entries.offsets[a:b] - start
        part = slice(start, end)
        gW_dec = cpu.bag_sum(f.residuals, f.entries.rows[part], offsets, f.entries.values[part])
        gW_enc = cpu.bag_sum(f.inputs, f.x_rows[part], offsets, s.dz[part])
        dots = s.dots[a:b]
    if extra is not None:
        x, y = torch.searchsorted(extra.ids, extra.ids.new_tensor([a - cell.low, b - cell.low])).tolist()
        if y > x:
            ids = extra.ids[x:y] - (a - cell.low)
            gW_enc.index_add_(0, ids, extra.W_enc[x:y])
            gW_dec.index_add_(0, ids, extra.W_dec[x:y])
            dots = None
    return gW_enc, gW_dec, dots


def _step_matrices(
    bank: Bank,
    cell: Cell,
    a: int,
    b: int,
    gW_enc: Tensor,
    gW_dec: Tensor,
    dots: Tensor | None,
    moves: Tensor | None = None,
) -> None:
    W_dec = bank.W_dec[a:b]
    if cell.config.project:
        along = torch.linalg.vecdot(gW_dec, W_dec) if dots is None else dots
        if not cell.unit_rows:
            along = along / torch.linalg.vecdot(W_dec, W_dec).clamp_min_(1e-24)
        gW_dec.addcmul_(W_dec, along.unsqueeze(1), value=-1.0)
    step = cell.step + 1
    _adam(
        cell.config,
        cell.lr,
        [bank.W_enc[a:b], W_dec],
        [gW_enc, gW_dec],
        [bank.m_enc[a:b], bank.m_dec[a:b]],
        [bank.v_enc[a:b], bank.v_dec[a:b]],
        step,
        moves,
    )
    if cell.config.unit_norm:
        norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-12)
        W_dec *= torch.div(bank.row_norms[a:b], norms, out=norms)


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
