"""What recipes about one layer of a model share: the settings of the place, its subject and its activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from hubsae.activations import ActivationDataset, harvest
from hubsae.core.hooks import HookPoint
from hubsae.core.text import MESSAGE_KEYS, TEXT_KEYS
from hubsae.recipes.standard import Activations, pick_device
from hubsae.recipes.steps import StepContext
from hubsae.recipes.subject import DataSettings, Subject, fetch_subject, subject_of


class LayerData(DataSettings):
    """The texts, and the place where activations are read."""

    layer: int = Field(ge=0, description="0-based block whose output is read; the last one's is before the final norm.")
    max_tokens: int = Field(ge=1000, description="Activations harvested.")
    max_length: int = 512
    validation_fraction: float = Field(default=0.1, gt=0, lt=1, description="Share of conversations put aside.")


class OneLayer:
    """Steps that such recipes have in common; a recipe adds its own in a class below this one.

    The config has a seed, a model, and data that name the layer.
    """

    def __init__(self, config: Any):
        self.config = config
        self.hook = HookPoint.parse(config.data.layer).name
        self.id = f"layer{config.data.layer}"

    def subject(self, ctx: StepContext) -> dict[str, Any]:
        """Model and texts: made, opened or downloaded, and fixed."""
        return fetch_subject(ctx.folder, self.config.model, self.config.data, self.config.seed, ctx.progress)

    def activations(self, ctx: StepContext) -> dict[str, Any]:
        """Write the activations of the layer; the tokens of a conversation keep their role, turn and group."""
        data, subject = self.config.data, subject_of(ctx)
        model, texts = self.load_model(subject), self.training_texts(subject)
        harvest(
            model, texts, [self.hook], out=ctx.folder, tokenizer=subject.tokenizer(),
            mode="prompt+response" if texts and isinstance(texts[0], dict) else "text", max_length=data.max_length,
            max_tokens=data.max_tokens, validation_fraction=data.validation_fraction, split_by="sample",
            split_seed=self.config.seed, progress=False,
            source={"model": subject.label, "text_dataset": subject.dataset},
        )  # fmt: skip
        sizes = {split: len(self.rows(ctx.folder, split)) for split in ("train", "validation")}
        place = self.place(subject, model, data.max_length)
        return {"model": subject.label, "dataset": subject.dataset, "tokens": sizes, "place": place}

    def training_texts(self, subject: Subject) -> list[Any]:
        """What is harvested, as `harvest` takes it."""
        return items(subject.train)

    def load_model(self, subject: Subject) -> Any:
        """The model on the device that is there, in the type that the settings say."""
        return subject.load(pick_device(), self.config.model.dtype)

    def rows(self, folder: Path, split: str = "train") -> ActivationDataset:
        """The activations that a step left, in one of the splits."""
        return Activations(folder).open(self.hook, split)

    def place(self, subject: Subject, model: Any, context: int | None) -> dict[str, Any]:
        """What the records of SAEs say of model and hook point; `context` is the longest text in tokens."""
        point = HookPoint.parse(self.hook)
        return {
            "base_model": {"id": subject.label, "revision": subject.revision, "dtype": self.config.model.dtype},
            "hook": {
                "layer": point.layer, "kind": point.kind, "module_path": point.module_path(model),
                "transformer_lens": point.transformer_lens, "context_size": context,
            },
        }  # fmt: skip


def message_key(rows: list[dict[str, Any]]) -> str | None:
    """The column of conversations, where rows have one."""
    return next((name for name in MESSAGE_KEYS if rows and name in rows[0]), None)


def items(rows: list[dict[str, Any]]) -> list[Any]:
    """Rows as a harvest, a splice and an index take them: conversations, or texts.

    >>> items([{"question": "2 + 2?"}]), items([{"conversation": []}])
    (['2 + 2?'], [{'messages': []}])
    """
    key = message_key(rows)
    if key is not None:
        return [{"messages": row[key]} for row in rows]
    return [next(row[name] for name in TEXT_KEYS if name in row) for row in rows]
