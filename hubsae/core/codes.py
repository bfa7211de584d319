"""Sparse codes: which latents fire on each token, and how strongly."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SparseCodes(NamedTuple):
    """Active latents of each token; rows with fewer than `k` are padded with value 0 at index 0.

    >>> import torch
    >>> codes = SparseCodes(torch.tensor([[2, 0]]), torch.tensor([[1.5, 0.0]]), d_sae=4)
    >>> codes.dense()
    tensor([[0.0000, 0.0000, 1.5000, 0.0000]])
    >>> codes.l0()
    tensor([1])
    """

    indices: Tensor
    """[..., k] integer, each below d_sae."""
    values: Tensor
    """[..., k] in the SAE's dtype."""
    d_sae: int
    """Number of latents of the SAE."""
    token_mean: Tensor | None = None
    """[..., 1] what a per-token norm subtracted; needed to decode, None where there is no such norm."""
    token_scale: Tensor | None = None
    """[..., 1] what a per-token norm divided by."""
    skip: Tensor | None = None
    """[..., d_out] what a transcoder's skip matrix adds to the decoded codes; None where it has none."""

    def dense(self) -> Tensor:
        """The same codes as a dense tensor [..., d_sae]."""
        out = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        # adding and not writing: padding may share index 0 with a latent that fires
        return out.scatter_add(-1, self.indices.long(), self.values)

    def l0(self) -> Tensor:
        """How many latents fire on each token [...]."""
        return (self.values != 0).sum(-1)

    def to(self, *args, **kwargs) -> SparseCodes:
        """Move to a device and, for the values, to a dtype."""
        values = self.values.to(*args, **kwargs)
        beside = (self.token_mean, self.token_scale, self.skip)
        moved = [t if t is None else t.to(*args, **kwargs) for t in beside]
        return SparseCodes(self.indices.to(values.device), values, self.d_sae, *moved)

    def reshape(self, *lead: int) -> SparseCodes:
        """The same codes with other leading dimensions."""
        k = self.indices.shape[-1]
        beside = (self.token_mean, self.token_scale, self.skip)
        shaped = [t if t is None else t.reshape(*lead, t.shape[-1]) for t in beside]
        return SparseCodes(self.indices.reshape(*lead, k), self.values.reshape(*lead, k), self.d_sae, *shaped)
