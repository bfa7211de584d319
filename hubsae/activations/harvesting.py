"""Harvest: run texts through a model and write the activations at hook points as a dataset.

    stream of batches -> one writer beside the model -> a file per hook point, closed at least every half minute

Windows and batches follow from the samples alone. Ranks share out the batches, a resumed run skips those whose
samples lie in finished files, and either way the same numbers are written in the same order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hubsae.activations.activation_set import ActivationSet
from hubsae.activations.layout import SHARD_BYTES, config_name, shards_in
from hubsae.activations.manifest import finalize
from hubsae.activations.models import weights_id
from hubsae.activations.parquet_source import ParquetSource
from hubsae.activations.ranks import FOLDER as RANKS
from hubsae.activations.ranks import Ranks
from hubsae.activations.rewards import Scorer
from hubsae.activations.samples import BadSample, Mode, Select
from hubsae.activations.sources import LocalFile
from hubsae.activations.splits import SplitRule
from hubsae.activations.stream import PROBE_SAMPLES, HarvestBatch, Probe, Stream, hash_texts, open_stream
from hubsae.activations.writer import ActivationWriter, scale_for
from hubsae.core.errors import ConfigError, DataError, WriteError
from hubsae.core.files import json_text, read_json, write_json_atomic
from hubsae.core.hooks import HookPoint
from hubsae.core.options import pass_on
from hubsae.core.progress import progress as show_progress
from hubsae.core.progress import say
from hubsae.core.text import format_count, format_time, printable

QUEUE = 4
"""Batches that may wait for the writer, which runs beside the model."""
KILL_LOSS = 30.0
"""Seconds of work that a kill may cost."""
NAMED = 10
"""Bad samples named one by one."""
OTHERWISE = "write into another folder, or remove this one to start over"
SETTINGS = "settings"
"""Beside the markers of a harvest in parts (whose names end in .json): what they were asked for."""


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
    validation_fraction: float = 0.0,
    split_by: str = "sample",
    split_seed: int = 0,
    batch_tokens: int | None = None,
    window: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    shard_seconds: float | None = KILL_LOSS,
    parts: bool = False,
    strict: bool = False,
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ActivationSet:
    """Write the activations of `model` on `data` at `hook_points` into the folder `out`; resumes a killed run.

    `model` is a transformers model in memory, a folder or an id; `data` a list, a `datasets.Dataset` or any
    iterable of texts, prompt/response pairs, chats, or token ids (`{"input_ids", "prompt_length"}`).

    - `mode`: `text` (as it is), `prompt`, `prompt+response` (given), `generate` (the model responds), `packed`
      (blocks of `max_length`). The prompt modes use the chat template unless `chat=False`.
    - `select`: keep `all` tokens, those of the `prompt`, of the `response`, or of every turn of the `assistant`.
    - `exclude`: groups of tokens that are not stored: `position_0`, `special`, `template`, `role=system` ...
    - A sample that cannot be used is counted, named and skipped; `strict=True` stops there.
    - `scorers`: name -> callable (or a reward model: `rl.reward_models.HarvestScorer`); the scores become float32
      columns. `columns`: name -> type of columns copied from the data.
    - `scale`: power of two applied before storing as float16; `auto` looks at the first batches.
    - `validation_fraction` puts samples aside (`split_by="token"` or `"tail"` for comparison with older releases).
    - Files are closed at least every `shard_seconds`, so that a kill costs no more work than that (and a batch).
    - Under `torchrun` every rank takes its share of the batches; `rank` and `world_size` override the environment.
    - `parts`: each window of samples has files of its own, all of them or none, so that any number of ranks writes the
      same bytes; a kill costs the window.
    - The model: `tokenizer` (its own unless given), `adapter` merged into it, `revision`, `model_dtype`, `device`,
      access `token`; `stage` names the checkpoint in configs and records, `source` adds facts to the record.
    - The texts: `prompt_column`, `response_column`, `text_column` where names are unusual; `chat`, `system` and
      `template_options` for the template, `special_tokens` to add the tokenizer's; `generation` settings and `seed`.
    - How much: `max_length` of a sample, `max_samples`, `max_tokens`; tokens per batch (`batch_tokens`), samples sorted
      by length at once (`window`).
    - The files: `dtype` stored, `shard_bytes` and `shard_seconds` until the next, `split_seed` of the split;
      `progress=False` is silent.

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
    if parts and max_tokens is not None and mode != "packed":
        raise ConfigError("max_tokens counts over all samples, which parts do not know", hint="use max_samples")
    name = str(model) if isinstance(model, (str, Path)) else None
    stream = pass_on(open_stream, locals(), needs_tokenizer=_holds_texts(data))
    n_items = len(data) if hasattr(data, "__len__") else None  # pyright: ignore[reportArgumentType]
    if max_samples is not None:
        n_items = max_samples if n_items is None else min(n_items, max_samples)
    rule = SplitRule(split_by, validation_fraction, split_seed, n_items)  # pyright: ignore[reportArgumentType]
    whole = isinstance(data, Sequence) or hasattr(data, "select")  # may be read from the beginning again
    items = iter(data)
    head = list(itertools.islice(items, PROBE_SAMPLES if max_samples is None else min(PROBE_SAMPLES, max_samples)))
    if not head:
        raise DataError("there is no data to harvest from", hint="the dataset is empty")
    config = getattr(stream.model, "config", None)
    record = {
        "model": name or getattr(config, "_name_or_path", "") or type(stream.model).__name__,
        "revision": getattr(config, "_commit_hash", None) or revision,
        "weights": weights_id(stream.model),
        "model_dtype": str(next(stream.model.parameters()).dtype).removeprefix("torch."),
        "adapter": str(adapter) if adapter is not None else None,
        "adapter_merge": "float32" if adapter is not None else None,
        "stage": stage,
        "mode": mode,
        "select": select,
        "exclude": sorted(exclude) or None,
        "max_length": max_length,
        "max_tokens": max_tokens,
        "chat_template": _template_id(stream),
        "generation": {**stream.generation, "seed": seed} if mode == "generate" else None,
        "split_rule": {k: v for k, v in asdict(rule).items() if k != "n_samples"} if validation_fraction else None,
        "batch_tokens": stream.budget,
        "window": stream.window,
        "first_text": hash_texts(head[:1]),
        **dict(source or {}),
    }
    probe = stream.probe(head)
    scales = _scales(stream, probe, Path(out), stage, scale, dtype)

    def open_writers(rank: int) -> dict[str, ActivationWriter]:
        writers = {}
        for hook in stream.hooks:
            where = {"hook_point": hook.module_path(stream.model), "transformer_lens": hook.transformer_lens}
            where |= {"layer": hook.layer, "kind": hook.kind}
            writers[hook.name] = ActivationWriter(
                out, d=probe[hook.name].d, dtype=dtype, config=config_name(hook.name, stage), columns=stream.columns,
                scale=scales[hook.name], split=rule if rule.fraction else "train", source={**record, **where},
                rank=rank, shard_bytes=shard_bytes, shard_seconds=None if parts else shard_seconds, finalize=False,
                anew=parts,
            )  # fmt: skip
        return writers

    files: _Files
    if parts:
        asked = {**record, "dtype": dtype, "scale": scales, "columns": stream.columns, "items": n_items}
        files = _Parts(open_writers, Path(out), stage, stream, asked)
    else:
        files = _Files(open_writers, ranks.rank)
    with _sigterm_stops():
        _run(stream, data if whole else itertools.chain(head, items), n_items, files, progress)
    decode = None if stream.tokenizer is None else lambda token: stream.tokenizer.decode([token])
    if isinstance(files, _Parts):
        files.finish(decode)
    else:
        run = {"empty": stream.counts.empty, "bad": len(stream.counts.bad)}  # found again by every run
        ranks.finish(Path(out), lambda total: finalize(out, {stage or "run": total}, decode), run)
    return ActivationSet(out, [config_name(hook.name, stage) for hook in stream.hooks])


def _holds_texts(data: Any) -> bool:
    """Whether a tokenizer is needed: token ids need none."""
    return not (isinstance(data, Sequence) and data and not isinstance(data[0], str))


def _template_id(stream: Stream) -> str | None:
    """A short id of the chat template that was used."""
    template, how = getattr(stream.tokenizer, "chat_template", None), stream.how
    if not how.chats or not template:
        return None
    digest = hashlib.sha256(repr((template, how.system, sorted(how.template_options.items()))).encode())
    return digest.hexdigest()[:12]


def _scales(
    stream: Stream, probe: Mapping[str, Probe], out: Path, stage: str | None, scale: float | str, dtype: str
) -> dict[str, float]:
    """The scale of each hook point: as given, as in the files already there, or from the first samples."""
    names = {hook.name: out / config_name(hook.name, stage) for hook in stream.hooks}
    if dtype != "float16":
        return dict.fromkeys(names, 1.0)
    if scale != "auto":
        return dict.fromkeys(names, float(scale))
    found: dict[str, float] = {}
    for name, folder in names.items():
        shards = [path for paths in shards_in(folder).values() for path in paths]
        if shards and (header := ParquetSource(LocalFile(shards[0])).header) is not None:
            found[name] = header.scale
    if len(found) == len(names) or next(stream.model.parameters()).dtype == torch.float16:
        return {name: found.get(name, 1.0) for name in names}
    return {name: found.get(name, scale_for(look.largest)) for name, look in probe.items()}


class _Files:
    """Where the batches of a rank go: a file per hook point, closed at least every half minute."""

    def __init__(self, open_writers: Callable[[int], dict[str, ActivationWriter]], rank: int):
        self.writers = open_writers(rank)

    def done(self, ids: np.ndarray) -> np.ndarray:
        """Which samples lie in finished files."""
        return np.logical_and.reduce([writer.done(ids) for writer in self.writers.values()])

    def write(self, batch: HarvestBatch, seconds: float) -> None:
        """Write a batch; the next one will take about as long as this did, `seconds`."""
        for name, vectors in batch.vectors.items():
            writer = self.writers[name]
            writer.write(vectors, **batch.labels)
            if writer.shard_seconds is not None:
                writer.commit_older_than(writer.shard_seconds - seconds)

    def stop(self, error: BaseException) -> None:
        """Close what is open after an error."""
        for writer in self.writers.values():
            # each write holds whole samples, so what was written is worth keeping - unless writing itself failed
            writer.abort() if isinstance(error, (DataError, WriteError)) else writer.commit()

    def close(self) -> None:
        """Close what is open."""
        for writer in self.writers.values():
            writer.close()


class _Parts(_Files):
    """Files by window of samples. A marker says that those of a window are all there; without one they are made anew.

    What a marker counts is of its window alone; what belongs to none (texts behind the last whole block of packed ones)
    stands, with the number of windows, in a last file, which every rank writes alike.
    """

    def __init__(
        self, open_writers: Callable[[int], dict[str, ActivationWriter]], out: Path, stage: str | None, stream: Stream,
        asked: Mapping[str, Any],
    ):  # fmt: skip
        self.open_writers, self.out, self.stage, self.stream = open_writers, out, stage, stream
        self.writers: dict[str, ActivationWriter] = {}
        self.window, self.windows, self.counted = -1, 0, (0, 0)
        self.markers = parts_folder(out, stage, [hook.name for hook in stream.hooks])
        finished = [int(path.stem) for path in self.markers.glob("[0-9]*.json")]
        self.finished = np.array(sorted(finished), dtype=np.int64)
        self._refuse_others(asked)

    def _refuse_others(self, asked: Mapping[str, Any]) -> None:
        """A marker says nothing of model and data, so what they were asked for lies beside them."""
        said = self.markers / SETTINGS
        wanted = json.loads(json_text(asked))
        if not said.is_file():
            if len(self.finished):
                raise DataError(f"{self.out} holds parts that do not say what they are of", hint=OTHERWISE)
            write_json_atomic(said, wanted)
        before = read_json(said)
        if wrong := [
            f"{key} {before.get(key)!r} instead of {wanted.get(key)!r}"
            for key in sorted({*before, *wanted})
            if before.get(key) != wanted.get(key)
        ]:
            raise DataError(f"{self.out} holds other activations: {'; '.join(wrong)}", hint=OTHERWISE)

    def done(self, ids: np.ndarray) -> np.ndarray:
        return np.isin(ids // self.stream.window, self.finished)

    def write(self, batch: HarvestBatch, seconds: float) -> None:
        if self.window != batch.window:
            self.window, self.writers = batch.window, self.open_writers(batch.window)
        super().write(batch, seconds)

    def stop(self, error: BaseException) -> None:
        for writer in self.writers.values():
            writer.abort()

    def seen(self) -> dict[str, int]:
        """What the stream counted since the last time."""
        now = self.stream.counts.empty, len(self.stream.counts.bad)
        before, self.counted = self.counted, now
        return {"empty": now[0] - before[0], "bad": now[1] - before[1]}

    def end(self, window: int, seen: Mapping[str, int]) -> None:
        """All batches of a window are written, or were before: then it must be of the same texts."""
        marker, texts = self.markers / f"{window:05d}.json", self.stream.texts
        if window not in self.finished:
            super().close()
            self.writers = {}
            write_json_atomic(marker, {**seen, "texts": texts})
        elif read_json(marker).get("texts") != texts:
            problem = f"{self.out} holds activations of other texts: part {window} is not of these"
            raise DataError(problem, hint=OTHERWISE)

    def finish(self, decode: Callable[[int], str] | None) -> None:
        """Say how many windows there are, and complete the dataset if no other rank has still to make one."""
        write_json_atomic(self.markers / "all.json", {"windows": self.windows, **self.seen()})
        if not missing_parts(self.markers):
            complete_parts(self.out, self.stage, self.markers, decode)


def parts_folder(out: str | Path, stage: str | None, hooks: Sequence[str]) -> Path:
    """Where a harvest in parts leaves its markers."""
    of = hashlib.sha256(" ".join(sorted(hooks)).encode()).hexdigest()[:12]
    return Path(out) / RANKS / f"parts-{stage or 'run'}-{of}"


def missing_parts(markers: Path) -> list[int]:
    """Windows of a harvest in parts that are not written yet; [-1] where their number is not known."""
    if not (markers / "all.json").is_file():
        return [-1]
    there = {path.name for path in markers.glob("[0-9]*.json")}
    return [n for n in range(read_json(markers / "all.json")["windows"]) if f"{n:05d}.json" not in there]


def complete_parts(out: str | Path, stage: str | None, markers: Path, decode: Callable[[int], str] | None) -> Path:
    """Manifest, statistics and card of a dataset whose parts are all there."""
    every = [read_json(path) for path in sorted(markers.glob("*.json"))]
    return finalize(out, {stage or "run": {key: sum(said[key] for said in every) for key in ("empty", "bad")}}, decode)


def _run(stream: Stream, items: Iterable[Any], n_items: int | None, files: _Files, show: bool) -> None:
    """All batches of this rank through the model and into the writers."""
    pending: list[Future[None]] = []
    began = last = time.monotonic()
    parts = files if isinstance(files, _Parts) else None

    def behind(window: int) -> None:
        assert parts is not None
        parts.windows, seen = window + 1, parts.seen()
        if stream.takes(window):
            while pending:
                pending.pop(0).result()
            parts.end(window, seen)

    try:
        with (
            ThreadPoolExecutor(1, thread_name_prefix="hubsae-write") as beside,
            show_progress("harvest", unit="tokens", show=None if show else False) as task,
        ):
            for batch in stream.batches(items, done=files.done, n_items=n_items, behind=behind if parts else None):
                now = time.monotonic()
                pending.append(beside.submit(files.write, batch, now - last))
                last = now
                if len(pending) >= QUEUE:
                    pending.pop(0).result()
                task.update(stream.counts.tokens, stream.expected(n_items))
            for job in pending:
                job.result()
    except BaseException as error:
        files.stop(error)
        raise
    files.close()
    if show:
        _report(stream, time.monotonic() - began)


def _report(stream: Stream, seconds: float) -> None:
    """The last line of a harvest, and the names of the samples that could not be used."""
    counts = stream.counts
    if counts.bad:
        say(f"harvest: {len(counts.bad)} samples cannot be used and were skipped: {name_bad(counts.bad)}")
    text = f"harvest: {format_count(counts.tokens)} tokens of {format_count(counts.samples)} samples"
    if counts.skipped:
        text += f" ({format_count(counts.skipped)} samples were done before)"
    if counts.tokens:
        text += f" in {format_time(seconds)}, {format_count(counts.tokens / max(seconds, 1e-9))} tokens/s"
    say(text)


def name_bad(bad: Sequence[BadSample]) -> str:
    """The first few bad samples by number and reason.

    >>> name_bad([BadSample(650, "is an empty chat")])
    '650 is an empty chat'
    """
    named = "; ".join(f"{sample.id} {printable(sample.why, 120)}" for sample in bad[:NAMED])
    return named + (f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else "")


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Let the SIGTERM of a scheduler end a run as Ctrl-C does: what is written is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
