"""Make the index of SAEs: from activations on disk, or from a model and texts, in parts that survive a kill.

The rows are cut into parts at fixed places; each part leaves one table per SAE in `NAME/.parts/`, and they merge to
the bytes of one pass. A run that goes on skips the parts that are there; ranks take every n-th part, and whoever
finds all of them writes the files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hubsae.activations.capture import capture, padded
from hubsae.activations.dataset import Labelled
from hubsae.activations.ranks import Ranks
from hubsae.core.errors import DataError
from hubsae.core.hooks import HookPoint
from hubsae.core.progress import progress, say
from hubsae.core.sae import SAE
from hubsae.core.scopes import parse
from hubsae.evals.passes import BLOCK_ROWS, Rows, Stream, part_name, parts_of, run_pass
from hubsae.evals.places import check_place, place_of
from hubsae.evals.texts import Tokens, batches, encode_texts
from hubsae.index.files import Extras, index_name, write_index
from hubsae.index.lens import cofiring, decoder_neighbours, logit_lens
from hubsae.index.table import FeatureTable

PARTS = ".parts"
PART_TEXTS = 512


@dataclass(frozen=True)
class Settings:
    """What is kept of each feature."""

    top: int = 10
    """Strongest tokens, and strongest samples."""
    random: int = 10
    """Firings drawn at random, for examples of every strength."""
    window: int = 8
    """Tokens shown before and after."""
    scope: str | None = None
    """Tokens that count; None: those that the SAE is for, by its record."""
    neighbours: int = 10
    logits: int = 10


def index_activations(
    saes: Mapping[str, SAE],
    data: Any,
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    tokenizer: Any = None,
    tokenizer_id: str | None = None,
    model: nn.Module | None = None,
    force: bool = False,
    ranks: Ranks | None = None,
    finish: bool = True,
    show: bool | None = None,
) -> list[Path]:
    """Index SAEs on activations; returns the folders written, below `out`.

    `tokenizer` gives tokens their texts, `model` adds the logit lens. `finish=False` leaves the parts of this rank to a
    later call, which finds them and writes the files.
    """
    settings, ranks, rows = settings or Settings(), ranks or Ranks.find(), Rows(data)
    hook, of_model = place_of(rows.data)
    for label, sae in saes.items():
        if not force:
            check_place(label, sae, hook, of_model)
    source = {"config": getattr(data, "config", None), "split": getattr(data, "split", None), "model": _id(of_model)}
    path = str(getattr(data, "path", ""))
    source["dataset"] = _id(path) if path.count("/") == 1 else None
    work = _Work(saes, Path(out), settings, tokenizer, tokenizer_id, {k: v for k, v in source.items() if v})
    parts = parts_of(rows)
    with progress(f"indexing {len(saes)} SAEs", rows.n, "tokens", show=show) as task:
        for part in parts[ranks.rank :: ranks.world_size]:
            name = part_name(part)
            missing = work.missing(name)
            if missing:
                tables = {label: work.table(label) for label in missing}
                run_pass(rows, {n: saes[n] for n in missing}, list(tables.values()), blocks=part, ranks=Ranks())
                work.keep(name, tables)
            task.advance(min(part[1] * BLOCK_ROWS, rows.n or 0) - part[0] * BLOCK_ROWS)
    return work.finish([part_name(part) for part in parts], model, show) if finish else []


def index_texts(
    saes: Mapping[str, SAE],
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Any],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    tokenizer_id: str | None = None,
    max_length: int | None = None,
    force: bool = False,
    ranks: Ranks | None = None,
    finish: bool = True,
    show: bool | None = None,
) -> list[Path]:
    """Index SAEs on what a model makes of texts, with no activations on disk; SAEs of one hook point share the runs."""
    from hubsae.core.intervene import hook_of

    settings, ranks = settings or Settings(), ranks or Ranks.find()
    by_hook: dict[HookPoint, dict[str, SAE]] = {}
    model_id = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    for label, sae in saes.items():
        hook = hook_of(sae, None)
        if not force:
            check_place(label, sae, hook, model_id)
        by_hook.setdefault(hook, {})[label] = sae
    written = []
    for hook, group in by_hook.items():
        source = {"model": _id(model_id), "texts": len(texts), "max_length": max_length}
        source = {k: v for k, v in source.items() if v}
        work = _Work(group, Path(out), settings, tokenizer, tokenizer_id, source)
        names, start = [], 0
        with progress(f"indexing {len(group)} SAEs at {hook.name}", len(texts), "texts", show=show) as task:
            for number, first in enumerate(range(0, len(texts), PART_TEXTS)):
                some = texts[first : first + PART_TEXTS]
                encoded, _ = encode_texts(some, tokenizer, max_length=max_length)
                name = f"{start:012d}.safetensors"
                names.append(name)
                missing = work.missing(name) if number % ranks.world_size == ranks.rank else []
                if missing:
                    tables = {label: work.table(label, start) for label in missing}
                    stream = _stream(model, hook, encoded, first)
                    run_pass(stream, {n: group[n] for n in missing}, list(tables.values()), ranks=Ranks())
                    work.keep(name, tables)
                start += sum(t.ids.numel() for t in encoded)
                task.advance(len(some))
        written += work.finish(names, model, show) if finish else []
    return written


def merge_parts(paths: Sequence[str | os.PathLike[str]]) -> FeatureTable:
    """One table of several: files of tables, or folders that hold such files."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path} holds no tables", hint="give the files below reverse-index/NAME/.parts/")
        files += found
    whole = FeatureTable.open(files[0])
    for file in files[1:]:
        whole.merge(FeatureTable.open(file))
    return whole.result()


def write_merged(
    table: FeatureTable, folder: Path, *, tokenizer: Any = None, sae: SAE | None = None, model: nn.Module | None = None,
    settings: Settings | None = None,
) -> Path:  # fmt: skip
    """The files of a finished table."""
    settings = settings or Settings()
    said = table.identity
    extras = Extras(
        said.get("sae", {"id": table.name, "d_sae": table.d_sae}),
        said.get("source", {}),
        tokenizer,
        said.get("tokenizer_id"),
        cofiring=cofiring(table.pairs[0], table.pairs[1], table.d_sae, settings.neighbours),
    )
    if sae is not None:
        extras.decoder = decoder_neighbours(sae, settings.neighbours)
        if model is not None:
            extras.logits = logit_lens(sae, model, settings.logits)
    return write_index(table, folder, extras)


class _Work:
    """The parts and folders of a run."""

    def __init__(
        self, saes: Mapping[str, SAE], out: Path, settings: Settings, tokenizer: Any, tokenizer_id: str | None,
        source: Mapping[str, Any],
    ):  # fmt: skip
        self.saes, self.out, self.settings, self.tokenizer = saes, out, settings, tokenizer
        sha = tokenizer_sha256(tokenizer)
        self.identity = {
            label: {
                "sae": describe(label, sae), "tokenizer": sha, "tokenizer_id": _id(tokenizer_id), "source": dict(source)
            }
            for label, sae in saes.items()
        }  # fmt: skip

    def table(self, label: str, offset: int = 0) -> FeatureTable:
        sae, s = self.saes[label], self.settings
        scope = parse(sae.metadata.own_scope if s.scope is None else s.scope, sae.metadata.training.massive_above)
        return FeatureTable(
            label, sae.d_sae, top=s.top, random=s.random, window=s.window, scope=scope, identity=self.identity[label],
            offset=offset,
        )  # fmt: skip

    def folder(self, label: str) -> Path:
        return self.out / index_name(label)

    def part(self, label: str, name: str) -> Path:
        return self.folder(label) / PARTS / name

    def missing(self, name: str) -> list[str]:
        return [label for label in self.saes if not self.part(label, name).is_file()]

    def keep(self, name: str, tables: Mapping[str, FeatureTable]) -> None:
        for label, table in tables.items():
            table.save(self.part(label, name))

    def finish(self, names: Sequence[str], model: nn.Module | None, show: bool | None) -> list[Path]:
        if not names:
            raise DataError("no tokens to index", hint="the activations, or the texts, are empty")
        written = []
        with progress("writing the index", len(self.saes), "SAEs", show=show) as task:
            for label, sae in self.saes.items():
                files = [self.part(label, name) for name in names]
                if not all(file.is_file() for file in files):
                    say(f"{label}: other ranks are not done; the last one writes the index")
                    continue
                whole = self.table(label)
                for file in files:
                    whole.merge(FeatureTable.open(file))
                root = self.folder(label)
                write_merged(
                    whole.result(), root, tokenizer=self.tokenizer, sae=sae, model=model, settings=self.settings
                )
                shutil.rmtree(root / PARTS, ignore_errors=True)
                for stale in root.glob(".*.tmp"):  # a kill leaves the file that was being written
                    stale.unlink(missing_ok=True)
                written.append(root)
                task.advance()
        return written


def _stream(model: nn.Module, hook: HookPoint, texts: list[Tokens], first: int) -> Stream:
    """Activations of texts at a hook point, text by text in their order."""
    names = set.intersection(*(set(t.labels) for t in texts)) if texts else set()
    width = int(model.get_input_embeddings().weight.shape[1])  # pyright: ignore

    def run() -> Iterator[Labelled]:
        done: dict[int, torch.Tensor] = {}
        place = 0
        for batch in batches(texts, 4096):
            which = batch.which.tolist()
            ids, mask = padded([texts[i].ids.tolist() for i in which])
            vectors = capture(model, ids, mask, [hook])[hook.name].float().cpu()
            for i, rows in zip(which, vectors.split([texts[i].ids.numel() for i in which]), strict=True):
                done[i] = rows
            while place < len(texts) and (place in done or not texts[place].ids.numel()):
                rows, text = done.pop(place, None), texts[place]
                place += 1
                if rows is not None:
                    sample = np.full(len(rows), first + place - 1)
                    yield Labelled(rows, {**{n: text.labels[n] for n in names}, "sample_id": sample})

    return Stream(run(), width, [*sorted(names), "sample_id"])


def describe(label: str, sae: SAE) -> dict[str, Any]:
    """What the summary says of an SAE; what is not known is absent."""
    m = sae.metadata
    said = {
        "id": label, "sha256": sae_sha256(sae), "architecture": sae.config.architecture, "d_in": sae.d_in,
        "d_sae": sae.d_sae, "k": sae.config.k, "layer": m.hook.layer, "hook": m.hook.module_path,
        "base_model": m.base_model.id, "stage": m.base_model.stage,
    }  # fmt: skip
    return {key: value for key, value in said.items() if value is not None}


def sae_sha256(sae: SAE) -> str:
    """A hash of what an SAE computes with: its configuration and tensors."""
    digest = hashlib.sha256(sae.config.model_dump_json().encode())
    for name, tensor in sorted(sae.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """A hash of a tokenizer's vocabulary."""
    if tokenizer is None:
        return None
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256("\n".join(f"{number}\t{word}" for word, number in words).encode()).hexdigest()


def _id(name: Any) -> str | None:
    """A name that means the same elsewhere; a path of this machine does not."""
    return str(name) if name and not os.path.exists(str(name)) else None
