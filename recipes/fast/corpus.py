"""The texts of a run: chats without shared runs of words, some of them put aside, plain texts; and their streams."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hubsae.activations.samples import Preparation, conversation
from hubsae.activations.stream import Stream, open_stream
from hubsae.activations.texts import load_texts
from hubsae.core.errors import DataError
from hubsae.core.text import MESSAGE_KEYS, TEXT_KEYS
from hubsae.recipes.subject import Subject, fetch_model, read_jsonl, write_jsonl

from .dedup import Deduplicator
from .settings import Config, Source

TEXTS = "texts.jsonl"
SEEN_FIRST = 100_000
"""Chats looked at before one is given up for good: a stream of nothing usable is an error, not an endless wait."""


def gather(folder: Path, config: Config, progress: Any = None) -> dict[str, Any]:
    """Write model, chats and texts into `folder`; what is returned is for `open_subject`."""
    data = config.data
    found, world = fetch_model(folder, config.model, config.seed, progress)
    if world is not None:
        rows: Iterable[Any] = [*world.test_chats, *world.train_chats]
        texts, dataset = world.train_texts, f"{world.folder.name.partition('-')[0]}-chats"
        held = len(world.test_chats)
    else:
        rows = in_turn([stream_of(source) for source in data.chats])
        texts, dataset, held = stream_of(data.texts), ", ".join(source.id for source in data.chats), data.test_chats
    usable = Usable(open_subject_tokenizer(folder, found))
    seen = Deduplicator(data.ngram, megabytes=data.dedup_megabytes)
    kept = seen.filter(usable(rows))
    test, train = [], []
    for number, chat in enumerate(kept):
        (test if len(test) < data.test_chats and number < held else train).append(chat)
        if progress is not None and number % 500 == 0:
            progress(len(train), data.most_chats, "chats")
        if len(train) >= data.most_chats:
            break
    if not train or not test:
        raise DataError(f"{len(train)} chats to train on and {len(test)} to test on are left", hint="see data.chats")
    plain = [{"text": words} for row in itertools.islice(texts, data.most_texts) if (words := text_of(row))]
    for name, part in (("train.jsonl", train), ("test.jsonl", test), (TEXTS, plain)):
        write_jsonl(folder / name, part)
    return {
        **found, "dataset": dataset, "text_dataset": f"{dataset.partition('-')[0]}-texts" if world else data.texts.id,
        "train": len(train), "test": len(test), "texts": len(plain), "kept": seen.kept, "skipped": seen.skipped,
        "unusable": usable.refused, "chance": seen.chance,
    }  # fmt: skip


class Usable:
    """Chats as `messages` that end with an answer and that the template takes; the others are counted."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.refused, self.passed = tokenizer, 0, 0

    def __call__(self, rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Those of a stream."""
        for row in rows:
            messages = messages_of(row)
            if messages is None or rendered(self.tokenizer, messages) is None:
                self.refused += 1
                if not self.passed and self.refused > SEEN_FIRST:
                    raise DataError(f"none of {self.refused:,} chats can be used", hint="see data.chats")
                continue
            self.passed += 1
            yield {"messages": messages}


def messages_of(row: Any) -> list[dict[str, str]] | None:
    """The messages of a row whose last one is an answer; None where there are none."""
    key = next((key for key in MESSAGE_KEYS if row.get(key)), None)
    if key is None:
        return None
    turns = json.loads(row[key]) if isinstance(row[key], str) else row[key]  # one of the sources keeps JSON as text
    found = conversation({"messages": turns}, Preparation("prompt+response"))
    messages = [{"role": m["role"], "content": m["content"]} for m in found]
    good = len(messages) > 1 and messages[-1]["role"] == "assistant"
    return messages if good and all(isinstance(text, str) for m in messages for text in m.values()) else None


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """A chat in its template; None where that refuses it."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:
        return None


def stream_of(source: Source) -> Iterator[Any]:
    """The rows of a dataset on a Hub, as they come."""
    yield from load_texts(source.id, config=source.config, split=source.split, streaming=True)[0]


def in_turn(streams: list[Iterator[Any]]) -> Iterator[Any]:
    """A row from each, again and again, until all have ended.

    >>> list(in_turn([iter("abc"), iter("x")]))
    ['a', 'x', 'b', 'c']
    """
    nothing = object()
    for rows in itertools.zip_longest(*streams, fillvalue=nothing):
        yield from (row for row in rows if row is not nothing)


def text_of(row: Any) -> str:
    """The text of a row of plain texts."""
    return next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), "")


def open_subject_tokenizer(folder: Path, found: dict[str, Any]) -> Any:
    """The tokenizer of a model that was fetched."""
    inside = folder / found["model"]
    model = str(inside) if inside.is_dir() else found["model"]
    return Subject(model, found["revision"], found["label"], "", [], []).tokenizer()


def streams(
    subject: Subject, folder: Path, config: Config, method: str, model: Any, hook: str
) -> tuple[Stream, Callable[[], Iterable[Any]]]:
    """The stream of a method, and its texts from their beginning each time they are asked for."""
    data, tokenizer = config.data, subject.tokenizer()
    options: dict[str, Any] = {"tokenizer": tokenizer, "batch_tokens": config.train.batch_tokens}
    options["window"] = config.train.window
    if method == "fast":
        stream = open_stream(model, [hook], mode="prompt+response", max_length=data.max_length, **options)
        return stream, lambda: subject.train
    options |= {"mode": "packed", "max_length": data.block, "separate": method == "bt-p"}
    stream = open_stream(model, [hook], special_tokens=method == "bt-p", **options)
    if method == "bt-p":
        plain = read_jsonl(folder / TEXTS)
        return stream, lambda: plain
    return stream, lambda: ({"text": rendered(tokenizer, row["messages"])} for row in subject.train)
