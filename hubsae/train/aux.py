"""AuxK: dead latents reconstruct what the living left over, so that they get a gradient and come back.

Only the dead take part, compacted: four products of [tokens, n_dead] by d, none by the whole dictionary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hubsae.kernels.linear import linear
from hubsae.train.parallel import Solo
from hubsae.train.state import Cell


class AuxGradient(NamedTuple):
    """Gradients of the auxiliary loss, for the dead latents only."""

    ids: Tensor
    """[n_dead] latents of the cell, rising."""
    W_enc: Tensor
    """[n_dead, d]"""
    W_dec: Tensor
    """[n_dead, d]"""
    b_enc: Tensor
    """[n_dead]"""
    b_dec: Tensor | None
    """[d], only where the target is the full activation."""

    def of(self, latents: slice) -> tuple[Tensor, slice]:
        """The dead among some latents, counted from the first of these, and their rows here."""
        low, high = torch.searchsorted(self.ids, self.ids.new_tensor([latents.start, latents.stop])).tolist()
        return self.ids[low:high] - latents.start, slice(low, high)


def dead_ids(cell: Cell, comm: Solo) -> Tensor | None:
    """The dead latents of a cell [n_dead], or None where AuxK has nothing to do on any rank."""
    if cell.config.aux is None or cell.config.aux.coefficient == 0:
        return None
    ids = cell.dead().nonzero().view(-1)
    counts = comm.gather_counts(ids.numel()) if comm.splits_latents else [ids.numel()]
    return ids if sum(counts) else None


def gradient(
    cell: Cell, pre: Tensor, xc: Tensor, target: Tensor, comm: Solo, rows_in_all: int
) -> tuple[Tensor, AuxGradient | None]:
    """The auxiliary loss and its gradients, from the dead latents' pre-activations [B, n_dead].

    `target` is what they are to give, as the settings say: what is left over, or the whole; no gradient flows through.
    """
    settings = cell.config.aux
    assert settings is not None
    ids = dead_ids(cell, comm)
    assert ids is not None
    wanted = settings.k if settings.k is not None else xc.shape[1] // 2
    n_dead = int(comm.sum_latents(torch.tensor(ids.numel(), device=ids.device)))
    z = _largest(pre, min(wanted, n_dead), comm)  # [B, n_dead], zero where not chosen
    W = cell.W_dec.index_select(0, ids)  # [n_dead, d]
    full = settings.target == "full"
    out = comm.sum_latents(linear(z, W.t()))
    if full:
        out = out + cell.vectors["b_dec"]
    error = out - target
    elements = rows_in_all * (target.shape[1] if cell.config.loss == "mean" else 1)
    scale: float | Tensor = settings.coefficient / elements
    if cell.config.loss == "fvu" or settings.normalize:
        mean = comm.sum(target.sum(0)) / rows_in_all
        variance = comm.sum((target - mean).square().sum()).clamp_min(1e-12)
        scale = settings.coefficient / variance
    if settings.scale_by_dead:
        scale = scale * min(1.0, n_dead / wanted)
    loss = torch.linalg.vector_norm(error).square() * scale
    G = error * (2 * scale)  # [B, d]
    dz = torch.ops.aten.threshold_backward(linear(G, W), z, 0)  # z is not negative
    b_dec = G.sum(0) if full else None
    return loss, AuxGradient(ids, linear(dz.t(), xc.t()), linear(z.t(), G.t()), dz.sum(0), b_dec)


def _largest(pre: Tensor, k: int, comm: Solo) -> Tensor:
    """Positive part of the k largest of each row, zeros elsewhere."""
    if pre.shape[1] <= k and comm.world == 1:
        return pre.relu()
    values, where = torch.topk(pre, min(k, pre.shape[1]), dim=1, sorted=False)
    if comm.splits_latents:
        # ranks hold different numbers of dead latents: pad to one width before they compare
        width = max(int(v) for v in comm.gather_counts(values.shape[1]))
        padded = values.new_full((values.shape[0], width), -torch.inf)
        padded[:, : values.shape[1]] = values
        keep = comm.keep_topk(padded, k)
        assert keep is not None
        values = torch.where(keep[:, : values.shape[1]], values, 0)
    return torch.zeros_like(pre).scatter_(1, where, values.relu())
