"""Rewrite activations of any readable layout into ours: SAELens caches, `.pt` and `.npy` piles, other Parquet."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubsae.activations.dataset import ActivationDataset
from hubsae.activations.layout import LABELS, SHARD_BYTES, configs_in
from hubsae.activations.manifest import finalize
from hubsae.activations.opening import find_activations, find_pile
from hubsae.activations.writer import ActivationWriter, scale_for
from hubsae.core.errors import DataError

ROWS = 8192


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
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the activations at `path` into the folder `out`; labels the source lacks get the value -1.

    `dtype` is float32 for float32 sources and float16 otherwise, unless given; `config` renames the only config.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     np.save(f"{d}/layer6.npy", np.ones((5, 4), np.float16))
    ...     ActivationDataset.open(convert(f"{d}/layer6.npy", f"{d}/out"), "layers.6").n_rows
    5
    """
    target = Path(out)
    if configs_in(target):
        raise DataError(f"{target} holds activations already", hint="convert into an empty folder")
    names = list_configs(Path(path), vector)
    if config is not None and len(names) > 1:
        raise DataError(f"{path} holds {len(names)} configs, so they cannot all be named {config!r}")
    for name, splits in names.items():
        for split in splits:
            data = ActivationDataset.open(path, name, split, vector=vector)
            _convert_one(data, target, config or name, split, dtype, scale, source, shard_bytes, progress)
    return finalize(target)


def list_configs(path: Path, vector: str | None = None) -> dict[str, list[str]]:
    """Configs and splits of whatever lies at `path`."""
    if path.is_dir() and configs_in(path):
        raise DataError(f"{path} is in our format already")
    if path.is_dir() and (path / "state.json").is_file():
        return {name: ["train"] for name in find_activations(path, None, "train").configs}
    pile = find_pile(path)
    if not pile:
        find_activations(path, None, "train", vector=vector)  # raises the error that says what is known
    return {name: list(splits) for name, splits in pile.items()}


def _convert_one(
    data: ActivationDataset, out: Path, config: str, split: str, dtype: str | None, scale: float | str,
    source: dict[str, Any] | None, shard_bytes: int, progress: Callable[[int], None] | None,
) -> None:  # fmt: skip
    kind = dtype or ("float32" if data.stored_dtype == torch.float32 else "float16")
    factor = 1.0 if kind != "float16" else float(scale) if scale != "auto" else scale_for(_largest(data))
    extra = {name: _kind(data, name) for name in data.label_names if name not in LABELS}
    record: dict[str, Any] = {"converted_from": Path(data.path).name, **data.info, **(source or {})}
    if found := re.fullmatch(r"(?:(?P<stage>.+)\.)?(?P<hook>layers\.\d+.*)", config):
        record = {"hook_point": found["hook"], **({"stage": found["stage"]} if found["stage"] else {}), **record}
    writer = ActivationWriter(
        out, d=data.d, dtype=kind, config=config, scale=factor, split=split, columns=extra, source=record,
        shard_bytes=shard_bytes, finalize=False,
    )  # fmt: skip
    with writer:
        for x, labels in data.labelled_batches(data.label_names, ROWS, shuffle=False, dtype=_computing_type(data)):
            writer.write(x, **labels)
            if progress is not None:
                progress(len(x))


def _computing_type(data: ActivationDataset) -> torch.dtype:
    return torch.float16 if data.stored_dtype == torch.float16 and data.scale == 1 else torch.float32


def _largest(data: ActivationDataset) -> float:
    """The largest absolute value; float16 sources cannot exceed their own type."""
    if data.stored_dtype == torch.float16 and data.scale == 1:
        return 0.0
    found = 0.0
    for batch in data.batches(ROWS, shuffle=False, dtype=torch.float32):
        found = max(found, float(batch.abs().amax()))
    return found


def _kind(data: ActivationDataset, name: str) -> str:
    """The column type to store a label as."""
    first = data._labels([name], [(0, 1)])[name]
    kinds = {"b": "bool", "i": "int64", "u": "int64", "f": "float32"}
    return kinds.get(np.asarray(first).dtype.kind, "string")
