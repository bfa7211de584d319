"""What a reconstruction pass gives: measures, per-latent statistics, norm deciles and a density histogram."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.core.files import write_csv_atomic
from hubsae.evals.definitions import Measure, Measures

DENSITY_EDGES = tuple(round(-8 + 0.25 * i, 2) for i in range(33))


class FeatureStats(NamedTuple):
    """Per-latent statistics over all tokens of the pass; tensors are [d_sae]."""

    count: Tensor
    """Tokens on which the latent fires (z ≠ 0), int64."""
    count_position_0: Tensor | None
    """Of these, how many are the first of their sequence; None without positions."""
    mean: Tensor
    """Mean of z over the tokens on which it fires; 0 where it never does."""
    max: Tensor
    """Largest z; 0 where it never fires."""
    n_tokens: int
    """Tokens seen."""

    @property
    def density(self) -> Tensor:
        """Share of tokens on which each latent fires, float64."""
        return self.count.double() / max(self.n_tokens, 1)

    def log10_density(self, floor: float = 1e-10) -> Tensor:
        """What SAELens keeps in sparsity.safetensors."""
        return torch.log10(self.density.clamp_min(floor)).float()


class NormDecile(NamedTuple):
    """Explained variance among tokens of similar norm."""

    scope: str
    decile: int
    """1 holds the smallest norms."""
    norm_low: float
    norm_high: float
    n_tokens: int
    fve: float | None
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖², both over the decile, the mean that of the whole scope."""


class DensityBin(NamedTuple):
    """One bar of the density histogram."""

    log10_low: float | None
    """None for the latents that never fire."""
    log10_high: float | None
    n_latents: int


@dataclass(frozen=True)
class SAEReconstruction(Measures):
    """All numbers of one SAE."""

    name: str
    measures: list[Measure]
    features: FeatureStats
    deciles: list[NormDecile]
    histogram: list[DensityBin]
    batch_rule_rows: int | None
    """Rows each selection saw, where the SAE selects over a batch; None where codes do not depend on it."""
    draws: dict[tuple[str, str], np.ndarray]
    """Bootstrap values by (metric, scope). Two passes over the same samples draw the same groups, so the
    differences of their draws are paired."""
    by_group: np.ndarray
    """[groups, 2] squared error and number of elements of each group of samples in the SAE's own scope, for comparisons
    in pairs"""
    own_scope: str
    """The tokens this SAE is for, by its record"""
    scope: str = "all"
    """Taken where none is named."""


@dataclass(frozen=True)
class ReconstructionResult:
    """One pass: every SAE by name.

    >>> import torch
    >>> from hubsae import HubSAE, SAEConfig
    >>> from hubsae.evals import reconstruction
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> result = reconstruction({"mine": sae}, torch.randn(200, 4, generator=torch.manual_seed(0)))
    >>> result["mine"].value("l0"), result["mine"].get("mse").n_tokens
    (1.975, 200)
    """

    saes: dict[str, SAEReconstruction]
    n_tokens: int
    scopes: list[str]

    def __getitem__(self, name: str) -> SAEReconstruction:
        return self.saes[name]

    def rows(self) -> list[dict[str, Any]]:
        """A tidy table: one line per SAE, metric and scope."""
        return [measure.row(sae=sae.name) for sae in self.saes.values() for measure in sae.measures]

    def decile_rows(self) -> list[dict[str, Any]]:
        """Explained variance by norm decile, tidy."""
        return [{"sae": s.name, **d._asdict()} for s in self.saes.values() for d in s.deciles]

    def histogram_rows(self) -> list[dict[str, Any]]:
        """Density histograms, tidy."""
        return [{"sae": s.name, **b._asdict()} for s in self.saes.values() for b in s.histogram]

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write reconstruction.csv, norm_deciles.csv and density_histogram.csv into a folder."""
        root = Path(folder)
        return [
            write_csv_atomic(root / "reconstruction.csv", self.rows()),
            write_csv_atomic(root / "norm_deciles.csv", self.decile_rows()),
            write_csv_atomic(root / "density_histogram.csv", self.histogram_rows()),
        ]
