"""A new start for dead latents, from tokens that the SAE reconstructs badly."""

from __future__ import annotations

import torch
from torch import Tensor

from hubsae.activations.activation_set import Batch
from hubsae.kernels import cpu
from hubsae.kernels.active import ActiveSet
from hubsae.train.parallel import Solo
from hubsae.train.select import select
from hubsae.train.state import Cell
from hubsae.train.step import skipped


def reconstruct(cell: Cell, x: Tensor, comm: Solo) -> tuple[Tensor, Tensor]:
    """x̂ of a batch in training space [B, d_out], and on how many rows each latent fired [n]."""
    center = cell.center
    xc = x if center is None else x - center
    selected = select(cell, xc, comm, x.shape[0])
    if selected.dense is not None:
        out = selected.dense.decode()
        fired = (selected.dense.z.detach() > 0).sum(0)
    else:
        active = ActiveSet.from_entries(selected.rows, selected.latents, selected.values, x.shape[0], cell.n)
        out = cpu.decode(active, cell.W_dec)
        fired = torch.bincount(active.latents[active.values != 0], minlength=cell.n)
    out = comm.sum_latents(out) + cell.vectors["b_dec"]
    return out + skipped(cell, x) if cell.config.skip else out, fired


def resample(cell: Cell, tokens: Batch, comm: Solo) -> int:
    """Restart the dead latents of a cell from `tokens` in training space; how many there were.

    A transcoder's read what such a token holds at the input and write what it holds at the output.
    """
    settings = cell.config.dead.resample
    assert settings is not None
    ids = cell.dead().nonzero().view(-1)
    counts = comm.gather_counts(ids.numel()) if comm.splits_latents else [ids.numel()]
    total = sum(counts)
    if total == 0:
        return 0
    x, target = tokens.x, tokens.x if tokens.target is None else tokens.target
    parts = zip(x.split(1024), target.split(1024), strict=True)
    loss = torch.cat([(reconstruct(cell, part, comm)[0] - y).square().mean(1) for part, y in parts]).cpu()
    if settings.method == "worst_tokens":
        pool = loss.topk(max(1, loss.numel() // 4)).indices
        draws = torch.randint(pool.numel(), (total,), generator=cell.generator)
        if total <= pool.numel():
            draws = torch.randperm(pool.numel(), generator=cell.generator)[:total]
        chosen = pool[draws]
    else:
        weights = loss.double().square()
        chosen = torch.multinomial(weights, total, replacement=True, generator=cell.generator)
    start = sum(counts[: comm.rank]) if comm.splits_latents else 0
    here = chosen[start : start + ids.numel()].to(x.device)
    centred = settings.method == "anthropic"
    unit = _unit(x[here], cell.center if centred else None)
    written = unit if tokens.target is None else _unit(target[here], cell.vectors["b_dec"] if centred else None)
    cell.W_dec[ids] = written
    cell.row_norms[ids] = 1
    if settings.method == "anthropic":
        alive = torch.ones(cell.n, dtype=torch.bool, device=ids.device)
        alive[ids] = False
        norms = cell.W_enc[alive].norm(dim=1)
        cell.W_enc[ids] = unit * (0.2 * norms.mean() if norms.numel() else 1.0)
        for matrix in (cell.m_enc, cell.v_enc, cell.m_dec, cell.v_dec):
            matrix[ids] = 0
        for moments in (cell.m, cell.v):
            moments["b_enc"][ids] = 0
    else:
        cell.W_enc[ids] = unit
    cell.vectors["b_enc"][ids] = 0
    cell.since_fired[ids] = 0
    cell.dead_last_epoch[ids] = False
    return total


def _unit(rows: Tensor, center: Tensor | None) -> Tensor:
    rows = rows if center is None else rows - center
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
