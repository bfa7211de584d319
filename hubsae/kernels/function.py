"""The sparse kernels under autograd, for an SAE inside somebody else's loss.

Forward and backward cost one dense product (the encoder); gradients reach the input, both matrices and both biases.
Higher derivatives are not defined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hubsae.kernels import chosen, cpu
from hubsae.kernels.active import ActiveSet
from hubsae.kernels.linear import linear
from hubsae.kernels.select import topk


class _TopKAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        xc = x - b_dec
        if chosen() == "triton" and xc.dtype is torch.float32:
            from hubsae.kernels import triton_encode

            values, indices = triton_encode.topk(xc, W_enc, b_enc, k)
        else:
            values, indices = topk(linear(xc, W_enc, b_enc), k)
        if relu:
            values = values.relu()
        active = ActiveSet.from_topk(values, indices, W_enc.shape[0])
        out = cpu.decode(active, W_dec) + b_dec
        ctx.save_for_backward(xc, W_enc, W_dec, values, indices)
        ctx.relu = relu
        ctx.mark_non_differentiable(indices)
        return out, values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g_out, g_values, _ = grads
        xc, W_enc, W_dec, values, indices = ctx.saved_tensors
        active = ActiveSet.from_topk(values, indices, W_enc.shape[0])
        entries = active.by_latent()
        dz = cpu.entry_dots(W_dec, g_out, entries.rows, entries.offsets)
        dz = dz + g_values.reshape(-1)[entries.order]
        if ctx.relu:
            dz = dz * (entries.values > 0)
        starts = entries.offsets[:-1]
        gW_dec = cpu.bag_sum(g_out, entries.rows, starts, entries.values)
        gW_enc = cpu.bag_sum(xc, entries.rows, starts, dz)
        gb_enc = cpu.segment_sum(dz, entries.offsets)
        by_row = torch.empty_like(dz)
        by_row[entries.order] = dz
        gx = cpu.bag_sum(W_enc, active.latents, active.row_offsets, by_row)
        return gx, gW_enc, gb_enc, gW_dec, g_out.sum(0) - gx.sum(0), None, None


def topk_autoencode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int, *, relu: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """A top-k SAE of x [rows, d], differentiable: reconstruction [rows, d], values and indices [rows, k].

    Weights are latent-major: W_enc and W_dec are both [n, d]; b_dec is subtracted before encoding.

    >>> g = torch.Generator().manual_seed(0)
    >>> W = torch.randn(8, 4, generator=g).requires_grad_()
    >>> out, values, indices = topk_autoencode(
    ...     torch.randn(3, 4, generator=g), W, torch.zeros(8), W, torch.zeros(4), k=2
    ... )
    >>> out.sum().backward(); W.grad.shape
    torch.Size([8, 4])
    """
    out, values, indices = _TopKAutoencode.apply(x, W_enc, b_enc, W_dec, b_dec, k, relu)  # type: ignore[misc]
    return out, values, indices
