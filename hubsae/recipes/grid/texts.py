"""Model and texts of a grid search: the tiny world, or a model and a dataset in the layout of GSM8K."""

from __future__ import annotations

from typing import Any, NamedTuple

from hubsae.core.extras import require
from hubsae.recipes.grid.settings import DataSettings, ModelSettings
from hubsae.recipes.steps import Progress


class Subject(NamedTuple):
    """What is searched on."""

    model: Any
    tokenizer: Any
    train: list[Any]
    """Items to harvest from: texts, or conversations."""
    test: list[Any]
    """Items of another split, on which the loss is measured."""
    name: str
    """Model id for the record."""
    revision: str | None
    dataset: str


def load_subject(model: ModelSettings, data: DataSettings, seed: int, progress: Progress | None = None) -> Subject:
    """The model, its tokenizer and the texts; the tiny world is built where it is asked for."""
    if model.id == "tiny":
        from hubsae.recipes.tiny import tiny_world

        world = tiny_world(model.size, seed, progress=progress)
        tiny, tokenizer = world.model, world.tokenizer
        name, revision = f"hubsae/tiny-world-{world.config.size}", world.config.key()
    else:
        tiny = tokenizer = None
        name, revision = model.id, model.revision
    if data.dataset == "tiny":
        from hubsae.recipes.tiny import tiny_world

        world = tiny_world(model.size, seed, progress=progress)
        train, test = [p.record() for p in world.train_problems], [p.record() for p in world.test_problems]
    else:
        datasets = require("datasets", extra="train")
        train, test = (list(datasets.load_dataset(data.dataset, data.config, split=s)) for s in ("train", "test"))
    if tiny is None:
        from hubsae.activations.models import load_model, load_tokenizer

        tiny = load_model(model.id, revision=model.revision, dtype=model.dtype, device=_device())
        tokenizer = load_tokenizer(model.id, revision=model.revision)
        revision = getattr(tiny.config, "_commit_hash", None) or revision
    return Subject(
        model=tiny,
        tokenizer=tokenizer,
        train=[_item(row, data.chat) for row in train[: data.prompts]],
        test=[_item(row, data.chat) for row in test[: data.texts]],
        name=name,
        revision=revision,
        dataset=data.dataset,
    )


def _item(row: Any, chat: bool) -> Any:
    """The bare question, or the conversation of question and answer."""
    if not chat:
        return row["question"]
    return {
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }


def _device() -> str:
    import os

    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
