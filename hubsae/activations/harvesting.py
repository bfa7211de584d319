"""Harvest: run texts through a model and write the activations at hook points as a dataset.

    texts -> windows of samples -> batches by length -> one forward, stopped early -> rows -> a file per hook

Windows and batches follow from the samples alone. Ranks share out the batches, a resumed run skips those whose
samples lie in finished files, and either way the same numbers are written.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hubsae.activations.activation_set import ActivationSet
from hubsae.activations.batching import batches_of, is_mine
from hubsae.activations.capture import capture, padded
from hubsae.activations.generation import generate_responses
from hubsae.activations.layout import SHARD_BYTES, TRUNCATED, config_name, shards_in
from hubsae.activations.manifest import finalize
from hubsae.activations.models import load_model, load_tokenizer, merge_adapter, weights_id
from hubsae.activations.parquet_source import ParquetSource
from hubsae.activations.ranks import Ranks
from hubsae.activations.rewards import Scorer, score_samples
from hubsae.activations.samples import Mode, Preparation, Sample, Select, pack, prepare
from hubsae.activations.sources import LocalFile
from hubsae.activations.splits import SplitRule
from hubsae.activations.writer import ActivationWriter, scale_for
from hubsae.core.errors import ConfigError, DataError, HubSAEError
from hubsae.core.hooks import HookPoint

WINDOW = 1024
"""Samples sorted by length together: enough that batches hold almost no padding."""
QUEUE = 4
"""Batches that may wait for the writer, which runs beside the model."""
PROBE_SAMPLES, PROBE_TOKENS = 16, 32
"""Beginnings of samples looked at to choose a scale: massive activations sit on the first tokens, and the scale leaves
room above them. A look at whole batches would cost small harvests half their time."""


@dataclass
class Counts:
    """What a harvest did, for the record."""

    samples: int = 0
    tokens: int = 0
    rows: int = 0
    empty: int = 0
    """Samples without a token to keep; they leave no row."""
    skipped: int = 0
    """Samples found finished when a run was resumed."""
    padded: int = 0
    """Tokens computed, padding included."""


@dataclass
class _Plan:
    """Everything a harvest needs, settled before the first forward pass."""

    model: nn.Module
    tokenizer: Any
    hooks: list[HookPoint]
    how: Preparation
    select: Select
    budget: int
    window: int
    ranks: Ranks
    scorers: Mapping[str, Scorer]
    carried: Mapping[str, str]
    generation: Mapping[str, Any]
    seed: int
    special: np.ndarray | None
    max_tokens: int | None
    counts: Counts = field(default_factory=Counts)


def harvest(
    model: nn.Module | str | Path,
    data: Iterable[Any],
    hook_points: Sequence[str | int | HookPoint] | str | int | HookPoint,
    *,
    out: str | Path,
    tokenizer: Any = None,
    mode: Mode = "text",
    stage: str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    model_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    token: str | bool | None = None,
    dtype: str = "float16",
    scale: float | str = "auto",
    select: Select = "all",
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
    validation_fraction: float = 0.0,
    split_by: str = "sample",
    split_seed: int = 0,
    batch_tokens: int | None = None,
    window: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    shard_seconds: float | None = 900.0,
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ActivationSet:
    """Write the activations of `model` on `data` at `hook_points` into the folder `out`; resumes a killed run.

    `model` is a transformers model in memory, a folder or an id; `data` a list, a `datasets.Dataset` or any
    iterable of texts, prompt/response pairs, chats, or token ids (`{"input_ids", "prompt_length"}`).

    - `mode`: `text` (as it is), `prompt`, `prompt+response` (given), `generate` (the model responds), `packed`
      (blocks of `max_length`). The prompt modes use the chat template unless `chat=False`.
    - `select`: keep `all` tokens, those of the `prompt`, or of the `response`.
    - `scorers`: name -> callable (or `ModelScorer`); the scores become float32 columns. `columns`: name -> type
      of columns copied from the data.
    - `scale`: power of two applied before storing as float16; `auto` looks at the first batches.
    - `validation_fraction` puts samples aside (`split_by="token"` or `"tail"` for comparison with older releases).
    - Under `torchrun` every rank takes its share of the batches; `rank` and `world_size` override the environment.

    >>> import tempfile, transformers
    >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...                                   num_attention_heads=2, num_key_value_heads=2)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> with tempfile.TemporaryDirectory() as out:
    ...     found = harvest(model, [[1, 2, 3], [4, 5]], [0, 1], out=out, progress=False)
    ...     list(found), len(found["layers.1"])
    (['layers.0', 'layers.1'], 5)
    """
    ranks = Ranks.find(rank, world_size)
    name = str(model) if isinstance(model, (str, Path)) else None
    if name is not None:
        tokenizer = tokenizer if tokenizer is not None else _maybe_tokenizer(name, revision, token, data)
        place = device or (f"cuda:{ranks.local}" if torch.cuda.is_available() else "cpu")
        live = load_model(name, revision=revision, adapter=adapter, dtype=model_dtype, device=place, token=token)
    else:
        assert isinstance(model, nn.Module)
        live = merge_adapter(model, adapter, token=token) if adapter is not None else model
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer, token=token)
    points = [hook_points] if isinstance(hook_points, (str, int, HookPoint)) else list(hook_points)
    hooks = sorted({HookPoint.parse(point) for point in points})
    if not hooks:
        raise ConfigError("no hook points were given", hint="pass layers, such as [6, 12, 18]")
    paths = {hook: hook.module_path(live) for hook in hooks}  # refuses layers that do not exist
    how = Preparation(
        mode,
        max_length,
        chat,
        system,
        prompt_column,
        response_column,
        text_column,
        special_tokens,
        template_options or {},
    )
    if max_tokens is not None and mode == "generate":
        raise ConfigError("max_tokens cannot be kept with generated responses", hint="use max_samples")
    if select != "all" and mode in ("text", "packed"):
        raise ConfigError(f"select={select!r} needs a mode with prompts", hint="mode='prompt+response' or 'generate'")
    n_items = len(data) if hasattr(data, "__len__") else None  # pyright: ignore[reportArgumentType]
    if max_samples is not None:
        n_items = max_samples if n_items is None else min(n_items, max_samples)
    budget = batch_tokens or (8192 if next(live.parameters()).device.type == "cpu" else 65536)
    size = window or (min(WINDOW, 256) if mode == "generate" else WINDOW)
    plan = _Plan(
        live, tokenizer, hooks, how, select, budget, size, ranks, dict(scorers or {}), dict(columns or {}),
        dict(generation or {}), seed, _special_ids(tokenizer), max_tokens,
    )  # fmt: skip
    rule = SplitRule(split_by, validation_fraction, split_seed, n_items)  # pyright: ignore[reportArgumentType]
    record = {
        "model": name or getattr(getattr(live, "config", None), "_name_or_path", "") or type(live).__name__,
        "revision": getattr(getattr(live, "config", None), "_commit_hash", None) or revision,
        "weights": weights_id(live),
        "model_dtype": str(next(live.parameters()).dtype).removeprefix("torch."),
        "adapter": str(adapter) if adapter is not None else None,
        "adapter_merge": "float32" if adapter is not None else None,
        "stage": stage,
        "mode": mode,
        "select": select,
        "max_length": max_length,
        "max_tokens": max_tokens,
        "chat_template": _template_id(tokenizer, how),
        "generation": {**plan.generation, "seed": seed} if mode == "generate" else None,
        "split_rule": {k: v for k, v in asdict(rule).items() if k != "n_samples"} if validation_fraction else None,
        "batch_tokens": budget,
        "window": size,
        **dict(source or {}),
    }
    items = itertools.islice(iter(data), max_samples) if max_samples is not None else iter(data)
    windows = _windows(items, size)
    was_training = live.training
    live.eval()
    try:
        first = next(windows, None)
        if first is None:
            raise DataError("there is no data to harvest from", hint="the dataset is empty")
        scales = _scales(plan, first, Path(out), stage, scale, dtype)
        writers = _open_writers(plan, Path(out), stage, record, paths, scales, rule, dtype, shard_bytes, shard_seconds)
        _run(plan, itertools.chain([first], windows), n_items, writers, progress)
    finally:
        live.train(was_training)
    run = {"empty": plan.counts.empty}  # found again by every run; the other counts lie in the files
    ranks.finish(Path(out), lambda total: finalize(out, {stage or "run": total}), run)
    return ActivationSet(out, [config_name(hook.name, stage) for hook in hooks])


def _maybe_tokenizer(name: str, revision: str | None, token: str | bool | None, data: Any) -> Any:
    try:
        return load_tokenizer(name, revision=revision, token=token)
    except HubSAEError:
        if isinstance(data, Sequence) and data and not isinstance(data[0], str):
            return None  # token ids need none
        raise


def _special_ids(tokenizer: Any) -> np.ndarray | None:
    if tokenizer is None:
        return None
    return np.array(sorted(getattr(tokenizer, "all_special_ids", []) or []), dtype=np.int64)


def _template_id(tokenizer: Any, how: Preparation) -> str | None:
    """A short id of the chat template that was used."""
    template = getattr(tokenizer, "chat_template", None)
    if how.mode in ("text", "packed") or how.chat is False or not template:
        return None
    digest = hashlib.sha256(repr((template, how.system, sorted(how.template_options.items()))).encode())
    return digest.hexdigest()[:12]


def _windows(items: Iterator[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    """Consecutive items with the number of the first."""
    first = 0
    while chunk := list(itertools.islice(items, size)):
        yield first, chunk
        first += len(chunk)


def _rows_of(sample: Sample, select: Select) -> tuple[int, int]:
    """First and last + 1 of the tokens kept."""
    if select == "all":
        return 0, len(sample.ids)
    return (0, sample.prompt_length) if select == "prompt" else (sample.prompt_length, len(sample.ids))


def _scales(
    plan: _Plan, window: tuple[int, list[Any]], out: Path, stage: str | None, scale: float | str, dtype: str
) -> dict[str, float]:
    """The scale of each hook point: as given, as in the files already there, or from the first batches."""
    names = {hook.name: out / config_name(hook.name, stage) for hook in plan.hooks}
    if dtype != "float16":
        return dict.fromkeys(names, 1.0)
    if scale != "auto":
        return dict.fromkeys(names, float(scale))
    found: dict[str, float] = {}
    for name, folder in names.items():
        shards = [path for paths in shards_in(folder).values() for path in paths]
        if shards and (header := ParquetSource(LocalFile(shards[0])).header) is not None:
            found[name] = header.scale
    if len(found) == len(names) or next(plan.model.parameters()).dtype == torch.float16:
        return {name: found.get(name, 1.0) for name in names}
    samples = prepare(window[1], window[0], plan.tokenizer, plan.how)
    if plan.how.mode == "packed":
        samples = _packed(plan, iter([window]), probe=True)[0]
    largest = dict.fromkeys(names, 0.0)
    probe = [s.ids[:PROBE_TOKENS] for s in samples if s.ids][:PROBE_SAMPLES]
    if probe:
        for name, hidden in capture(plan.model, *padded(probe), plan.hooks).items():
            largest[name] = float(hidden.float().abs().amax())
    return {name: found.get(name, scale_for(value)) for name, value in largest.items()}


def _open_writers(
    plan: _Plan, out: Path, stage: str | None, record: dict[str, Any], paths: Mapping[HookPoint, str],
    scales: Mapping[str, float], rule: SplitRule, dtype: str, shard_bytes: int, shard_seconds: float | None,
) -> dict[str, ActivationWriter]:  # fmt: skip
    d = int(_width(plan.model))
    extra = dict.fromkeys(plan.scorers, "float32") | dict(plan.carried)
    if plan.special is not None:
        extra["is_special"] = "bool"
    if plan.how.max_length is not None and plan.how.mode != "packed":
        extra[TRUNCATED] = "bool"
    writers = {}
    for hook in plan.hooks:
        where = {
            "hook_point": paths[hook],
            "transformer_lens": hook.transformer_lens,
            "layer": hook.layer,
            "kind": hook.kind,
        }
        writers[hook.name] = ActivationWriter(
            out, d=d, dtype=dtype, config=config_name(hook.name, stage), columns=extra, scale=scales[hook.name],
            split=rule if rule.fraction else "train", source={**record, **where}, rank=plan.ranks.rank,
            shard_bytes=shard_bytes, shard_seconds=shard_seconds, finalize=False,
        )  # fmt: skip
    return writers


def _width(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # pyright: ignore[reportOptionalMemberAccess]
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise ConfigError(f"{type(model).__name__} has no hidden_size in its config")
    return int(width)


def _run(
    plan: _Plan, windows: Iterator[tuple[int, list[Any]]], n_items: int | None, writers: dict[str, ActivationWriter],
    progress: bool,
) -> None:  # fmt: skip
    """All batches of this rank through the model and into the writers."""
    by_window = plan.how.mode == "generate" or (
        plan.max_tokens is None and n_items is not None and n_items >= 8 * plan.window * plan.ranks.world_size
    )
    source = _packed(plan, windows) if plan.how.mode == "packed" else _prepared(plan, windows, writers, by_window)
    pending: list[Future[None]] = []
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="hubsae-write") as beside, _bar(progress, n_items) as advance:
            for number, samples in enumerate(source):
                for place, batch in enumerate(batches_of(samples, plan.budget)):
                    if not is_mine(
                        number, place, rank=plan.ranks.rank, world_size=plan.ranks.world_size, by_window=by_window
                    ):
                        continue
                    ids_done = _done(writers, np.array([s.id for s in batch]))
                    plan.counts.skipped += int(ids_done.sum())
                    if ids_done.all():
                        continue
                    pending.append(beside.submit(_write, writers, *_forward(plan, batch)))
                    if len(pending) >= QUEUE:
                        pending.pop(0).result()
                advance(len(samples))
            for job in pending:
                job.result()
    except BaseException as error:
        for writer in writers.values():
            # each write holds whole samples, so what was written is worth keeping - unless writing itself failed
            writer.abort() if isinstance(error, DataError) else writer.commit()
        raise
    for writer in writers.values():
        writer.close()


def _done(writers: Mapping[str, ActivationWriter], ids: np.ndarray) -> np.ndarray:
    return np.logical_and.reduce([writer.done(ids) for writer in writers.values()])


def _prepared(
    plan: _Plan, windows: Iterator[tuple[int, list[Any]]], writers: Mapping[str, ActivationWriter], by_window: bool
) -> Iterator[list[Sample]]:
    """Windows of samples, tokenised, answered and scored; empty lists keep the count of windows that are not ours."""
    total = 0
    for number, (first, items) in enumerate(windows):
        mine = not by_window or is_mine(
            number, 0, rank=plan.ranks.rank, world_size=plan.ranks.world_size, by_window=True
        )
        finished = plan.max_tokens is None and bool(_done(writers, np.arange(first, first + len(items))).all())
        if not mine or finished:
            plan.counts.skipped += len(items) if mine else 0
            yield []
            continue
        samples = prepare(items, first, plan.tokenizer, plan.how)
        if plan.how.mode == "generate":
            samples = generate_responses(
                plan.model, samples, plan.tokenizer, options=plan.generation, seed=plan.seed, budget=plan.budget
            )
        if plan.max_tokens is not None:
            kept = []
            for sample in samples:
                if total >= plan.max_tokens:
                    break
                start, stop = _rows_of(sample, plan.select)
                total += max(0, stop - start)
                kept.append(sample)
            samples = kept
        score_samples(samples, plan.scorers, plan.tokenizer)
        for sample in samples:
            for name in plan.carried:
                sample.columns[name] = sample.item[name]
        if plan.ranks.rank == 0 or by_window:  # samples are counted once, whoever computes them
            plan.counts.samples += len(samples)
            plan.counts.empty += sum(_rows_of(s, plan.select)[0] >= _rows_of(s, plan.select)[1] for s in samples)
        yield samples
        if plan.max_tokens is not None and total >= plan.max_tokens:
            return


def _packed(plan: _Plan, windows: Iterator[tuple[int, list[Any]]], probe: bool = False) -> list[list[Sample]] | Any:
    """Windows of packed blocks; a block is a sample."""
    if probe:
        return list(itertools.islice(_packed(plan, windows), 1))

    def stream() -> Iterator[Sample]:
        for first, items in windows:
            yield from prepare(items, first, plan.tokenizer, Preparation(
                "text", None, text_column=plan.how.text_column, special_tokens=plan.how.special_tokens))  # fmt: skip

    def blocks() -> Iterator[list[Sample]]:
        assert plan.how.max_length is not None
        separator = getattr(plan.tokenizer, "eos_token_id", None)
        packed = pack(stream(), plan.how.max_length, separator)
        if plan.max_tokens is not None:
            packed = itertools.islice(packed, -(-plan.max_tokens // plan.how.max_length))
        numbered = (Sample(number, ids, 0) for number, ids in enumerate(packed))
        while window := list(itertools.islice(numbered, plan.window)):
            score_samples(window, plan.scorers, plan.tokenizer)
            if plan.ranks.rank == 0:
                plan.counts.samples += len(window)
            yield window

    return blocks()


def _forward(plan: _Plan, batch: list[Sample]) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Activations and labels of the kept tokens of a batch, sample by sample."""
    ids, mask = padded([s.ids for s in batch])
    keep = torch.zeros_like(mask)
    labels: dict[str, list[np.ndarray]] = {}

    def add(name: str, values: np.ndarray) -> None:
        labels.setdefault(name, []).append(values)

    for row, sample in enumerate(batch):
        start, stop = _rows_of(sample, plan.select)
        keep[row, start:stop] = True
        position = np.arange(start, max(start, stop))
        add("token_id", np.asarray(sample.ids[start:stop], dtype=np.int64))
        add("position", position)
        add("sample_id", np.full(len(position), sample.id))
        add("is_prompt", position < sample.prompt_length)
        if plan.how.max_length is not None and plan.how.mode != "packed":
            add(TRUNCATED, np.full(len(position), sample.truncated))
        for name in (*plan.scorers, *plan.carried):
            value = sample.columns[name]
            per_token = isinstance(value, np.ndarray)
            add(name, value[start:stop] if per_token else np.full(len(position), value))
    columns = {name: np.concatenate(parts) for name, parts in labels.items()}
    if plan.special is not None:
        columns["is_special"] = np.isin(columns["token_id"], plan.special)
    plan.counts.tokens += int(mask.sum())
    plan.counts.padded += mask.numel()
    if not bool(keep.any()):
        return {}, columns
    found = capture(plan.model, ids, mask, plan.hooks, keep)
    plan.counts.rows += int(keep.sum())
    # what is not float32 already travels as it is: two bytes a value
    return {name: hidden.cpu() for name, hidden in found.items()}, columns


def _write(
    writers: Mapping[str, ActivationWriter], found: Mapping[str, Tensor], labels: Mapping[str, np.ndarray]
) -> None:
    for name, vectors in found.items():
        writers[name].write(vectors, **labels)


@contextmanager
def _bar(wanted: bool, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar over samples where someone is watching."""
    if not wanted or not sys.stderr.isatty() or int(os.environ.get("RANK", "0")) != 0:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("harvest"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("harvest", total=total)
        yield lambda n: bar.update(task, advance=n)
