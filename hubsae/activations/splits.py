"""Which split a row belongs to: decided from its sample alone, so that it depends on no order and no rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hubsae.core.errors import ConfigError

GOLDEN = 0x9E3779B97F4A7C15
"""The step of splitmix64."""


@dataclass(frozen=True)
class SplitRule:
    """How rows are divided into `train` and `validation`.

    `sample` keeps all tokens of a sample on one side (the honest default). `token` divides the tokens of
    one sample, which leaks; it exists to compare with releases that did so. `tail` puts the last samples aside.

    >>> rule = SplitRule("sample", 0.5, seed=1)
    >>> rows = rule.validation(np.array([7, 7, 7]), np.array([0, 1, 2]))
    >>> len(set(rows.tolist()))
    1
    """

    kind: Literal["sample", "token", "tail"] = "sample"
    fraction: float = 0.0
    seed: int = 0
    n_samples: int | None = None
    """Needed by `tail` only."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ConfigError(f"a validation fraction of {self.fraction} is outside [0, 1)")
        if self.kind not in ("sample", "token", "tail"):
            raise ConfigError(f"no split rule {self.kind!r}", hint="choose sample, token or tail")
        if self.kind == "tail" and self.fraction and self.n_samples is None:
            raise ConfigError("a tail split needs to know how many samples there are", hint="pass a list or a dataset")

    @property
    def names(self) -> tuple[str, ...]:
        """The splits that occur."""
        return ("train", "validation") if self.fraction else ("train",)

    def validation(self, sample_id: np.ndarray, position: np.ndarray) -> np.ndarray:
        """True [rows] where a row belongs to the validation split."""
        if not self.fraction:
            return np.zeros(len(sample_id), dtype=bool)
        if self.kind == "tail":
            assert self.n_samples is not None
            return sample_id >= self.n_samples - round(self.n_samples * self.fraction)
        key = sample_id.astype(np.uint64)
        if self.kind == "token":
            key = (key << np.uint64(24)) ^ position.astype(np.uint64)
        return uniform(key, self.seed) < self.fraction


def uniform(key: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) from each key: splitmix64, the same on every machine and in every version."""
    with np.errstate(over="ignore"):
        start = key + np.uint64((seed + 1) * GOLDEN & 0xFFFFFFFFFFFFFFFF)
    return (mixed(start) >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def mixed(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: numbers uint64 as numbers that look drawn, each from one alone."""
    with np.errstate(over="ignore"):
        z = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
