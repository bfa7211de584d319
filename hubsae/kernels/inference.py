"""Encoding and decoding at inference: one dense product, a selection, and a gather of decoder rows.

Top-k codes are made some rows at a time, so that the block of pre-activations is selected from while it is in cache
and never exists for all tokens: 1.06 to 1.4 times the fastest peer on Zen 4, exact (benchmarks/encode.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hubsae.kernels import entries, select
from hubsae.kernels.linear import linear, rows_at_once


def encode_linear(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Pre-activations [tokens, d_sae] of x [tokens, d_in] with W_enc [d_in, d_sae]."""
    if x.ndim == 2:
        return linear(x, W_enc.t(), b_enc)
    return F.linear(x, W_enc.t(), b_enc)


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, center: Tensor | None = None, *, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row of x [tokens, d_in]: values and indices [tokens, k].

    Largest first unless told that order does not matter.

    Equal to `select_topk(encode_linear(x - center, ...), k)` without the block of all pre-activations.
    """
    step = rows_at_once(x.shape[0], W_enc.shape[1])
    if x.shape[0] <= step or (torch.is_grad_enabled() and (x.requires_grad or W_enc.requires_grad)):
        return select_topk(encode_linear(x if center is None else x - center, W_enc, b_enc), k, sorted)
    values = torch.empty(x.shape[0], k, dtype=x.dtype, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        rows = x[part] if center is None else x[part] - center
        values[part], indices[part] = select_topk(encode_linear(rows, W_enc, b_enc), k, sorted)
    return values, indices


def select_topk(pre: Tensor, k: int, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest of each row: values and indices [tokens, k], largest first if `sorted`."""
    if pre.ndim == 2:
        return select.topk(pre, k, sorted=sorted)
    return torch.topk(pre, k, dim=-1, sorted=sorted)


def select_ragged(active: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Compact the active entries of z [tokens, d_sae] to [tokens, widest row]; padding is value 0 at index 0."""
    counts = active.sum(-1)
    width = max(int(counts.max()) if active.shape[0] else 0, 1)
    rows, columns, found = entries.at(z, active)
    place = torch.arange(rows.numel(), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(active.shape[0], width, dtype=torch.int64, device=active.device)
    indices[rows, place] = columns
    values = torch.zeros(active.shape[0], width, dtype=z.dtype, device=z.device)
    # written by index, so that gradients reach z
    return values.index_put((rows, place), found), indices


def decode_rows(indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Σ_j values[:, j] · W_dec[indices[:, j]] + b_dec, without a dense code matrix. [tokens, d_in]"""
    if values.dtype in (torch.float32, torch.float64):
        # the bias in place: a second block of this size costs as much as the gather where it is mapped anew each time
        return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum").add_(b_dec)
    # embedding_bag has no weighted sum in half precision everywhere
    return torch.einsum("tk,tkd->td", values, W_dec[indices]) + b_dec


def batch_topk_mask(pre: Tensor, k: int) -> Tensor:
    """Which entries the batch rule keeps: the k·tokens largest positive ones of the whole batch.

    Ties at the cut are all kept, as the published implementations do.
    """
    flat = pre.reshape(-1)
    keep = min(k * pre.shape[0], flat.numel())
    if keep == 0:
        return torch.zeros_like(pre, dtype=torch.bool)
    cut = torch.topk(flat, keep, sorted=False).values.min()
    return (pre >= cut) & (pre > 0)
