"""The active set: which latents fired on which rows, in the two orders that a training step walks it.

Every architecture ends in this one form. Row order serves decoding; latent order serves the gradients, where
one latent's entries are contiguous and its weights are touched once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hubsae.kernels import aside
from hubsae.kernels.entries import stable_order


class ActiveSet(NamedTuple):
    """Entries in row order.

    >>> active = ActiveSet.from_topk(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 0]]), n_latents=4)
    >>> active.by_latent().offsets.tolist()
    [0, 1, 1, 1, 2]
    """

    rows: Tensor
    """[nnz] int32, not decreasing."""
    latents: Tensor
    """[nnz] int32."""
    values: Tensor
    """[nnz]; a value may be zero where only its gradient matters."""
    row_offsets: Tensor
    """[n_rows] int32: where each row starts."""
    n_rows: int
    n_latents: int

    @staticmethod
    def from_topk(values: Tensor, indices: Tensor, n_latents: int) -> ActiveSet:
        """From k entries per row: values and indices [rows, k]."""
        n_rows, k = indices.shape
        offsets = torch.arange(0, n_rows * k, k, dtype=torch.int32, device=indices.device)
        rows = torch.arange(n_rows, dtype=torch.int32, device=indices.device).repeat_interleave(k)
        return ActiveSet(rows, indices.reshape(-1).int(), values.reshape(-1), offsets, n_rows, n_latents)

    @staticmethod
    def from_entries(rows: Tensor, latents: Tensor, values: Tensor, n_rows: int, n_latents: int) -> ActiveSet:
        """From entries in row order."""
        offsets = _starts(rows, n_rows)[:-1]
        return ActiveSet(rows.int(), latents.int(), values, offsets, n_rows, n_latents)

    def by_latent(self) -> LatentOrder:
        """The same entries sorted by latent; stable, so rows stay in order within a latent."""
        order = stable_order(self.latents, self.n_latents)
        if aside(self.latents.device.type):
            offsets = _starts(self.latents.index_select(0, order), self.n_latents)
        else:
            offsets = _starts(self.latents, self.n_latents)
        rows, values = self.rows.index_select(0, order), self.values.index_select(0, order)
        return LatentOrder(order, rows, values, offsets)


def _starts(keys: Tensor, n: int) -> Tensor:
    """Where each of the keys 0 to n - 1 would start among sorted ones, and the end: [n + 1] int32.

    Off the host the keys are sorted already, since counting them would wait for their maximum.
    """
    if aside(keys.device.type):
        wanted = torch.arange(n + 1, dtype=keys.dtype, device=keys.device)
        return torch.searchsorted(keys, wanted, out_int32=True)
    offsets = torch.zeros(n + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(keys, minlength=n), 0, out=offsets[1:])
    return offsets


class LatentOrder(NamedTuple):
    """Entries in latent order: latent j owns entries offsets[j] to offsets[j + 1]."""

    order: Tensor
    """[nnz] int64 into the row order."""
    rows: Tensor
    """[nnz] int32."""
    values: Tensor
    """[nnz]"""
    offsets: Tensor
    """[n_latents + 1] int32."""
