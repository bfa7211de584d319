"""Sums whose result does not depend on the order or the grouping of what is added.

Evaluation adds the same block results in different orders when the batch size, the number of ranks or the
merging of shards changes. Plain float64 would then differ in the last bits. Two tools prevent that:

- `CompensatedSum`: three float64 per entry, added with error-free transformations (Knuth's two-sum). What is
  lost is of the order of 2^-159 of the total, so the value rounded to float64 is the same for every order.
- `FixedPointSum`: two int64 per entry; integer addition is associative, so scatter-adds on a GPU, where the
  order of atomics is not fixed, give the same bits too. Used for per-latent sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

# FixedPointSum: the high limb counts units of 2^-10, the low limb units of 2^-44 of what remains.
HIGH_BITS = 10
LOW_BITS = 44


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and exactly what the rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


class CompensatedSum:
    """A float64 tensor of running sums with two tensors of what rounding lost.

    >>> s = CompensatedSum(1)
    >>> for value in (1e16, 1.0, -1e16):
    ...     s.add(torch.tensor([value], dtype=torch.float64))
    >>> s.value()
    tensor([1.], dtype=torch.float64)
    """

    def __init__(self, *shape: int):
        self.parts = torch.zeros(3, *shape, dtype=torch.float64)

    def add(self, values: Tensor, rows: Tensor | None = None) -> None:
        """Add to all entries, or to the given distinct rows of the first dimension."""
        carry = values.detach().to("cpu", torch.float64)
        parts = self.parts if rows is None else self.parts[:, rows]
        first, carry = two_sum(parts[0], carry)
        second, carry = two_sum(parts[1], carry)
        fresh = torch.stack([first, second, parts[2] + carry])
        if rows is None:
            self.parts = fresh
        else:
            self.parts[:, rows] = fresh

    def merge(self, other: CompensatedSum, rows: Tensor | None = None) -> None:
        """Add what another rank or shard has summed, row i of it to `rows[i]`."""
        for part in other.parts:
            self.add(part, rows)

    def total(self, rows: Tensor | None = None) -> CompensatedSum:
        """The sum over the first dimension, or over some of its rows, with nothing lost."""
        out = CompensatedSum(*self.parts.shape[2:])
        parts = self.parts if rows is None else self.parts[:, rows]
        # halves are added to each other until one row is left: log2(rows) vectorised steps
        while parts.shape[1] > 1:
            half = parts.shape[1] // 2
            folded = CompensatedSum()
            folded.parts = parts[:, :half]
            for part in parts[:, half : 2 * half]:
                folded.add(part)
            parts = torch.cat([folded.parts, parts[:, 2 * half :]], dim=1)
        if parts.shape[1]:
            out.parts = parts[:, 0]
        return out

    def value(self) -> Tensor:
        """The sums, rounded once to float64."""
        first, low = two_sum(self.parts[0], self.parts[1])
        low, rest = two_sum(low, self.parts[2])
        # what is below `low` decides only where `low` lies exactly between two results: moved off there, to the
        # neighbour with an odd last bit, it rounds as the whole would
        even = (low.contiguous().view(torch.int64) & 1) == 0
        beyond = torch.nextafter(low, torch.where(rest > 0, torch.inf, -torch.inf).to(low))
        return first + torch.where((rest != 0) & even, beyond, low)

    def exact(self) -> tuple[list[int], int]:
        """All entries as whole numbers of 1/unit, and the unit: for differences that would cancel in float64."""
        ratios = [value.as_integer_ratio() for value in self.parts.reshape(-1).tolist()]
        unit = max((below for _, below in ratios), default=1)
        whole = [above * (unit // below) for above, below in ratios]
        n = len(whole) // 3
        return [a + b + c for a, b, c in zip(whole[:n], whole[n : 2 * n], whole[2 * n :], strict=True)], unit

    def grown(self, rows: int) -> None:
        """Append zero rows to the first dimension until it has `rows`."""
        have = self.parts.shape[1]
        if rows > have:
            more = self.parts.new_zeros(3, rows - have, *self.parts.shape[2:])
            self.parts = torch.cat([self.parts, more], dim=1)


class FixedPointSum:
    """Per-latent sums of activations, exact in units of 2^-44 whatever the order.

    Good for |value| below 2^20 and up to 2^30 firings of a latent.

    >>> s = FixedPointSum(3)
    >>> s.add(torch.tensor([0, 2, 0]), torch.tensor([1.5, 2.0, 0.25]))
    >>> s.value()
    tensor([1.7500, 0.0000, 2.0000], dtype=torch.float64)
    """

    def __init__(self, size: int):
        self.parts = torch.zeros(2, size, dtype=torch.int64)

    def add(self, where: Tensor, values: Tensor) -> None:
        """Scatter-add `values` [m] to the entries `where` [m]."""
        if self.parts.device != values.device:
            self.parts = self.parts.to(values.device)
        wide = values.double()
        high = (wide * 2.0**HIGH_BITS).round_()
        low = torch.sub(wide, high, alpha=2.0**-HIGH_BITS).mul_(2.0**LOW_BITS).round_()
        self.parts[0].index_add_(0, where, high.long())
        self.parts[1].index_add_(0, where, low.long())

    def merge(self, other: FixedPointSum) -> None:
        """Add what another rank or shard has summed."""
        self.parts = self.parts + other.parts.to(self.parts.device)

    def value(self) -> Tensor:
        """The sums as float64."""
        parts = self.parts.cpu().double()
        return parts[0] * 2.0**-HIGH_BITS + parts[1] * 2.0**-LOW_BITS
