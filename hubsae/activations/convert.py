"""Rewrite activations of any readable layout into ours: SAELens caches, `.pt` and `.npy` piles, other Parquet.

The rows are cut into parts of about a file each, at beginnings of samples, so that ranks share them: whoever writes
them, the files are the same.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubsae.activations.dataset import ActivationDataset
from hubsae.activations.layout import LABELS, PARTS, SHARD_BYTES, ShardHeader, configs_in, shard_name, shards_in
from hubsae.activations.manifest import finalize
from hubsae.activations.opening import find_activations, find_pile
from hubsae.activations.parquet_source import ParquetSource
from hubsae.activations.ranks import Ranks
from hubsae.activations.sources import LocalFile
from hubsae.activations.writer import ActivationWriter, scale_for
from hubsae.core.errors import ConfigError, DataError
from hubsae.core.files import read_json, write_text_atomic

ROWS = 8192
SAMPLED = 1 << 16
"""Bytes of each of the places of a source that are looked at to know it again."""


def convert(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    scale: float | str = "auto",
    config: str | None = None,
    vector: str | None = None,
    source: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    ranks: Ranks | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the activations at `path` into the folder `out`; labels the source lacks get the value -1.

    `dtype` is float32 for float32 sources and float16 otherwise, unless given; `config` renames the only config. With
    `ranks` this is one of several writers, or of several attempts: parts that are there stay, and who finds all of
    them there finishes the dataset.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     np.save(f"{d}/layer6.npy", np.ones((5, 4), np.float16))
    ...     ActivationDataset.open(convert(f"{d}/layer6.npy", f"{d}/out"), "layers.6").n_rows
    5
    """
    target = Path(out)
    if ranks is None and configs_in(target):
        raise DataError(f"{target} holds activations already", hint="convert into an empty folder")
    mine = ranks or Ranks()
    names = list_configs(Path(path), vector)
    if config is not None and len(names) > 1:
        raise DataError(f"{path} holds {len(names)} configs, so they cannot all be named {config!r}")
    complete = True
    for name, splits in names.items():
        for split in splits:
            data = ActivationDataset.open(path, name, split, vector=vector)
            how = _how(data, config or name, dtype, scale, source, mine)
            complete &= _convert_one(data, target, split, how, shard_bytes, mine, progress)
    return finalize(target) if complete else target


def list_configs(path: Path, vector: str | None = None) -> dict[str, list[str]]:
    """Configs and splits of whatever lies at `path`."""
    if configs_in(path):
        raise DataError(f"{path} is in our format already")
    if (path / "state.json").is_file():
        return {name: ["train"] for name in find_activations(path, None, "train").configs}
    pile = find_pile(path)
    if not pile:
        find_activations(path, None, "train", vector=vector)  # raises the error that says what is known
    return {name: list(splits) for name, splits in pile.items()}


def _how(
    data: ActivationDataset, config: str, dtype: str | None, scale: float | str, source: dict[str, Any] | None,
    ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    """What every writer of a config is opened with."""
    kind = dtype or ("float32" if data.stored_dtype == torch.float32 else "float16")
    exact = kind != "float16" or (data.stored_dtype == torch.float16 and data.scale == 1)
    if scale == "auto" and not exact and ranks.world_size > 1:
        raise ConfigError(
            f"{config}: to choose a scale for float16 every task would have to read everything first",
            hint="give the scale: scale=1 where no value exceeds 65504, else a power of two such as 0.0625",
        )
    extra = {name: _kind(data, name) for name in data.label_names if name not in LABELS}
    record: dict[str, Any] = {"converted_from": Path(data.path).name, **data.info, **(source or {})}
    if found := re.fullmatch(r"(?:(?P<stage>.+)\.)?(?P<hook>layers\.\d+.*)", config):
        record = {"hook_point": found["hook"], **({"stage": found["stage"]} if found["stage"] else {}), **record}
    factor = 1.0 if kind != "float16" else float(scale) if scale != "auto" else 1.0 if exact else _largest_scale(data)
    return {"d": data.d, "dtype": kind, "config": config, "scale": factor, "columns": extra, "source": record}


def _convert_one(
    data: ActivationDataset, out: Path, split: str, how: dict[str, Any], shard_bytes: int, ranks: Ranks,
    progress: Callable[[int], None] | None,
) -> bool:  # fmt: skip
    """Write this rank's parts of a config; whether all parts are there."""
    rows = max(1, shard_bytes // (data.d * (2 if how["dtype"] == "float16" else 4)))
    starts = [_sample_start(data, row) for row in range(0, data.n_rows, rows)]
    parts = [(a, b) for a, b in zip(starts, [*starts[1:], data.n_rows], strict=True) if a < b]
    files = [out / how["config"] / shard_name(split, part, 0) for part in range(len(parts))]
    _refuse_other(data, out / how["config"], split, how, dict(zip(files, parts, strict=True)))
    for part, (first, last) in enumerate(parts):
        if part % ranks.world_size == ranks.rank and not files[part].is_file():
            # a part is one file: the last sample may make it longer than the others
            with ActivationWriter(
                out, **how, split=split, rank=part, shard_bytes=sys.maxsize, finalize=False, anew=True
            ) as writer:
                for start in range(first, last, ROWS):
                    n = min(ROWS, last - start)
                    x, labels = data.rows(start, n, columns=data.label_names)
                    writer.write(x, **labels)
        if progress is not None:
            progress(last - first)
    return all(file.is_file() for file in files)


def _refuse_other(
    data: ActivationDataset, folder: Path, split: str, how: dict[str, Any], parts: dict[Path, tuple[int, int]]
) -> None:
    """Files that are there already must be those that this conversion would write: by header, cut, rows and source."""
    wrong: list[str] = []
    if (folder / PARTS).is_file():
        header = ShardHeader(how["config"], how["d"], how["dtype"], float(how["scale"]), how["columns"], how["source"])
        wrong = header.differences(ShardHeader.from_json(read_json(folder / PARTS)))
    for file in () if wrong else shards_in(folder).get(split, ()):
        first, last = parts.get(file, (0, 0))
        if (rows := ParquetSource(LocalFile(file)).n_rows) != last - first:
            wrong.append(f"{file.name} of {rows:,} rows instead of {last - first:,}")
            break
    said, source = folder / f".source-{split}", _source_id(data)
    if said.is_file() and said.read_text(encoding="utf-8") != source:
        wrong.append(f"{how['source']['converted_from']} holds other values than when this was begun")
    if wrong:
        raise DataError(
            f"{folder} holds other activations: {'; '.join(wrong)}",
            hint="convert into an empty folder, or remove this one to start over",
        )
    write_text_atomic(said, source)


def _source_id(data: ActivationDataset) -> str:
    """A hash of sizes and of a few blocks of every file of the source: a copy has the same, other values another."""
    digest = hashlib.sha256()
    for path in dict.fromkeys(Path(source.name) for source in data.sources):
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with open(path, "rb") as file:
            for part in range(9):
                file.seek(max(0, size - SAMPLED) * part // 8)
                digest.update(file.read(SAMPLED))
    return digest.hexdigest()[:16]


def _sample_start(data: ActivationDataset, row: int) -> int:
    """The first row from `row` on that begins a sample; the row itself where samples are not known."""
    if row == 0 or "sample_id" not in data.label_names:
        return row
    before = None
    for start in range(row - 1, data.n_rows, ROWS):
        ids = np.asarray(data.shards.labels(["sample_id"], [(start, min(start + ROWS, data.n_rows))])["sample_id"])
        begins = np.flatnonzero((ids != np.concatenate([ids[:1] if before is None else before, ids[:-1]])) | (ids < 0))
        begins = begins[begins + start >= row]
        if len(begins):
            return start + int(begins[0])
        before = ids[-1:]
    return data.n_rows


def _largest_scale(data: ActivationDataset) -> float:
    """The scale at which the largest value fits float16."""
    found = 0.0
    for batch in data.batches(ROWS, shuffle=False, dtype=torch.float32):
        found = max(found, float(batch.abs().amax()))
    return scale_for(found)


def _kind(data: ActivationDataset, name: str) -> str:
    """The column type to store a label as."""
    first = data.shards.labels([name], [(0, 1)])[name]
    kinds = {"b": "bool", "i": "int64", "u": "int64", "f": "float32"}
    return kinds.get(np.asarray(first).dtype.kind, "string")
