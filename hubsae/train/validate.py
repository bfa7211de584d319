"""Metrics of the cells of a run on validation rows: one pass over the data for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hubsae.core.normalizer import Normalizer
from hubsae.train import data, dead
from hubsae.train.crew import Crew
from hubsae.train.parallel import Solo
from hubsae.train.state import Cell


@dataclass
class _Sums:
    """What a pass adds up for one cell."""

    cell: Cell
    fired: Tensor
    """[n] on how many rows each latent fired."""
    squares: float = 0.0


def measure(
    groups: list[list[Cell]],
    val: data.Source,
    prepare: Callable[[Tensor], Tensor],
    space: Normalizer | None,
    comm: Solo,
    crew: Crew,
    *,
    batch: int,
    limit: int,
) -> dict[int, dict[str, float]]:
    """Metrics by cell index, over up to `limit` rows; errors are those of raw activations.

    `groups` go through a batch side by side, `prepare` takes raw rows into training space.
    """
    device = groups[0][0].W_enc.device
    d, scale = val.d, None if space is None else space.std.to(device)
    sums = [[_Sums(cell, torch.zeros_like(cell.since_fired)) for cell in group] for group in groups]
    guesses = [(cell, cell.last_threshold) for group in groups for cell in group]
    total = torch.zeros(d, dtype=torch.float64, device=device)
    spread = torch.zeros_like(total)
    shift: Tensor | None = None
    rows = 0
    for raw in data.every_row(val, min(batch, val.n_rows)):
        x = prepare(raw)

        def add(group: list[_Sums], x: Tensor = x) -> None:
            for one in group:
                out, counts = dead.reconstruct(one.cell, x, comm)
                error = out - x if scale is None else (out - x) * scale
                one.squares += float(error.double().square().sum())
                one.fired += counts

        crew.map(add, sums)
        raw = raw.to(device, torch.float64)
        shift = raw.mean(0) if shift is None else shift  # deviations from a near mean keep their digits
        total += (raw - shift).sum(0)
        spread += (raw - shift).square().sum(0)
        rows += x.shape[0]
        if rows >= limit:
            break
    for cell, guess in guesses:
        cell.last_threshold = guess
    variance = float((spread - total.square() / rows).sum())
    return {
        one.cell.index: {
            "val_mse": one.squares / (rows * d),
            "val_fvu": one.squares / max(variance, 1e-30),
            "val_l0": float(comm.sum_latents(one.fired.sum())) / rows,
            "val_dead": 1 - float(comm.sum_latents((one.fired > 0).sum())) / one.cell.total,
            "val_rows": rows,
        }
        for group in sums
        for one in group
    }
