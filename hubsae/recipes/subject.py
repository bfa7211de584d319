"""What a recipe is about: a model with its tokenizer, and rows of text in two splits, all of it pinned.

    world("tiny") or world("small")     made on this machine, offline
    ids of a model and a dataset        from a Hub, each fixed to the commit it had when the run began
    folders                             as they are

Rows are `question`/`answer` as in GSM8K, or `messages`, or `text`; `fetch_subject` keeps them in the run folder, and
every later step reads what lies there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hubsae.activations.models import load_model, load_tokenizer
from hubsae.core.errors import ConfigError, DataError, NotFoundError
from hubsae.core.extras import require
from hubsae.core.files import write_text_atomic
from hubsae.core.quiet import quiet
from hubsae.core.settings import Settings
from hubsae.core.text import MESSAGE_KEYS, TEXT_KEYS
from hubsae.hub.client import HubClient
from hubsae.recipes.steps import StepContext
from hubsae.recipes.worlds import World
from hubsae.rl.problems import Question

WORLDS = ("tiny", "small")
"""Names that `world` knows; anything else is a folder or an id on a Hub."""
COPIED_BELOW = 50_000_000
"""Bytes below which a world's model is copied into the run."""


class ModelSettings(Settings):
    """The language model."""

    id: str = Field(description="Model on the Hub, a folder, or the name of a world: tiny, small.")
    revision: str | None = None
    dtype: str | None = Field(default=None, description="Type it runs in; default: as its checkpoint says.")
    size: str = Field(default="tiny", description="Size of the tiny world: tiny, or quick for tests.")
    name: str = Field(default="", description="What records call it; default: the id.")
    d_model: int = Field(default=896, description="This and the next two are used for the estimates of a dry run only.")
    layers: int = 24
    parameters: int = 494_000_000

    @property
    def label(self) -> str:
        """Name for records."""
        return self.name or self.id


class DataSettings(Settings):
    """The texts."""

    id: str = Field(description="Dataset on the Hub, a folder, or the name of a world.")
    kind: Literal["problems", "chats", "texts"] = Field(default="problems", description="Which rows of a world.")
    config: str | None = Field(default="main", description="Config of the dataset.")
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    rows: int | None = Field(default=None, description="Rows kept of each split; default: all.")
    samples: int = Field(default=7473, description="This and the next are used for the estimates of a dry run only.")
    tokens_per_sample: float = 60


@dataclass(frozen=True)
class Subject:
    """An opened subject."""

    model: str
    """A folder, or a Hub id."""
    revision: str | None
    """The commit, where it comes from a Hub."""
    label: str
    """What records call the model."""
    dataset: str
    """What records call the texts."""
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]

    def tokenizer(self) -> Any:
        """The model's tokenizer, padding on the left."""
        tokenizer = load_tokenizer(self.model, revision=self.revision)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, device: Any = None, dtype: str | None = None) -> Any:
        """The model, for evaluation."""
        with quiet():
            return load_model(self.model, revision=self.revision, device=device, dtype=dtype)

    def problems(self, split: str = "train") -> list[Question]:
        """The rows as problems with answers."""
        rows = self.train if split == "train" else self.test
        if rows and not {"question", "answer"} <= rows[0].keys():
            raise DataError(
                f"{self.dataset} has the columns {', '.join(rows[0])}, not question and answer",
                hint="use a dataset in the layout of openai/gsm8k",
            )
        return [Question(row["question"], row["answer"]) for row in rows]


def world(name: str, *, size: str = "tiny", seed: int = 0, progress: Any = None) -> World:
    """A world by name: model, tokenizer, problems, chats and texts, made on this machine and kept.

    >>> world("tiny").model_path    # doctest: +SKIP
    """
    if name == "tiny":
        from hubsae.recipes.tiny import tiny_world

        return tiny_world(size, seed, progress=progress)
    if name == "small":
        from hubsae.recipes.small import small_world

        return small_world()
    raise NotFoundError(f"no world {name!r}", hint=f"worlds: {', '.join(WORLDS)}")


def fetch_subject(
    folder: Path, model: ModelSettings, data: DataSettings, seed: int, progress: Any = None
) -> dict[str, Any]:
    """Make or download model and texts into `folder`; what is returned is given to `open_subject`."""
    if model.id in WORLDS or data.id in WORLDS:
        if model.id != data.id:
            raise ConfigError(
                f"model.id is {model.id} and data.id is {data.id}: model and texts of a world belong together",
                hint="set both to the same world, or neither to one",
            )
        found, made = _world_model(folder, model, seed, progress)
        train, test = (getattr(made, f"{split}_{data.kind}") for split in ("train", "test"))
        train, test = ([row if isinstance(row, dict) else row.record() for row in rows] for rows in (train, test))
        label, dataset = model.name or made.model_id, f"{made.folder.name.partition('-')[0]}-{data.kind}"
    else:
        commit = _pinned(data.id, data.revision, "dataset")
        train, test = (_rows(data, split, commit) for split in (data.train_split, data.test_split))
        found = _hub_model(model) | {"data_revision": commit}
        label, dataset = model.label, data.id
    train, test = train[: data.rows], test[: data.rows]
    for split, rows in (("train", train), ("test", test)):
        write_jsonl(folder / f"{split}.jsonl", rows)
    return {**found, "label": label, "dataset": dataset, "train": len(train), "test": len(test)}


def fetch_model(folder: Path, model: ModelSettings, seed: int, progress: Any = None) -> tuple[dict[str, Any], Any]:
    """Make or pin a model alone, for a recipe that gathers its texts itself; and the world it is of, if any."""
    if model.id in WORLDS:
        found, made = _world_model(folder, model, seed, progress)
        return found | {"label": model.name or made.model_id}, made
    return _hub_model(model) | {"label": model.label}, None


def _world_model(folder: Path, model: ModelSettings, seed: int, progress: Any) -> tuple[dict[str, Any], World]:
    made = world(model.id, size=model.size, seed=seed, progress=progress)
    found: dict[str, Any] = {"model": str(made.model_path), "revision": None, "world": made.folder.name}
    if sum(path.stat().st_size for path in made.model_path.iterdir()) < COPIED_BELOW:
        # so that the run stays whole when the cache is emptied
        shutil.copytree(made.model_path, folder / "model", dirs_exist_ok=True)
        found["model"] = "model"
    return found, made


def _hub_model(model: ModelSettings) -> dict[str, Any]:
    here = Path(model.id).is_dir()
    pinned = _pinned(model.id, model.revision, "model")
    return {"model": str(Path(model.id).resolve()) if here else model.id, "revision": pinned}


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON, one a line."""
    return write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Any]:
    """The inverse of `write_jsonl`."""
    # not splitlines: real texts hold other separators of lines, which JSON leaves as they are
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def open_subject(folder: Path, result: dict[str, Any]) -> Subject:
    """What `fetch_subject` left in `folder`."""
    inside = folder / result["model"]
    train, test = (read_jsonl(folder / f"{split}.jsonl") for split in ("train", "test"))
    model = str(inside) if inside.is_dir() else result["model"]
    return Subject(model, result["revision"], result["label"], result["dataset"], train, test)


def subject_of(ctx: StepContext, step: str = "subject") -> Subject:
    """The subject that a step of the run fetched."""
    return open_subject(ctx.path(step), ctx.result(step))


def _rows(data: DataSettings, split: str, revision: str | None) -> list[dict[str, Any]]:
    """The columns that say something, of one split."""
    datasets = require("datasets", extra="train")
    table = datasets.load_dataset(data.id, data.config, split=split, revision=revision)
    names = table.column_names
    wanted = [n for n in ("question", "answer") if {"question", "answer"} <= set(names)]
    wanted = wanted or [n for n in (*MESSAGE_KEYS, *TEXT_KEYS) if n in names][:1]
    if not wanted:
        raise DataError(
            f"{data.id} ({split}) has the columns {', '.join(names)}, none of which is known to hold text",
            hint="use a dataset with question and answer, messages, or text",
        )
    return [{name: row[name] for name in wanted} for row in table]


def _pinned(source: str, revision: str | None, kind: str) -> str | None:
    """The commit of a Hub repo, so that every later step reads the same; None for a folder."""
    return None if Path(source).is_dir() else HubClient().resolve(source, revision, repo_type=kind)
