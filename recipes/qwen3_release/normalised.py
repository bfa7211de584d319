"""Error in the normalised space, where the card's numbers are: one accumulator of the pass that measures the rest.

mse_normalised = mean over tokens and dimensions of ((x - x̂) / std)²
fve_normalised = 1 - Σ|(x - x̂) / std|² / Σ|(x - mean) / std|²
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubsae.core.normalizer import Normalizer
from hubsae.core.sae import SAE
from hubsae.core.scopes import Scope
from hubsae.evals import bootstrap
from hubsae.evals.accumulate import GROUPS, RUN_ROWS, mix
from hubsae.evals.passes import PassBlock, load_state, save_state

DEFINITIONS = {
    "mse_normalised": "mean over tokens and dimensions of ((x − x̂) / std)², std that of the normaliser",
    "fve_normalised": "1 − Σ‖(x − x̂) / std‖² / Σ‖(x − mean) / std‖², mean and std those of the normaliser",
    "kl_score": "1 − kl / kl_zero",
}
"""Of the metrics that are this recipe's own, `kl_score` being read off the splice."""


class NormalisedError:
    """Sums over the tokens of a scope, in groups that the bootstrap resamples as the other metrics' are."""

    def __init__(self, saes: Mapping[str, SAE], space: Normalizer, scope: Scope):
        self.saes, self.space, self.scope = dict(saes), space, scope
        self.tokens = torch.zeros(GROUPS, dtype=torch.float64)
        self.spread = torch.zeros(GROUPS, dtype=torch.float64)
        self.errors = {name: torch.zeros(GROUPS, dtype=torch.float64) for name in saes}

    @property
    def columns(self) -> Sequence[str]:
        """Label columns that say which tokens count, and which belong together."""
        return (*self.scope.columns, "sample_id")

    def add(self, block: PassBlock) -> None:
        """Take in one block."""
        inside = torch.from_numpy(self.scope.mask(block.labels, len(block)))
        sample = block.labels.get("sample_id")
        runs = np.arange(block.start, block.start + len(block)) // RUN_ROWS
        group = torch.from_numpy((runs if sample is None else mix(sample)) % GROUPS)[inside]
        x = block.x.double().cpu()[inside]
        mean, std = self.space.mean.double(), self.space.std.double()
        self.tokens.index_add_(0, group, torch.ones(len(x), dtype=torch.float64))
        self.spread.index_add_(0, group, ((x - mean) / std).square().sum(1))
        for name, sae in self.saes.items():
            away = x - sae.decode(block.codes[name]).double().cpu()[inside]
            self.errors[name].index_add_(0, group, (away / std).square().sum(1))

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"tokens": self.tokens, "spread": self.spread, **{f"error.{n}": e for n, e in self.errors.items()}}

    def merge(self, other: NormalisedError) -> None:
        """Take in what another rank has added up."""
        for mine, theirs in zip(self._tensors().values(), other._tensors().values(), strict=True):
            mine += theirs

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state."""
        return save_state(path, "normalised", self._tensors(), {})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a state that was saved."""
        found, _ = load_state(path, "normalised")
        for name, mine in self._tensors().items():
            mine.copy_(found[name])

    def result(self) -> list[dict[str, Any]]:
        """A row per SAE and metric, as the other metrics' rows."""
        n, spread = self.tokens.numpy(), self.spread.numpy()
        rows: list[dict[str, Any]] = []
        for name, error in self.errors.items():
            table = np.stack([error.numpy(), spread, n * len(self.space.mean)], 1)[n > 0]
            for metric, of in (
                ("mse_normalised", lambda s: s[:, 0] / s[:, 2]),
                ("fve_normalised", lambda s: 1 - s[:, 0] / s[:, 1]),
            ):
                low, high = bootstrap.interval(table, of) or (None, None)
                value = float(of(table.sum(0, keepdims=True))[0])
                rows.append(
                    {"sae": name, "metric": metric, "scope": self.scope.name, "value": value, "low": low, "high": high,
                     "n_tokens": int(n.sum())}
                )  # fmt: skip
        return rows
