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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from hubsae.core.errors import ConfigError, nearest
from hubsae.core.settings import Settings, compose, merge, nested, parse_override, read_yaml
from hubsae.train import preflight
from hubsae.train.api import train, train_many
from hubsae.train.config import TrainConfig
from hubsae.train.estimate import Estimate, estimate
from hubsae.train.result import TrainResult

CONFIGS = Path(__file__).parent / "configs"


class DataConfig(Settings):
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


class Job(Settings):
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

    @model_validator(mode="after")
    def _one_value_each(self) -> Job:
        for key in self.grid:
            value: Any = self.train
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                raise ValueError(f"{key}={value} is set beside a grid over {key}; say grid.{key}=[{value}]")
        return self

    def cells(self) -> list[TrainConfig]:
        """The configs of the run: one, or one per point of the grid."""
        cells = []
        for values in itertools.product(*self.grid.values()):
            point = dict(zip(self.grid, values, strict=True))
            name = {"name": ",".join(f"{key.split('.')[-1]}={value}" for key, value in point.items())} if point else {}
            fields = [nested(key, value) for key, value in point.items()]
            cells.append(compose(TrainConfig, [self.train, *fields, name]))
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

    def plan(self, *, resume: bool = True) -> list[Estimate]:
        """Memory and time of every cell, without training; raises what the run would.

        Where the data is not here, `data.d_in` and `data.rows` stand for it.
        """
        cells, d, rows, source, val = self.cells(), self.data.d_in, self.data.rows, None, None
        if Path(self.data.path).exists() or d is None or rows is None:
            source, val = self.open()
            d, rows = source.d, source.n_rows
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        for cell in cells:
            preflight.check_settings([cell], d, rows, ranks=ranks if cell.parallel == "data" else 1)
        if source is not None:
            preflight.check_data(cells, source, val)
            if self.out is not None and resume:
                preflight.check_folder(Path(self.out), preflight.settings_of(cells, source))
        return [estimate(cell, d, rows, self.chosen_device(), ranks) for cell in cells]

    def run(self, *, resume: bool = True, quiet: bool = False) -> list[TrainResult]:
        """Train; run again to go on."""
        rows, val = self.open()
        options: dict[str, Any] = {"out": self.out, "init": self.init, "val": val, "resume": resume, "quiet": quiet}
        options["device"] = self.chosen_device()
        cells = self.cells()
        if len(cells) == 1:
            return [train(cells[0], rows, **options)]
        return train_many(cells, rows, **options)


def load_job(name: str, overrides: Sequence[str] = ()) -> Job:
    """A job from a YAML file, or one of the configs that come with hubsae by its name; `key.path=value` on top."""
    path = Path(name)
    if not path.exists() and (CONFIGS / f"{name}.yaml").is_file():
        path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
        raise ConfigError(f"there is no config {name}", hint=f"a YAML file, or one of: {nearest(name, known)}")
    data = read_yaml(path)
    for text in overrides:
        key, value = parse_override(text)
        top = key.split(".")[0]
        if top not in Job.model_fields and top in TrainConfig.model_fields:
            key = f"train.{key}"  # hubsae train FILE k=32
        data = merge(data, _placed(key, value))
    return compose(Job, [data])


def _placed(key: str, value: Any) -> dict[str, Any]:
    """An override as a layer; grid keys have dots of their own."""
    if key.startswith("grid."):
        return {"grid": {key.removeprefix("grid."): value}}
    return nested(key, value)
