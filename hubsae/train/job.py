"""A training run as a file: where the data is, what to train, where it goes. What `hubsae train` runs.

data: {path: DIR or owner/name, config: layers.18, split: train, val_split: validation}
      # {path: DIR, config: layers.18.mlp_in, target: layers.18.mlp_out} trains transcoders
live: {model: owner/name, texts: owner/name or FILE, layers: [8, 15]}      # in place of data: harvested while training
      # with targets: [8.mlp_out], one for each of layers: [8.mlp_in], transcoders
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
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from hubsae.core.errors import ConfigError, nearest
from hubsae.core.extras import require
from hubsae.core.hooks import HookPoint
from hubsae.core.options import pass_on
from hubsae.core.settings import Settings, compose, merge, nested, parse_override, read_yaml
from hubsae.train import preflight
from hubsae.train.api import train, train_live, train_many
from hubsae.train.config import TrainConfig
from hubsae.train.estimate import Estimate, estimate
from hubsae.train.live import LiveActivations, Mixing
from hubsae.train.parallel import pick_device
from hubsae.train.result import TrainResult

CONFIGS = Path(__file__).parent / "configs"


class DataConfig(Settings):
    """Where activations are."""

    path: str = Field(description="Folder, file, or dataset repo that ActivationDataset.open takes.")
    config: str | int | None = Field(default=None, description="Hook point, where there are several.")
    target: str | int | None = Field(
        default=None, description="Hook point to predict from `config`, same tokens: the SAEs are transcoders."
    )
    split: str = "train"
    val: str | None = Field(default=None, description="Another path for validation.")
    val_split: str | None = Field(default=None, description="Validation split of the same dataset.")
    revision: str | None = None
    stream: bool = False
    d_in: int | None = Field(default=None, description="Width, for a dry run without the data.")
    d_out: int | None = Field(default=None, description="Width of the target, for a dry run without the data.")
    rows: int | None = Field(default=None, description="Tokens, for a dry run without the data.")


class LiveConfig(Settings):
    """Activations that a model makes while the SAEs train; nothing of them is kept on disk."""

    model: str = Field(description="Folder or repo of the model.")
    texts: str = Field(description="A file (jsonl, csv, parquet, txt), or a dataset repo.")
    layers: tuple[int | str, ...] = Field(description="Hook points; one SAE (or grid of them) for each.")
    targets: tuple[int | str, ...] = Field(
        default=(), description="Hook points to predict, one for each of `layers`: the SAEs are transcoders."
    )
    revision: str | None = None
    adapter: str | None = None
    model_dtype: str | None = None
    texts_config: str | None = None
    texts_split: str = "train"
    mode: Literal["text", "packed", "prompt", "prompt+response"] = "text"
    select: str = "all"
    max_length: int | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    batch_tokens: int | None = Field(default=None, description="Tokens per forward pass, padding included.")
    window: int | None = Field(default=None, description="Samples sorted by length together.")
    buffer_rows: int = Field(default=65_536, ge=4, description="Tokens that are mixed with each other.")
    mixing: Mixing = Field(
        default="even", description="even: a token waits for up to a buffer; half: half of the buffer leaves at a time."
    )
    val_rows: int = Field(default=8_192, ge=0, description="Tokens held out for validation, from the first texts.")

    @model_validator(mode="after")
    def _one_target_each(self) -> LiveConfig:
        if self.targets and len(self.targets) != len(self.layers):
            raise ValueError(f"{len(self.targets)} targets for {len(self.layers)} layers: name one for each")
        return self

    def open(self, train: TrainConfig, device: torch.device) -> LiveActivations:
        """The model at its texts."""
        from hubsae.activations.ranks import Ranks
        from hubsae.activations.stream import open_stream
        from hubsae.activations.texts import load_texts

        def texts() -> Any:
            return load_texts(self.texts, config=self.texts_config, split=self.texts_split)[0]

        layers, targets = ([HookPoint.parse(hook) for hook in hooks] for hooks in (self.layers, self.targets))
        hooks, given = list(dict.fromkeys([*layers, *targets])), vars(self)
        stream = pass_on(open_stream, given, hook_points=hooks, device=device, ranks=Ranks())
        about = load_texts(self.texts, config=self.texts_config, split=self.texts_split)[1]
        kept = ("model", "revision", "adapter", "model_dtype", "mode", "max_length")
        own: dict[str, Any] = {
            "stream": stream, "texts": texts, "tokens": _tokens(train), "seed": train.data_seed,
            "info": about | {name: given[name] for name in kept},
            "targets": {one.name: other.name for one, other in zip(layers, targets, strict=False)},
        }  # fmt: skip
        return pass_on(LiveActivations, given, **own)


class Job(Settings):
    """A file of `hubsae train`.

    >>> job = Job(data={"path": "acts"}, train={"d_sae": 64}, grid={"k": [2, 4]})
    >>> [cell.name for cell in job.cells()]
    ['k=2', 'k=4']
    """

    data: DataConfig | None = None
    live: LiveConfig | None = None
    out: str | None = None
    init: str | None = None
    device: str = Field(default="auto", description="auto: the GPU of this rank, if there is one.")
    train: dict[str, Any] = Field(default_factory=dict, description="Fields of TrainConfig.")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="Fields and the values to combine.")

    @model_validator(mode="after")
    def _one_value_each(self) -> Job:
        if (self.data is None) == (self.live is None):
            raise ValueError("give data (activations that are there) or live (a model and texts), one of them")
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
        return torch.device(pick_device(self.device))

    def open(self) -> tuple[Any, Any]:
        """The training and validation data."""
        from hubsae.activations import ActivationDataset, PairedActivations

        d = self.data
        assert d is not None

        def opened(path: str, split: str) -> Any:
            options = {"revision": d.revision, "stream": d.stream}
            source = ActivationDataset.open(path, d.config, split, **options)
            if d.target is None:
                return source
            return PairedActivations(source, ActivationDataset.open(path, d.target, split, **options))

        val = opened(d.val or d.path, d.val_split or d.split) if d.val is not None or d.val_split is not None else None
        return opened(d.path, d.split), val

    def plan(self, *, resume: bool = True) -> list[Estimate]:
        """Memory and time of every cell, without training; raises what the run would.

        Where the data is not here, `data.d_in` and `data.rows` stand for it.
        """
        cells, source, val, each = self.cells(), None, None, 1
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if self.live is not None:
            name, each, ranks = self.live.model, len(self.live.layers), 1
            config = require("transformers", extra="train").AutoConfig.from_pretrained(
                name, revision=self.live.revision
            )
            d, rows = int(config.get_text_config().hidden_size), _tokens(cells[0])
            d_out = d if self.live.targets else None
        else:
            assert self.data is not None
            d, d_out, rows = self.data.d_in, self.data.d_out, self.data.rows
            if Path(self.data.path).exists() or d is None or rows is None:
                source, val = self.open()
                d, d_out, rows = source.d, getattr(source, "d_out", None), source.n_rows
        cells = [cell.for_target(d_out) for cell in cells]
        for cell in cells:
            preflight.check_settings([cell], d, rows, ranks=ranks if cell.parallel == "data" else 1)
        if source is not None:
            preflight.check_data(cells, source, val)
            if self.out is not None and resume:
                preflight.check_folder(Path(self.out), preflight.settings_of(cells, source))
        return [estimate(cell, d, rows, self.chosen_device(), ranks, d_out) for cell in cells for _ in range(each)]

    def run(self, *, resume: bool = True, quiet: bool = False) -> list[TrainResult]:
        """Train; run again to go on."""
        if self.live is not None:
            cells, device = self.cells(), self.chosen_device()
            live = self.live.open(cells[0], device)
            found = train_live(cells, live, out=self.out, resume=resume, device=device, quiet=quiet)
            return [result for results in found.values() for result in results]
        rows, val = self.open()
        options: dict[str, Any] = {"out": self.out, "init": self.init, "val": val, "resume": resume, "quiet": quiet}
        options["device"] = self.chosen_device()
        cells = self.cells()
        if len(cells) == 1:
            return [train(cells[0], rows, **options)]
        return train_many(cells, rows, **options)


def _tokens(config: TrainConfig) -> int:
    if config.tokens is None:
        raise ConfigError("live training has no end of its own", hint="say how many tokens: train.tokens=1000000")
    return config.tokens


def load_job(name: str, overrides: Sequence[str] = ()) -> Job:
    """A job from a YAML file, or one of the configs that come with hubsae by its name; `key.path=value` on top."""
    path = Path(name)
    if not path.exists() and (CONFIGS / f"{name}.yaml").is_file():
        path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
        raise ConfigError(f"there is no config {name}", hint=f"a YAML file, or one of: {nearest(name, known)}")
    data = read_yaml(path)
    if any(text.startswith("live.") for text in overrides):
        data.pop("data", None)  # hubsae train FILE --model M --texts T
    for text in overrides:
        key, value = parse_override(text)
        top = key.split(".")[0]
        if top not in Job.model_fields and top in TrainConfig.model_fields:
            key = f"train.{key}"  # hubsae train FILE k=32
        # keys of a grid have dots of their own
        over = {"grid": {key.removeprefix("grid."): value}} if key.startswith("grid.") else nested(key, value)
        data = merge(data, over)
    return compose(Job, [data])
