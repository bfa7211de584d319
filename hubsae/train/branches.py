"""Cells whose codes are a matrix and not a list of entries: JumpReLU and ReLU while dense, and gated SAEs.

Around 20 % density a product over all latents costs what the gathers cost; above, it wins. A branch answers the same
three questions as the sparse path: the reconstruction, the gradients of the vectors, and the weight gradients
of a tile of latents. Products run on the encoder's backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hubsae.kernels.linear import linear
from hubsae.train.state import Cell


class DenseBranch:
    """ReLU and JumpReLU codes [rows, n]."""

    def __init__(self, pre: Tensor, theta: Tensor | None, bandwidth: float):
        self.theta = theta
        if theta is None:
            self.z, self.near = pre.relu_(), None
        else:
            self.z, self.near = pre * (pre > theta), (pre - theta).abs_() < bandwidth / 2
        self.inputs, self.residual, self.dz = pre, pre, pre

    def decode(self, cell: Cell) -> Tensor:
        """z @ W_dec. [rows, d]"""
        return linear(self.z, cell.W_dec.t())

    def backward(
        self,
        cell: Cell,
        xc: Tensor,
        residual: Tensor,
        rows_in_all: int,
        l0_rate: Callable[[Tensor], tuple[Tensor, Tensor | float]],
        grads: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Fill `grads`; how often each latent fired [n], and the sparsity loss."""
        self.inputs, self.residual = xc, residual
        sparsity = cell.config.sparsity
        counts = _count_rows(self.z > 0)
        # the penalty's derivative rides along as a bias of the product
        rate = cell.sparsity * sparsity.l1 / rows_in_all
        bias = torch.full_like(cell.vectors["b_enc"], rate) if self.near is None and rate else None
        dz = linear(residual, cell.W_dec, bias)  # [rows, n]
        penalty = None
        if self.near is not None and self.theta is not None:
            penalty, l0 = l0_rate(counts.sum())
            hits, value_part = _count_rows(self.near), (dz * self.near).sum(0)
            grads["log_threshold"] = -(self.theta / sparsity.bandwidth) * (self.theta * value_part + l0 * hits)
        elif bias is not None:
            penalty = rate * self.z.sum()
        self.dz = torch.ops.aten.threshold_backward(dz, self.z, 0)
        grads["b_enc"] = self.dz.sum(0)
        return counts, penalty

    def tile(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Gradients of W_enc and W_dec for latents low to high of the cell."""
        part = slice(low, high)
        return (
            linear(self.dz[:, part].t(), self.inputs.t()),
            linear(self.z[:, part].t(), self.residual.t()),
        )


def _count_rows(mask: Tensor) -> Tensor:
    """How many rows of a mask [rows, n] are true, per column. numpy counts bytes ten times faster than torch."""
    if mask.device.type != "cpu" or mask.shape[0] >= 1 << 16:
        return mask.sum(0)
    return torch.from_numpy(mask.numpy().view("uint8").sum(0, dtype="uint16").astype("int64"))


class GatedBranch:
    """A gated SAE: which latents fire and how strongly are two affine maps of one product. By autograd.

    Loss as published: reconstruction + l1 · Σ relu(gate) + reconstruction from relu(gate) with a frozen decoder.
    """

    def __init__(self, cell: Cell, xc: Tensor):
        self.names = ("b_enc", "b_mag", "r_mag")
        # a copy: the rows of other cells are still written into the same block
        leaves = [xc.clone(), cell.W_enc, cell.W_dec, *(cell.vectors[name] for name in self.names)]
        self.leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        x, W_enc, W_dec, b_gate, b_mag, r_mag = self.leaves
        with torch.enable_grad():
            product = x @ W_enc.t()
            gate = product + b_gate
            magnitude = (product * r_mag.exp() + b_mag).relu()
            self.gate = gate
            self.z = (gate > 0) * magnitude
            self.out = self.z @ W_dec
        self.gradients: tuple[Tensor, ...] = ()

    def decode(self, cell: Cell) -> Tensor:
        """The reconstruction without its bias. [rows, d]"""
        return self.out.detach()

    def backward(
        self,
        cell: Cell,
        xc: Tensor,
        residual: Tensor,
        rows_in_all: int,
        l0_rate: Callable[[Tensor], tuple[Tensor, Tensor | float]],
        grads: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Fill `grads`; how often each latent fired [n], and the auxiliary losses."""
        center = cell.center
        target = xc if center is None else xc + center
        scale = 1 / (rows_in_all * (xc.shape[1] if cell.config.loss == "mean" else 1))
        if cell.config.loss == "fvu":
            scale = 1 / (target - target.mean(0)).square().sum().clamp_min(1e-12)
        with torch.enable_grad():
            open_gate = self.gate.relu()
            via_gate = open_gate @ cell.W_dec + cell.vectors["b_dec"]
            penalty = cell.sparsity * cell.config.sparsity.l1 / rows_in_all * open_gate.sum()
            penalty = penalty + (via_gate - target).square().sum() * scale
            self.gradients = torch.autograd.grad([self.out, penalty], self.leaves, [residual, torch.ones_like(penalty)])
        for name, gradient in zip(self.names, self.gradients[3:], strict=True):
            grads[name] = gradient
        grads["center"] = -self.gradients[0].sum(0)
        return (self.z.detach() > 0).sum(0), penalty.detach()

    def tile(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Gradients of W_enc and W_dec for latents low to high of the cell."""
        return self.gradients[1][low:high], self.gradients[2][low:high]


Branch = DenseBranch | GatedBranch
