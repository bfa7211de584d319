"""Input statistics of the activations an SAE was trained on, kept beside its weights.

Folded into the weights they are not needed to run the SAE; they are kept so that the training space can be
recovered (`unfold`) for a warm start, and so that a reader can tell what scale the activations had.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hubsae.core.errors import ConfigError


@dataclass(frozen=True)
class Normalizer:
    """z = (x - mean) / std per dimension, and what is known of the activations.

    >>> n = Normalizer(mean=torch.tensor([1.0, 2.0]), std=torch.tensor([2.0, 4.0]))
    >>> n.apply(torch.tensor([[3.0, 2.0]]))
    tensor([[1., 0.]])
    """

    mean: Tensor
    """[d_in]"""
    std: Tensor
    """[d_in], all above zero; a scalar normaliser has the same value everywhere."""
    count: int = 0
    """Tokens the statistics were computed on; 0 where that is not known."""
    norm_percentiles: dict[str, float] = field(default_factory=dict)
    """Percentiles of the token norms, such as {"50": 11.2, "99": 14.0}."""

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise ConfigError(
                f"normaliser mean {tuple(self.mean.shape)} and std {tuple(self.std.shape)} must both be [d_in]"
            )
        if not bool(torch.isfinite(self.mean).all()) or not bool(torch.isfinite(self.std).all()):
            raise ConfigError("normaliser statistics hold NaN or infinity")
        if not bool((self.std > 0).all()):
            raise ConfigError(
                f"{int((self.std <= 0).sum())} of {self.std.numel()} dimensions have a standard deviation of zero",
                hint="give constant dimensions std 1, or add a small epsilon when the statistics are computed",
            )

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.mean.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """Raw activations [..., d_in] into the training space."""
        return (x - self.mean.to(x)) / self.std.to(x)

    def to(self, *args, **kwargs) -> Normalizer:
        """The same statistics elsewhere."""
        return replace(self, mean=self.mean.to(*args, **kwargs), std=self.std.to(*args, **kwargs))
