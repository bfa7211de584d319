"""What comes out of a run: the SAE, its history, its metrics, and the files of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubsae.core.errors import HubSAEError
from hubsae.core.files import writing
from hubsae.core.metadata import Metric
from hubsae.core.sae import SAE
from hubsae.evals.definitions import DEFINITIONS
from hubsae.train.config import TrainConfig

VALIDATED = {"val_mse": "mse", "val_fvu": "fvu", "val_l0": "l0", "val_dead": "dead_fraction"}
"""What is measured on validation data, by its name in the log."""


@dataclass
class TrainResult:
    """What came of one SAE's training."""

    name: str
    config: TrainConfig
    sae: SAE | None
    """The SAE on raw activations; None where `error` says why not."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The log lines of this SAE, in order."""
    steps: int = 0
    tokens: int = 0
    out: Path | None = None
    best: dict[str, Any] | None = None
    """Step, metric and value of the checkpoint that `sae` is; None where it is the last state."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the SAE that was chosen, or its last training ones."""
    error: HubSAEError | None = None

    def last(self, name: str, event: str | None = None) -> float:
        """The newest value of a logged quantity."""
        for line in reversed(self.history):
            if name in line and event in (None, line["event"]):
                return line[name]
        raise KeyError(f"{name} was not logged; logged: {sorted({k for line in self.history for k in line})}")

    def write(self, folder: Path) -> None:
        """The SAE in our layout, and in those that its config asks for."""
        from hubsae.formats.registry import write, write_also

        assert self.sae is not None
        need = sum(tensor.numel() * tensor.element_size() for tensor in self.sae.tensors().values())
        with writing(folder, need, "training is done and its last state is whole"):
            write(self.sae, folder, "native")
            write_also(self.sae, folder, [kind for kind in self.config.exports if kind != "safetensors"])


def as_metadata(values: dict[str, float], scope: str = "all") -> list[Metric]:
    """Validation numbers as metadata metrics; `scope` is the SAE's own."""
    common: dict[str, Any] = {"n_tokens": int(values.get("val_rows", 0)), "scope": scope}
    common["source"] = "hubsae, validation in training"
    return [
        Metric(name=name, value=values[key], definition=DEFINITIONS[name], **common)
        for key, name in VALIDATED.items()
        if key in values
    ]
