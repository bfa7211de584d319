"""Linear probes: a score from codes, vectors or label columns, kept beside an SAE, and what it says of rows.

`ridge` fits them in one pass; `Predictions` are taken of rows held out in another.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubsae.core.codes import SparseCodes
from hubsae.core.files import write_json_atomic
from hubsae.core.scopes import parse
from hubsae.evals.passes import PassBlock, load_state, save_state

FILE = "probe.safetensors"


@dataclass(frozen=True)
class Probe:
    """A score from codes or vectors: weights, a bias, and the record of where they come from.

    >>> probe = Probe(torch.tensor([1.0, 0.0, 2.0]), 0.5)
    >>> probe(SparseCodes(torch.tensor([[2, 0]]), torch.tensor([[1.0, 0.0]]), d_sae=3)).tolist()
    [2.5]
    """

    weights: Tensor
    """[width] float64, by latent or dimension; 0 for those that never fired"""
    bias: float
    record: dict[str, Any] = field(default_factory=dict)

    def __call__(self, inputs: SparseCodes | Tensor) -> Tensor:
        """A score for each row [...], in float64."""
        if isinstance(inputs, SparseCodes):
            weights = self.weights.to(inputs.values.device)
            return (inputs.values.double() * weights[inputs.indices.long()]).sum(-1) + self.bias
        return inputs.double() @ self.weights.to(inputs.device) + self.bias

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `probe.safetensors`, and its record once more where people read it: `probe.json`."""
        path = Path(folder) / FILE
        tensors = {"weights": self.weights, "bias": torch.tensor([self.bias], dtype=torch.float64)}
        write_json_atomic(path.with_suffix(".json"), self.record)
        return save_state(path, "probe", tensors, self.record)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Probe:
        """Read what `save` wrote: the file, or the folder it lies in."""
        found = Path(path)
        tensors, record = load_state(found / FILE if found.is_dir() else found, "probe")
        return Probe(tensors["weights"], float(tensors["bias"]), record)


def inputs_of(block: PassBlock, keep: np.ndarray, sae: str | None, columns: Sequence[str]) -> SparseCodes | Tensor:
    """What a probe reads of the rows `keep` of a block: codes of an SAE, else label columns, else the vectors."""
    if sae is None and columns:
        table = [np.asarray(block.labels[name])[keep].astype(np.float64) for name in columns]
        return torch.from_numpy(np.stack(table, 1))
    rows = torch.from_numpy(np.flatnonzero(keep))
    if sae is None:
        return block.x[rows]
    codes = block.codes[sae]
    rows = rows.to(codes.values.device)
    return SparseCodes(codes.indices[rows], codes.values[rows], codes.d_sae)


class Predictions:
    """Accumulator of what probes say of rows held out, beside label columns: a number per row and probe.

    A probe reads the codes of the SAE that its record names, the label columns it names, or the vectors.
    """

    def __init__(self, probes: dict[str, Probe], columns: Sequence[str] = (), scope: str = "all"):
        self.probes, self.kept, self.scope = probes, list(columns), parse(scope)
        self.parts: list[tuple[int, dict[str, np.ndarray]]] = []

    @property
    def columns(self) -> tuple[str, ...]:
        """Label columns."""
        inputs = (name for probe in self.probes.values() for name in probe.record.get("inputs", ()))
        return tuple(dict.fromkeys((*self.kept, *inputs, *self.scope.columns)))

    def add(self, block: PassBlock) -> None:
        """Take in one block."""
        keep = self.scope.mask(block.labels, len(block))
        found = {name: np.asarray(block.labels[name])[keep] for name in self.kept}
        for name, probe in self.probes.items():
            inputs = inputs_of(block, keep, probe.record.get("sae"), probe.record.get("inputs", ()))
            found[name] = probe(inputs).cpu().numpy()
        self.parts.append((block.start, found))

    def merge(self, other: Predictions) -> None:
        """Take in another rank's rows."""
        self.parts += other.parts

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the columns."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in self.result().items()}
        return save_state(path, "predictions", tensors, sorted(tensors))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over columns that were saved."""
        tensors, _ = load_state(path, "predictions")
        self.parts = [(0, {name: value.numpy() for name, value in tensors.items()})]

    def result(self) -> dict[str, np.ndarray]:
        """Columns and predictions, [rows] each, in the order of the rows."""
        parts = [part for _, part in sorted(self.parts, key=lambda item: item[0])]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
