"""Activations as they come out of a model: texts in, batches of vectors with their labels out, nothing on disk.

    texts -> windows of samples -> batches by length -> one forward, stopped early -> kept rows, per hook point

`harvest` writes these batches to files, live training mixes them in a buffer. Windows and batches follow from the
samples alone: ranks share out the batches, and whoever continues at a `Place` gets exactly what would have followed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hubsae.activations.batching import batches_of
from hubsae.activations.capture import capture, padded
from hubsae.activations.generation import generate_responses
from hubsae.activations.layout import TRUNCATED
from hubsae.activations.models import load_model, load_tokenizer, merge_adapter
from hubsae.activations.ranks import Ranks
from hubsae.activations.rewards import Scorer, score_samples
from hubsae.activations.samples import BadSample, Mode, Preparation, Preparer, Sample, Select, kept_rows, pack
from hubsae.core.errors import ConfigError, DataError, HubSAEError
from hubsae.core.hooks import HookPoint
from hubsae.core.scopes import NORM, Scope, excluding

WINDOW = 1024
"""Samples sorted by length together: enough that batches hold almost no padding."""
PROBE_SAMPLES, PROBE_TOKENS = 16, 32
"""Beginnings of samples looked at to choose a scale: massive activations sit on the first tokens, and the scale leaves
room above them. A look at whole batches would cost small harvests half their time."""


class Place(NamedTuple):
    """A point in the stream: the batch `batch` of window `window` comes next."""

    window: int = 0
    batch: int = 0


class Probe(NamedTuple):
    """A first look at a hook point."""

    d: int
    largest: float


@dataclass
class HarvestBatch:
    """The kept tokens of one forward pass, sample by sample."""

    vectors: dict[str, Tensor]
    """[rows, d] by hook point (`layers.15`), in the type the model computes in, on the CPU"""
    labels: dict[str, np.ndarray]
    """[rows] each: token_id, position, sample_id, is_prompt, and what is known of chats"""
    place: Place
    """Where the stream goes on behind this batch."""
    window: int = 0
    """The window that its samples are of."""


@dataclass
class Counts:
    """What a stream has seen so far, for the record and for the one who waits."""

    samples: int = 0
    tokens: int = 0
    """Tokens computed."""
    empty: int = 0
    """Samples without a token to keep; they leave no row."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples that could not be used."""
    skipped: int = 0
    """Samples found finished when a run was resumed."""
    padded: int = 0
    """Tokens computed, padding included."""
    passed: int = 0
    """Samples of the data that were looked at, whatever became of them."""
    planned: int = 0
    """Tokens of the batches that are computed, or will be, out of what was looked at ..."""
    planned_samples: int = 0
    """... and the samples of the windows they are in."""


@dataclass
class Stream:
    """Everything a run of a model over texts needs, settled before the first forward pass."""

    model: nn.Module
    tokenizer: Any
    hooks: list[HookPoint]
    how: Preparation
    select: Select = "all"
    exclude: Scope = field(default_factory=Scope)
    """What is kept (`excluding(...)`)."""
    budget: int = 8192
    window: int = WINDOW
    ranks: Ranks = field(default_factory=Ranks)
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    carried: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_samples: int | None = None
    max_tokens: int | None = None
    strict: bool = False
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        if not self.hooks:
            raise ConfigError("no hook points were given", hint="pass layers, such as [6, 12, 18]")
        for hook in self.hooks:
            hook.module_path(self.model)  # refuses layers that do not exist
        table = getattr(self.model, "get_input_embeddings", lambda: None)()
        known = len(self.tokenizer) if self.tokenizer is not None else 0
        if isinstance(table, nn.Embedding) and known > table.num_embeddings:
            raise ConfigError(
                f"the tokenizer knows {known:,} tokens, the model {table.num_embeddings:,}: it is another model's",
                hint="leave tokenizer out, and the model's own is taken",
            )
        if self.max_tokens is not None and self.how.mode == "generate":
            raise ConfigError("max_tokens cannot be kept with generated responses", hint="use max_samples")
        if self.select != "all" and self.how.mode in ("text", "packed"):
            hint = "mode='prompt+response' or 'generate'"
            raise ConfigError(f"select={self.select!r} needs a mode with prompts", hint=hint)
        self.preparer = Preparer(self.tokenizer, self.how, strict=self.strict)
        special = getattr(self.tokenizer, "all_special_ids", None) if self.tokenizer is not None else None
        self.special = None if special is None else np.array(sorted(special), dtype=np.int64)
        self.texts: str | None = None
        """Where ranks take whole windows: the hash of what the one under way was made of; packed, of all up to it."""
        have = {"token_id", "position", "sample_id", "is_prompt", *self.columns}
        if missing := [c for c in self.exclude.columns if c not in have]:
            hint = f"columns here: {', '.join(sorted(have))}"
            if NORM in missing:
                hint = "massive tokens show in the statistics of a harvest; training leaves them out: exclude="
            raise ConfigError(f"exclude needs the label {missing[0]!r}, which these texts do not have", hint=hint)
        if self.select == "assistant" and "is_assistant" not in have:
            raise ConfigError("select='assistant' needs chats", hint="do not pass chat=False (--raw)")

    @property
    def columns(self) -> dict[str, str]:
        """Names and types of the label columns beside the four that every dataset has."""
        found = dict.fromkeys(self.scorers, "float32") | dict(self.carried) | self.preparer.columns
        if self.special is not None:
            found["is_special"] = "bool"
        if self.how.max_length is not None and self.how.mode != "packed":
            found[TRUNCATED] = "bool"
        return found

    def batches(
        self,
        data: Iterable[Any],
        *,
        start: Place = Place(),
        done: Callable[[np.ndarray], np.ndarray] | None = None,
        n_items: int | None = None,
        behind: Callable[[int], object] | None = None,
    ) -> Iterator[HarvestBatch]:
        """The batches of this rank from `start` on. `done` says of sample ids [n] which need not be computed.

        With `behind` ranks take whole windows, and it is called with the number of each window of the data: of one of
        this rank when its batches are through.
        """
        by_window = (
            self.how.mode == "generate"
            or behind is not None
            or (self.max_tokens is None and n_items is not None and n_items >= 8 * self.window * self.ranks.world_size)
        )
        packed, mine = self.how.mode == "packed", self.takes if by_window else None
        self.texts = None if behind is None else ""
        windows = _windows(data, self.window, self.max_samples, None if packed else mine)
        if packed:
            source = self._packed(windows, counts=self.ranks.rank == 0 or behind is not None)
        else:
            source = self._prepared(windows, done, by_window, start)
        was_training = self.model.training
        self.model.eval()
        try:
            for number, samples in enumerate(source):
                if number < start.window:
                    continue
                batches = batches_of(samples, self.budget)
                todo = []
                for place, batch in enumerate(batches):
                    # whole windows where there are many, else every n-th batch
                    mine = self.takes(number if by_window else number + place)
                    if not mine or (number == start.window and place < start.batch):
                        continue
                    finished = done(np.array([s.id for s in batch])) if done is not None else np.zeros(len(batch), bool)
                    self.counts.skipped += int(finished.sum())
                    if not finished.all():
                        todo.append((place, batch))
                self.counts.planned += sum(len(s.ids) for _, batch in todo for s in batch)
                self.counts.planned_samples += len(samples) if todo else 0
                for place, batch in todo:
                    then = Place(number, place + 1) if place + 1 < len(batches) else Place(number + 1)
                    yield HarvestBatch(*self._forward(batch), then, number)
                if behind is not None:
                    behind(number)
        finally:
            self.model.train(was_training)

    def takes(self, number: int) -> bool:
        """Whether a window is this rank's, where ranks take whole ones."""
        return number % self.ranks.world_size == self.ranks.rank

    def expected(self, n_items: int | None) -> float | None:
        """Tokens that this rank will have computed in the end, as far as one can say."""
        counts = self.counts
        if self.max_tokens is not None:
            return float(max(self.max_tokens // self.ranks.world_size, counts.tokens))
        if n_items is None or not counts.planned_samples:
            return None
        return counts.planned * (1 + max(0, n_items - counts.passed) / counts.planned_samples)

    def probe(self, items: Sequence[Any]) -> dict[str, Probe]:
        """Width and largest magnitude at each hook point over the beginnings of some items."""
        preparer = Preparer(self.tokenizer, self._as_text() if self.how.mode == "packed" else self.how)
        samples, _ = preparer.prepare(items, 0)
        beginnings = [s.ids[:PROBE_TOKENS] for s in samples if s.ids][:PROBE_SAMPLES] or [[0]]
        found = {}
        was_training = self.model.training
        self.model.eval()
        for name, hidden in capture(self.model, *padded(beginnings), self.hooks).items():
            found[name] = Probe(hidden.shape[1], float(hidden.float().abs().amax()))
        self.model.train(was_training)
        return found

    def _as_text(self) -> Preparation:
        return replace(self.how, mode="text", max_length=None)

    def _prepared(
        self,
        windows: Iterator[tuple[int, Sequence[Any]]],
        done: Callable[[np.ndarray], np.ndarray] | None,
        by_window: bool,
        start: Place,
    ) -> Iterator[list[Sample]]:
        """Windows of samples, tokenised, answered and scored; empty lists stand for those that are not ours."""
        total = 0
        for number, (first, items) in enumerate(windows):
            self.counts.passed = first + len(items)
            mine = not by_window or self.takes(number)
            if mine and self.texts is not None:
                self.texts = hash_texts(items)
            ids = np.arange(first, first + len(items))
            finished = number < start.window or (done is not None and bool(done(ids).all()))
            if not mine or (finished and self.max_tokens is None):
                self.counts.skipped += len(items) if mine else 0
                yield []
                continue
            samples, bad = self.preparer.prepare(items, first)
            if self.how.mode == "generate":
                samples = generate_responses(
                    self.model, samples, self.tokenizer, options=self.generation, seed=self.seed, budget=self.budget
                )
            for sample in samples:
                sample.columns |= {name: sample.item[name] for name in self.carried}
            kept = [int(self._kept(sample).sum()) for sample in samples]
            if self.max_tokens is not None:
                # the samples up to the one that reaches the limit
                before = np.cumsum([total, *kept[:-1]]) if kept else np.empty(0)
                count = int((before < self.max_tokens).sum())
                samples, kept = samples[:count], kept[:count]
                total += sum(kept)
            score_samples(samples, self.scorers, self.tokenizer)
            if self.ranks.rank == 0 or by_window:  # samples are counted once, whoever computes them
                self.counts.samples += len(samples)
                self.counts.empty += sum(rows == 0 for rows in kept)
                self.counts.bad += bad
            yield samples
            if self.max_tokens is not None and total >= self.max_tokens:
                return

    def _packed(self, windows: Iterator[tuple[int, Sequence[Any]]], counts: bool) -> Iterator[list[Sample]]:
        """Windows of packed blocks; a block is a sample. All ranks see all texts; those of one count them."""
        assert self.how.max_length is not None
        preparer = Preparer(self.tokenizer, self._as_text(), strict=self.strict)

        def texts() -> Iterator[Sample]:
            for first, items in windows:
                if self.texts is not None:
                    self.texts = hash_texts(items, self.texts)
                samples, bad = preparer.prepare(items, first)
                self.counts.bad += bad if counts else []
                yield from samples
                self.counts.passed = first + len(items)

        separator = getattr(self.tokenizer, "eos_token_id", None) if self.how.separate else None
        packed = pack(texts(), self.how.max_length, separator)
        if self.max_tokens is not None:
            packed = itertools.islice(packed, -(-self.max_tokens // self.how.max_length))
        numbered = (Sample(number, ids, 0) for number, ids in enumerate(packed))
        while window := list(itertools.islice(numbered, self.window)):
            score_samples(window, self.scorers, self.tokenizer)
            self.counts.samples += len(window) if counts else 0
            yield window

    def _labels(self, sample: Sample) -> dict[str, np.ndarray]:
        if TRUNCATED in self.columns:
            sample.columns[TRUNCATED] = sample.truncated
        extra = [name for name in self.columns if name != "is_special" and name in sample.columns]
        return sample.labels(self.special, extra)

    def _kept(self, sample: Sample) -> np.ndarray:
        if self.select == "all" and not self.exclude.terms:
            return np.ones(len(sample.ids), dtype=bool)
        return kept_rows(self._labels(sample), self.select, self.exclude)

    def _forward(self, batch: list[Sample]) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        """Activations and labels of the kept tokens of a batch, sample by sample."""
        ids, mask = padded([s.ids for s in batch])
        keep = torch.zeros_like(mask)
        parts: list[dict[str, np.ndarray]] = []
        for row, sample in enumerate(batch):
            labels = self._labels(sample)
            rows = kept_rows(labels, self.select, self.exclude)
            keep[row, : len(rows)] = torch.from_numpy(rows)
            parts.append({name: values[rows] for name, values in labels.items()})
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self.counts.tokens += int(mask.sum())
        self.counts.padded += mask.numel()
        if not bool(keep.any()):
            return {}, columns
        found = capture(self.model, ids, mask, self.hooks, keep)
        # what is not float32 already travels as it is: two bytes a value
        return {name: hidden.cpu() for name, hidden in found.items()}, columns


def open_stream(
    model: nn.Module | str | Path,
    hook_points: Sequence[str | int | HookPoint] | str | int | HookPoint,
    *,
    tokenizer: Any = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    model_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    token: str | bool | None = None,
    mode: Mode = "text",
    select: Select = "all",
    exclude: Sequence[str] = (),
    max_length: int | None = None,
    max_samples: int | None = None,
    max_tokens: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    text_column: str | None = None,
    special_tokens: bool = True,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    scorers: Mapping[str, Scorer] | None = None,
    columns: Mapping[str, str] | None = None,
    batch_tokens: int | None = None,
    window: int | None = None,
    strict: bool = False,
    separate: bool = True,
    ranks: Ranks | None = None,
    needs_tokenizer: bool = True,
) -> Stream:
    """A stream of activations of `model` at `hook_points`; the options are those of `harvest`, and one more:

    `separate=False` packs texts without an end-of-text token between them, as chats in their template are packed.

    >>> import transformers
    >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...                                   num_attention_heads=2, num_key_value_heads=2)
    >>> stream = open_stream(transformers.LlamaForCausalLM(config), [1])
    >>> [batch.vectors["layers.1"].shape for batch in stream.batches([[1, 2, 3], [4, 5]])]
    [torch.Size([5, 16])]
    """
    place = ranks or Ranks.find()
    if isinstance(model, (str, Path)):
        if tokenizer is None:
            tokenizer = _tokenizer_of(str(model), revision, token, needs_tokenizer)
        at = device or (f"cuda:{place.local}" if torch.cuda.is_available() else "cpu")
        live = load_model(model, revision=revision, adapter=adapter, dtype=model_dtype, device=at, token=token)
    else:
        live = merge_adapter(model, adapter, token=token) if adapter is not None else model
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer, token=token)
    points = [hook_points] if isinstance(hook_points, (str, int, HookPoint)) else list(hook_points)
    how = Preparation(
        mode, max_length, chat, system, prompt_column, response_column, text_column, special_tokens,
        template_options or {}, separate,
    )  # fmt: skip
    return Stream(
        live, tokenizer, sorted({HookPoint.parse(point) for point in points}), how, select, excluding(exclude),
        batch_tokens or (8192 if next(live.parameters()).device.type == "cpu" else 65536),
        window or (min(WINDOW, 256) if mode == "generate" else WINDOW),
        place, dict(scorers or {}), dict(columns or {}), dict(generation or {}), seed, max_samples, max_tokens, strict,
    )  # fmt: skip


def hash_texts(items: Iterable[Any], before: str = "") -> str:
    """A short hash of items as they are given, behind those that `before` is of.

    >>> hash_texts(["a", [1, 2]]) == hash_texts(["a", (1, np.int64(2))]) != hash_texts(["a"])
    True
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        return value.tolist() if hasattr(value, "tolist") else type(value).__name__

    digest = hashlib.sha256(before.encode())
    for item in items:
        digest.update(json.dumps(item, default=plain, skipkeys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def _tokenizer_of(name: str, revision: str | None, token: str | bool | None, needed: bool) -> Any:
    try:
        return load_tokenizer(name, revision=revision, token=token)
    except HubSAEError:
        if needed:
            raise
        return None  # token ids need none


def _windows(
    data: Iterable[Any], size: int, most: int | None, wanted: Callable[[int], bool] | None
) -> Iterator[tuple[int, Sequence[Any]]]:
    """Consecutive items with the number of the first.

    Of data that can be cut (a list, a `datasets.Dataset`) windows that are not wanted are not read: numbers stand for
    their items.
    """
    cut = getattr(data, "select", None) or (isinstance(data, Sequence) and (lambda rows: data[rows.start : rows.stop]))
    if wanted is not None and cut:
        n = min(len(data), most if most is not None else len(data))  # pyright: ignore[reportArgumentType]
        for first in range(0, n, size):
            rows = range(first, min(first + size, n))
            yield first, list(cut(rows)) if wanted(first // size) else rows
        return
    items, first = itertools.islice(iter(data), most), 0
    while chunk := list(itertools.islice(items, size)):
        yield first, chunk
        first += len(chunk)
    if not first:
        raise DataError("there is no data to harvest from", hint="the dataset is empty")
