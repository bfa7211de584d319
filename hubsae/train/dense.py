"""Cells whose codes are a matrix and not a list of entries: JumpReLU and ReLU while dense, and gated SAEs.

Around 20 % density a product over all latents costs what the gathers cost; above, it wins. Dense codes answer the same
three questions as the sparse path: the reconstruction, the gradients of the vectors, and the weight gradients
of a tile of latents. Products run on the encoder's backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hubsae.kernels.linear import linear
from hubsae.train.state import Cell

L0Rate = Callable[[Tensor], tuple[Tensor, Tensor | float]]


class DenseCodes:
    """Codes [rows, n] of one cell, and where the gradient of a code goes."""

    def __init__(self, cell: Cell, z: Tensor, near: Tensor | None = None, product: Tensor | None = None):
        self.cell, self.z = cell, z
        self.near = near
        """jumprelu: which pre-activations are within half a bandwidth of their threshold."""
        self.product = product
        """gated: x W_enc, without a bias."""
        self.inputs, self.residual, self.dz = z, z, z

    @classmethod
    def thresholded(cls, cell: Cell, pre: Tensor) -> DenseCodes:
        """ReLU or JumpReLU codes of pre-activations, which are overwritten."""
        if (theta := cell.vectors.get("theta")) is None:
            return cls(cell, pre.relu_())
        near = (pre - theta).abs_() < cell.config.sparsity.bandwidth / 2
        return cls(cell, pre * (pre > theta), near)

    @classmethod
    def gated(cls, cell: Cell, product: Tensor) -> DenseCodes:
        """Gated codes: which latents fire and how strongly are two affine maps of one product."""
        v = cell.vectors
        magnitude = (product * v["r_mag"].exp() + v["b_mag"]).relu_()
        return cls(cell, magnitude * (product > -v["b_enc"]), product=product)

    def decode(self) -> Tensor:
        """z @ W_dec. [rows, d]"""
        return linear(self.z, self.cell.W_dec.t())

    def backward(
        self, xc: Tensor, residual: Tensor, rows_in_all: int, l0_rate: L0Rate, grads: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Fill `grads`; how often each latent fired [n], and the sparsity loss."""
        cell, sparsity = self.cell, self.cell.config.sparsity
        self.inputs, self.residual = xc, residual
        counts = _count_rows(self.z > 0)
        rate, penalty = cell.sparsity * sparsity.l1 / rows_in_all, None
        relu = cell.config.architecture == "relu"
        # the L1 penalty's derivative rides along as a bias of the product
        bias = torch.full_like(cell.vectors["b_enc"], rate) if relu and rate else None
        dz = linear(residual, cell.W_dec, bias)  # [rows, n]
        if self.near is not None:
            penalty, l0 = l0_rate(counts.sum())
            hits, value_part = _count_rows(self.near), (dz * self.near).sum(0)
            grads["theta"] = -(cell.vectors["theta"] * value_part + l0 * hits) / sparsity.bandwidth
        elif bias is not None:
            penalty = rate * self.z.sum()
        self.dz = torch.ops.aten.threshold_backward(dz, self.z, 0)
        if self.product is not None:
            penalty = self._through_the_gate(self.product, xc, rate, rows_in_all, grads)
        else:
            grads["b_enc"] = self.dz.sum(0)
        return counts, penalty

    def _through_the_gate(
        self, product: Tensor, xc: Tensor, rate: float, rows_in_all: int, grads: dict[str, Tensor]
    ) -> Tensor:
        """Turn `dz` from the magnitude's gradient into the product's; the auxiliary losses.

        As published: l1 · Σ relu(gate) + reconstruction from relu(gate) with a frozen decoder.
        """
        cell, v = self.cell, self.cell.vectors
        target = xc if cell.center is None else xc + cell.center
        scale: float | Tensor = 1 / (rows_in_all * (xc.shape[1] if cell.config.loss == "mean" else 1))
        if cell.config.loss == "fvu":
            scale = 1 / (target - target.mean(0)).square().sum().clamp_min(1e-12)
        gate = (product + v["b_enc"]).relu_()
        error = linear(gate, cell.W_dec.t()).add_(v["b_dec"]).sub_(target)
        penalty = rate * gate.sum() + error.square().sum() * scale
        bias = torch.full_like(v["b_enc"], rate)
        via_gate = torch.ops.aten.threshold_backward(linear(error * (2 * scale), cell.W_dec, bias), gate, 0)
        slope = v["r_mag"].exp()
        grads["b_mag"] = self.dz.sum(0)
        grads["r_mag"] = (self.dz * product).sum(0) * slope
        grads["b_enc"] = via_gate.sum(0)
        self.dz = self.dz * slope + via_gate
        grads["center"] = -(self.dz.sum(0) @ cell.W_enc)
        return penalty

    def encoder_gradient(self, latents: slice) -> Tensor:
        """Of W_enc, for some latents of the cell."""
        return linear(self.dz[:, latents].t(), self.inputs.t())

    def decoder_gradient(self, latents: slice) -> Tensor:
        """Of W_dec, for some latents of the cell."""
        return linear(self.z[:, latents].t(), self.residual.t())


def _count_rows(mask: Tensor) -> Tensor:
    """How many rows of a mask [rows, n] are true, per column. numpy counts bytes ten times faster than torch."""
    if mask.device.type != "cpu" or mask.shape[0] >= 1 << 16:
        return mask.sum(0)
    return torch.from_numpy(mask.numpy().view("uint8").sum(0, dtype="uint16").astype("int64"))
