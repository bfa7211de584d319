"""A training run as a file: where the data is, what to train, where it goes. What `hubsae train` runs.

data: {path: DIR or owner/name, config: layers.18, split: train, val_split: validation}
out: runs/layer18
init: owner/name or a path        # optional: start from this SAE
train: {architecture: topk, expansion: 8, k: 64, ...}      # fields of TrainConfig
grid: {k: [32, 64], expansion: [4, 8]}                     # optional: every combination, on one stream
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from hubsae.core.errors import ConfigError, nearest
from hubsae.core.metadata import describe_validation
from hubsae.train.api import train, train_many
from hubsae.train.config import Part, TrainConfig
from hubsae.train.estimate import Estimate, estimate
from hubsae.train.result import TrainResult

CONFIGS = Path(__file__).parent / "configs"


class DataConfig(Part):
    """Where activations are."""

    path: str = Field(description="Folder, file, or dataset repo that ActivationDataset.open takes.")
    config: str | int | None = Field(default=None, description="Hook point, where there are several.")
    split: str = "train"
    val: str | None = Field(default=None, description="Another path for validation.")
    val_split: str | None = Field(default=None, description="Validation split of the same dataset.")
    revision: str | None = None
    stream: bool = False
    d_in: int | None = Field(default=None, description="Width, for a dry run without the data.")
    rows: int | None = Field(default=None, description="Tokens, for a dry run without the data.")


class Job(Part):
    """A file of `hubsae train`.

    >>> job = Job(data={"path": "acts"}, train={"d_sae": 64}, grid={"k": [2, 4]})
    >>> [cell.name for cell in job.cells()]
    ['k=2', 'k=4']
    """

    data: DataConfig
    out: str | None = None
    init: str | None = None
    device: str = Field(default="auto", description="auto: the GPU of this rank, if there is one.")
    train: dict[str, Any] = Field(default_factory=dict, description="Fields of TrainConfig.")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="Fields and the values to combine.")

    def cells(self) -> list[TrainConfig]:
        """The configs of the run: one, or one per point of the grid."""
        points = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        cells = []
        for point in points:
            fields = dict(self.train)
            for key, value in point.items():
                _put(fields, key, value)
            if point:
                fields["name"] = ",".join(f"{key.split('.')[-1]}={value}" for key, value in point.items())
            try:
                cells.append(TrainConfig.model_validate(fields))
            except ValidationError as error:
                raise ConfigError(f"train: {describe_validation(error)}", hint=_hint(error)) from None
        return cells

    def chosen_device(self) -> torch.device:
        """The device of this rank."""
        if self.device != "auto":
            return torch.device(self.device)
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")

    def open(self) -> tuple[Any, Any]:
        """The training and validation data."""
        from hubsae.activations import ActivationDataset

        d = self.data
        options = {"revision": d.revision, "stream": d.stream}
        rows = ActivationDataset.open(d.path, d.config, d.split, **options)
        val = None
        if d.val is not None:
            val = ActivationDataset.open(d.val, d.config, d.val_split or d.split, **options)
        elif d.val_split is not None:
            val = ActivationDataset.open(d.path, d.config, d.val_split, **options)
        return rows, val

    def plan(self) -> list[Estimate]:
        """Memory and time of every cell, without training; the data itself is only asked for its shape."""
        d_in, rows = self.data.d_in, self.data.rows
        if Path(self.data.path).exists() or d_in is None or rows is None:
            source = self.open()[0]
            d_in, rows = source.d, source.n_rows
        return [estimate(cell, d_in, rows, self.chosen_device()) for cell in self.cells()]

    def run(self, *, resume: bool = True, quiet: bool = False) -> list[TrainResult]:
        """Train; run again to go on."""
        rows, val = self.open()
        options: dict[str, Any] = {"out": self.out, "init": self.init, "val": val, "resume": resume, "quiet": quiet}
        options["device"] = self.chosen_device()
        cells = self.cells()
        if len(cells) == 1:
            return [train(cells[0], rows, **options)]
        return train_many(cells, rows, **options)


def load_job(name: str, overrides: dict[str, Any]) -> Job:
    """A job from a YAML file, or one of the configs that come with hubsae by its name; overrides by dotted key."""
    import yaml

    path = Path(name)
    if not path.exists() and (CONFIGS / f"{name}.yaml").is_file():
        path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
        raise ConfigError(f"there is no config {name}", hint=f"a YAML file, or one of: {nearest(name, known)}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping with data and train, found {type(data).__name__}")
    for key, value in overrides.items():
        top = key.split(".")[0]
        if top not in Job.model_fields and top in TrainConfig.model_fields:
            key = f"train.{key}"  # hubsae train FILE k=32
        _put(data, key, value)
    try:
        return Job.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_validation(error)}", hint=_hint(error)) from None


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = data.get(parent)
        data[parent] = dict(inner) if isinstance(inner, dict) else {}
        data = data[parent]
    data[last] = value


def _hint(error: ValidationError) -> str | None:
    for item in error.errors():
        if item["type"] == "extra_forbidden":
            known = sorted({*TrainConfig.model_fields, *Job.model_fields, *DataConfig.model_fields})
            return f"nearest: {nearest(str(item['loc'][-1]), known)}"
    return None
