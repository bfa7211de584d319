"""The truth that tests and benchmarks hold the fast paths against: dense codes, autograd.

A few lines per rule, slow and obvious.

Weights are latent-major as in training: W_enc and W_dec are both [n, d].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hubsae.kernels import cpu
from hubsae.kernels.active import ActiveSet, LatentOrder


def topk_codes(pre: Tensor, k: int, *, relu: bool = True) -> Tensor:
    """Keep the k largest of each row [rows, n], zeros elsewhere."""
    values, where = torch.topk(pre, k, dim=1)
    return torch.zeros_like(pre).scatter(1, where, values.relu() if relu else values)


def batch_topk_codes(pre: Tensor, k: int) -> Tensor:
    """Keep the k * rows largest positive entries of the batch."""
    flat = pre.relu().reshape(-1)
    values, where = torch.topk(flat, min(k * pre.shape[0], flat.numel()))
    return torch.zeros_like(flat).scatter(0, where, values).view_as(pre)


class _JumpReLU(torch.autograd.Function):
    """z = pre where pre > θ; the threshold's gradient by a rectangle of width `bandwidth`."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,) = grads
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.bandwidth / 2).to(g.dtype)
        return g * (pre > theta), -(theta / ctx.bandwidth * near * g).sum(0), None


class _Step(torch.autograd.Function):
    """H(pre - θ), differentiable by θ through the same rectangle."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (g,) = grads
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.bandwidth / 2).to(g.dtype)
        return None, -(near / ctx.bandwidth * g).sum(0), None


def jumprelu_codes(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """pre where it is above its threshold [n], with straight-through gradients."""
    out = _JumpReLU.apply(pre, theta, bandwidth)
    assert isinstance(out, Tensor)
    return out


def l0(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """Mean number of active latents per row, with straight-through gradients for theta."""
    out = _Step.apply(pre, theta, bandwidth)
    assert isinstance(out, Tensor)
    return out.sum(1).mean()


def aux_codes(pre: Tensor, dead: Tensor, k: int) -> Tensor:
    """Codes of the k largest dead latents of each row; zeros for the living."""
    masked = pre.masked_fill(~dead, -torch.inf)
    values, where = torch.topk(masked, min(k, int(dead.sum())), dim=1)
    return torch.zeros_like(pre).scatter(1, where, values.relu())


def decode(active: ActiveSet, W_dec: Tensor) -> Tensor:
    """Σ value · W_dec[latent] by way of the dense code matrix. [n_rows, d]"""
    z = torch.zeros(active.n_rows, active.n_latents, dtype=W_dec.dtype, device=W_dec.device)
    z.index_put_((active.rows.long(), active.latents.long()), active.values, accumulate=True)
    return z @ W_dec


def gradients(
    entries: LatentOrder, residual: Tensor, x: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz in latent order, gW_enc, gW_dec, gb_enc, all by dense products."""
    n = W_dec.shape[0]
    latents = torch.repeat_interleave(torch.arange(n, device=W_dec.device), entries.offsets.diff())
    where = (entries.rows.long(), latents)
    z = torch.zeros(residual.shape[0], n, dtype=W_dec.dtype, device=W_dec.device)
    z.index_put_(where, entries.values, accumulate=True)
    dz = (residual @ W_dec.t())[where]
    dense_dz = torch.zeros_like(z).index_put_(where, dz, accumulate=True)
    return dz, dense_dz.t() @ x, z.t() @ residual, dense_dz.sum(0)


def sparse_gradients(
    entries: LatentOrder, residual: Tensor, x: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `gradients` gives, from the sparse kernels, as a training step uses them tile by tile."""
    dz = cpu.entry_dots(W_dec, residual, entries.rows, entries.offsets)
    starts = entries.offsets[:-1]
    gW_dec = cpu.bag_sum(residual, entries.rows, starts, entries.values)
    gW_enc = cpu.bag_sum(x, entries.rows, starts, dz)
    return dz, gW_enc, gW_dec, cpu.segment_sum(dz, entries.offsets)
