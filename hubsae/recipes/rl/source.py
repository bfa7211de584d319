"""The model and problems a chain starts from, fixed in the run folder: downloaded or made once, then only read."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubsae.core.errors import ConfigError
from hubsae.core.files import write_text_atomic
from hubsae.hub.client import HubClient
from hubsae.recipes.rl.chain_settings import DataSettings, ModelSettings
from hubsae.recipes.rl.policy import load_tokenizer
from hubsae.recipes.rl.problems import Question, load_questions
from hubsae.recipes.tiny import TinyWorld, tiny_world


@dataclass(frozen=True)
class Source:
    """An opened source."""

    model: str
    """A folder, or a Hub id."""
    revision: str | None
    """The commit, where it comes from the Hub."""
    label: str
    train: list[Question]
    test: list[Question]

    def tokenizer(self) -> Any:
        """The base model's tokenizer, padding on the left."""
        return load_tokenizer(self.model, revision=self.revision)


def fetch_source(
    folder: Path, model: ModelSettings, data: DataSettings, seed: int, progress: Any = None
) -> dict[str, Any]:
    """Make or download model and problems; what is returned is given to `open_source`."""
    if "tiny" in (model.id, data.id):
        world = _tiny(model, data, seed, progress)
        train = [Question(p.question, p.answer) for p in world.train_problems]
        test = [Question(p.question, p.answer) for p in world.test_problems]
        # copied, so that the run stays whole when the cache is emptied
        shutil.copytree(world.model_path, folder / "model")
        found: dict[str, Any] = {"model": "model", "revision": None}
    else:
        commit = _pinned(data.id, data.revision, "dataset")
        train = load_questions(data.id, data.train_split, revision=commit)
        test = load_questions(data.id, data.test_split, revision=commit)
        pinned = _pinned(model.id, model.revision, "model")
        found = {"model": _absolute(model.id), "revision": pinned, "data_revision": commit}
    _write(folder / "train.jsonl", train)
    _write(folder / "test.jsonl", test)
    return {**found, "label": model.label, "train": len(train), "test": len(test)}


def open_source(folder: Path, result: dict[str, Any]) -> Source:
    """What `fetch_source` left in `folder`."""
    inside = folder / result["model"]
    return Source(
        model=str(inside) if inside.is_dir() else result["model"],
        revision=result["revision"],
        label=result["label"],
        train=_read(folder / "train.jsonl"),
        test=_read(folder / "test.jsonl"),
    )


def _tiny(model: ModelSettings, data: DataSettings, seed: int, progress: Any) -> TinyWorld:
    if model.id != data.id:
        raise ConfigError(
            f"model.id is {model.id} and data.id is {data.id}: the tiny model and the tiny problems belong together",
            hint="set both to tiny, or neither",
        )
    return tiny_world(model.tiny_size, seed=seed, progress=progress)


def _pinned(source: str, revision: str | None, kind: str) -> str | None:
    """The commit of a Hub repo, so that every later step reads the same; None for a folder."""
    return None if Path(source).is_dir() else HubClient().resolve(source, revision, repo_type=kind)


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _write(path: Path, questions: list[Question]) -> None:
    lines = [json.dumps({"question": q.question, "answer": q.answer}, ensure_ascii=False) for q in questions]
    write_text_atomic(path, "\n".join(lines) + "\n")


def _read(path: Path) -> list[Question]:
    return [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
