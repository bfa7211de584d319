"""Encoding and decoding at inference: one dense product, a selection, and a gather of decoder rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def encode_linear(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Pre-activations [tokens, d_sae] of x [tokens, d_in] with W_enc [d_in, d_sae]."""
    return F.linear(x, W_enc.t(), b_enc)


def select_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row: values and indices [tokens, k], largest first."""
    return torch.topk(pre, k, dim=-1)


def select_ragged(active: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Compact the active entries of z [tokens, d_sae] to [tokens, widest row]; padding is value 0 at index 0."""
    width = max(int(active.sum(-1).max()) if active.shape[0] else 0, 1)
    order = torch.topk(active.to(torch.uint8), width, dim=-1, sorted=False).indices.sort(-1).values
    kept = active.gather(-1, order)
    return torch.where(kept, z.gather(-1, order), 0), torch.where(kept, order, 0)


def decode_rows(indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Σ_j values[:, j] · W_dec[indices[:, j]] + b_dec, without a dense code matrix. [tokens, d_in]"""
    if values.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
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
