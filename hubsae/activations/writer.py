"""Write activations: one row per token, statistics on the way, every finished file complete in itself.

    vectors [rows, d] -> buffer of one page -> row group -> DIR/<config>/<split>-<rank>-<index>.parquet

A shard is written under a temporary name and renamed when it is whole, and it is cut between two samples. So after
a kill the finished shards hold whole samples, and opening the writer again reads from them which samples are done;
writing such a sample once more is a no-op. Memory is one page per split, whatever the size of the data.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.layout import (
    FOOTER_KEY,
    FORMAT_VERSION,
    FP16_MAX,
    LABELS,
    PAGE_BYTES,
    PARTS,
    SHARD_BYTES,
    TRUNCATED,
    VECTOR,
    ShardHeader,
    check_config,
    parse_shard_name,
    shard_name,
    shards_in,
)
from hubsae.activations.parquet_file import VectorFile
from hubsae.activations.parquet_source import ParquetSource
from hubsae.activations.sources import LocalFile
from hubsae.activations.splits import SplitRule
from hubsae.activations.stats import TILE, ActivationStats
from hubsae.core.errors import ConfigError, DataError, FormatError
from hubsae.core.files import atomic_path, read_json, sha256_file, write_json_atomic, writing

HEAD_ROOM = 4.0
"""A suggested scale leaves the largest value seen this factor below float16's limit."""


def scale_for(largest: float) -> float:
    """The power of two by which to multiply before storing as float16; 1 wherever that is safe.

    >>> scale_for(900.0), scale_for(7e5)
    (1.0, 0.015625)
    """
    scale = 1.0
    while largest * scale * HEAD_ROOM > FP16_MAX:
        scale /= 2
    return scale


class ActivationWriter:
    """Writes one config of an activation dataset.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as out:
    ...     with ActivationWriter(out, d=4, config="layers.6") as writer:
    ...         writer.write(torch.ones(3, 4), token_id=[5, 6, 7], position=[0, 1, 2], sample_id=0, is_prompt=True)
    ...     writer.n_rows
    3
    """

    def __init__(
        self,
        out: str | Path,
        *,
        d: int,
        config: str,
        dtype: str | torch.dtype = "float16",
        columns: Mapping[str, str] | Sequence[str] | None = None,
        scale: float = 1.0,
        split: SplitRule | str = "train",
        source: Mapping[str, Any] | None = None,
        rank: int = 0,
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float | None = None,
        finalize: bool = True,
        anew: bool = False,
    ):
        """Open `out/config` for writing, continuing what a killed run left there.

        `scale` (a power of two) multiplies the vectors before they are stored as float16; readers divide it out.
        `shard_seconds` closes a file after that time even if it is small, so that a kill costs little.
        `anew`: the files of this `rank` are one part of many, made whole by one writer: what there is of them goes.
        """
        self.out = Path(out)
        self.folder = self.out / check_config(config)
        extra = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns or (), "float32")
        if clash := sorted(set(extra) & {VECTOR, *LABELS}):
            raise ConfigError(f"extra columns may not be named {', '.join(clash)}: every dataset has those already")
        name = str(dtype).removeprefix("torch.")
        if name not in ("float16", "float32"):
            raise ConfigError(
                f"activations cannot be stored as {name}: Parquet has no such type",
                hint="store bfloat16 as float16 (exact down to 7.6e-6, with a scale if values exceed 65504)",
            )
        if scale <= 0 or np.log2(scale) % 1:
            raise ConfigError(f"scale {scale} is not a power of two", hint="such as 0.0625, so that scaling is exact")
        if name == "float32" and scale != 1:
            raise ConfigError("float32 needs no scale", hint="leave scale at 1")
        self.header = ShardHeader(config, int(d), name, float(scale), extra, dict(source or {}))
        self.rank, self.shard_bytes, self.shard_seconds = rank, shard_bytes, shard_seconds
        self.rule = split if isinstance(split, SplitRule) else SplitRule()
        names = self.rule.names if isinstance(split, SplitRule) else (split,)
        self._finalize = finalize
        self.folder.mkdir(parents=True, exist_ok=True)
        if anew:
            self._begin_part(names)
        elif (self.folder / PARTS).is_file():
            raise DataError(
                f"{self.folder} is written in parts",
                hint="go on with parts=True (--executor), or write into an empty folder",
            )
        self.journal = Journal(self.folder, rank)
        finished, rows, next_index = self._take_up(() if anew else names)
        nothing = np.empty(0, dtype=np.int64)
        self._streams = {
            n: _Stream(self, n, next_index.get(n, 0), finished.get(n, nothing), rows.get(n, 0)) for n in names
        }

    def _begin_part(self, names: tuple[str, ...]) -> None:
        """Agree with the writers of other parts on what the folder holds, and remove an unfinished attempt at this."""
        said = self.folder / PARTS
        if not said.is_file():
            if shards_in(self.folder):
                raise DataError(f"{self.folder} holds activations already", hint="write into an empty folder")
            write_json_atomic(said, self.header.to_json())
        self._refuse_other(ShardHeader.from_json(read_json(said)))
        for left in [p for name in names for p in self.folder.glob(f"{name}-{self.rank:05d}-*.parquet")]:
            left.unlink()

    def _take_up(self, names: tuple[str, ...]) -> tuple[dict, dict, dict]:
        """What earlier runs finished, per split: sample ids, rows, and our next file number."""
        finished = {n: np.empty(0, dtype=np.int64) for n in names}
        rows, next_index = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        for split, paths in shards_in(self.folder).items():
            if split not in names:
                continue
            ids = []
            for path in paths:
                self.journal.check(path)
                found = ParquetSource(LocalFile(path))
                if found.header is None:
                    raise DataError(f"{path} was not written by hubsae", hint="write into an empty folder")
                self._refuse_other(found.header)
                ids.append(np.unique(found.labels(["sample_id"], 0, found.n_rows)["sample_id"]))
                rows[split] += found.n_rows
                _, rank, index = parse_shard_name(path.name) or (split, 0, 0)
                if rank == self.rank:
                    next_index[split] = max(next_index[split], index + 1)
            known = np.unique(np.concatenate(ids))
            finished[split] = known[known >= 0]  # negative ids mean "unknown": they name no sample
        for stale in self.folder.glob(f".*-{self.rank:05d}-*.parquet.*.tmp"):
            stale.unlink()
        return finished, rows, next_index

    def _refuse_other(self, found: ShardHeader) -> None:
        if wrong := self.header.differences(found):
            raise DataError(
                f"{self.folder} holds other activations: {'; '.join(wrong)}",
                hint="write into another folder, or remove this one to start over",
            )

    @property
    def n_rows(self) -> int:
        """Rows written so far, those of earlier runs included."""
        return sum(stream.n_rows for stream in self._streams.values())

    def done(self, sample_ids: np.ndarray) -> np.ndarray:
        """True [samples] where all rows of a sample lie in shards that earlier runs finished."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        within = {name: np.isin(ids, stream.finished) for name, stream in self._streams.items()}
        if self.rule.kind == "token" or len(within) == 1:
            return np.logical_and.reduce(list(within.values()))
        return np.where(self.rule.validation(ids, np.zeros_like(ids)), within["validation"], within["train"])

    def write(
        self,
        vectors: Tensor | np.ndarray,
        token_id: Any = -1,
        position: Any = -1,
        sample_id: Any = -1,
        is_prompt: Any = False,
        **extra: Any,
    ) -> None:
        """Append rows: vectors [rows, d] in any float type, labels [rows] or one value for all.

        Values float16 cannot hold stop the run with the scale to use; nothing of the call is written then.
        """
        x = vectors if isinstance(vectors, Tensor) else torch.from_numpy(np.ascontiguousarray(vectors))
        x = x.detach().cpu()
        if x.ndim != 2 or x.shape[1] != self.header.d:
            raise DataError(
                f"{self.header.config}: expected vectors of shape [rows, {self.header.d}], found {tuple(x.shape)}"
            )
        if set(extra) != set(self.header.columns):
            raise DataError(
                f"{self.header.config}: expected the extra columns {sorted(self.header.columns)}, found {sorted(extra)}"
            )
        if not len(x):
            return
        given = {"token_id": token_id, "position": position, "sample_id": sample_id, "is_prompt": is_prompt, **extra}
        labels = {name: self._label(name, value, len(x)) for name, value in given.items()}
        self._check_range(x)
        validation = self.rule.validation(labels["sample_id"], labels["position"])
        with self._writing():
            self._append(x, labels, validation)

    def _append(self, x: Tensor, labels: dict[str, np.ndarray], validation: np.ndarray) -> None:
        for name, stream in self._streams.items():
            if len(self._streams) == 1:
                keep = np.ones(len(x), dtype=bool)
            else:
                keep = validation if name == "validation" else ~validation
            if len(stream.finished):
                keep = keep & ~np.isin(labels["sample_id"], stream.finished)
            if keep.all():
                stream.append(x, labels)
            elif keep.any():
                stream.append(x[torch.from_numpy(np.flatnonzero(keep))], {k: v[keep] for k, v in labels.items()})

    def _label(self, name: str, value: Any, rows: int) -> np.ndarray:
        kind = {**LABELS, **self.header.columns}[name]
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.ndim > 1 or (array.ndim == 1 and len(array) != rows):
            raise DataError(f"column {name}: expected {rows} values, found shape {array.shape}")
        if kind != "string":
            array = array.astype(kind, copy=False)
        return np.broadcast_to(array, (rows,))

    def _check_range(self, x: Tensor) -> None:
        # by tiles, because a float32 copy of everything would double the memory; NaN survives amax
        largest = float(torch.stack([t.float().abs().amax() for t in x.split(TILE)]).amax())
        if not np.isfinite(largest):
            bad = int((~torch.isfinite(x)).any(dim=1).nonzero()[0])
            raise DataError(
                f"{self.header.config}: row {bad} of this batch holds infinity or NaN before anything was stored",
                hint="the model itself overflowed: run it in bfloat16 or float32",
            )
        if self.header.dtype == "float16" and largest * self.header.scale > FP16_MAX:
            raise DataError(
                f"{self.header.config}: {largest:.6g} does not fit float16 (at most {FP16_MAX / self.header.scale:.6g} "
                f"with scale {self.header.scale:g})",
                hint=f"start over with scale={scale_for(largest)!r}, or store float32",
            )

    def commit(self) -> None:
        """Close the current files, so that everything written so far survives a kill. Call between samples."""
        with self._writing():
            for stream in self._streams.values():
                stream.commit()

    def _writing(self) -> AbstractContextManager[None]:
        kept = sum(stream.n_rows - stream.shard_rows for stream in self._streams.values())
        return writing(self.folder, still_good=f"{kept:,} rows lie in finished files there")

    def commit_older_than(self, seconds: float) -> None:
        """Close those of the current files that were begun at least that long ago. Call between samples."""
        with self._writing():
            for stream in self._streams.values():
                if stream.shard_rows and time.monotonic() - stream.opened >= seconds:
                    stream.commit()

    def abort(self) -> None:
        """Give up the unfinished files; finished ones stay."""
        for stream in self._streams.values():
            stream.abort()

    def close(self) -> None:
        """Finish the last files and, unless told otherwise, write manifest, statistics and card of the dataset."""
        self.commit()
        if self._finalize:
            from hubsae.activations.manifest import finalize

            finalize(self.out)

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class Journal:
    """The sha256 of every finished file of one rank, so that a resumed harvest builds on no damaged one."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f".journal-{rank:05d}.json"
        self.known: dict[str, str] = read_json(self.path) if self.path.is_file() else {}

    def add(self, name: str, written: Path) -> None:
        """Enter the file that will be called `name`."""
        self.known[name] = sha256_file(written)
        write_json_atomic(self.path, self.known)

    def check(self, path: Path) -> None:
        """Refuse a file that is not as it was written; one that another rank or version wrote is not known."""
        expected = self.known.get(path.name)
        if expected is not None and (found := sha256_file(path)) != expected:
            raise FormatError(
                path, f"the file with sha256 {expected}", f"one with {found}",
                hint="it was damaged behind the harvest: remove it, and its samples are done again",
            )  # fmt: skip


class _Stream:
    """The shards of one split: a buffer of one page, and the file that is being written."""

    def __init__(self, writer: ActivationWriter, split: str, index: int, finished: np.ndarray, n_rows: int):
        self.writer, self.split, self.index = writer, split, index
        self.finished, self.n_rows = finished, n_rows
        header = writer.header
        self.row_bytes = header.d * (2 if header.dtype == "float16" else 4)
        self.capacity = max(1, PAGE_BYTES // self.row_bytes)
        # memory that no row was written to takes no room: a small validation split does not cost 8 MiB
        self.buffer = torch.empty(self.capacity, header.d, dtype=getattr(torch, header.dtype))
        kinds = {**LABELS, **header.columns}
        self.labels = {n: np.empty(self.capacity, dtype=object if k == "string" else k) for n, k in kinds.items()}
        self.fill = 0
        self.shard_rows = self.samples = self.truncated = 0
        self.last_sample = -1
        self.stats = ActivationStats(header.d)
        self.parquet: VectorFile | None = None
        self.opened = 0.0
        self.cleanup = contextlib.ExitStack()

    def append(self, x: Tensor, labels: dict[str, np.ndarray]) -> None:
        """Add rows, closing the file at the first boundary between samples where it is full."""
        sample = labels["sample_id"]
        # a row may begin a file if its sample is another than that of the row before, or unknown
        before = np.concatenate([[self.last_sample], sample[:-1]])
        starts = np.flatnonzero((sample != before) | (sample < 0))
        at = 0
        while at < len(x):
            if self.shard_rows and self._full() and (sample[at] < 0 or sample[at] != self.last_sample):
                self.commit()
            room = max(1, -(-(self.writer.shard_bytes - self.shard_rows * self.row_bytes) // self.row_bytes))
            later = starts[np.searchsorted(starts, at + room) :]
            stop = int(later[0]) if len(later) else len(x)
            self._add(x[at:stop], {name: values[at:stop] for name, values in labels.items()})
            at = stop

    def _add(self, x: Tensor, labels: dict[str, np.ndarray]) -> None:
        if not self.shard_rows:
            self.opened = time.monotonic()
        scale = self.writer.header.scale
        for start in range(0, len(x), TILE):
            tile = x[start : start + TILE].float()  # [tile, d]
            rows = {name: values[start : start + TILE] for name, values in labels.items()}
            self.stats.see(tile, rows["position"], rows)
            stored = tile if scale == 1 else tile * scale
            taken = 0
            while taken < len(tile):
                part = min(len(tile) - taken, self.capacity - self.fill)
                at, origin = slice(self.fill, self.fill + part), start + taken
                self.buffer[at] = stored[taken : taken + part]
                for name, values in labels.items():
                    self.labels[name][at] = values[origin : origin + part]
                self.fill += part
                taken += part
                if self.fill == self.capacity:
                    self._flush()
        sample = labels["sample_id"]
        begins = sample != np.concatenate([[self.last_sample], sample[:-1]])
        self.samples += int(begins.sum())
        if TRUNCATED in labels:
            self.truncated += int(labels[TRUNCATED][begins].sum())
        self.shard_rows += len(x)
        self.n_rows += len(x)
        self.last_sample = int(labels["sample_id"][-1])

    def _full(self) -> bool:
        limit = self.writer.shard_seconds
        too_old = limit is not None and time.monotonic() - self.opened > limit
        return too_old or self.shard_rows * self.row_bytes >= self.writer.shard_bytes

    def _flush(self) -> None:
        """Write the buffer as one page."""
        if not self.fill:
            return
        if self.parquet is None:
            final = self.writer.folder / shard_name(self.split, self.writer.rank, self.index)
            temporary = self.cleanup.enter_context(atomic_path(final))
            file = self.cleanup.enter_context(open(temporary, "wb"))  # noqa: SIM115
            self.parquet = VectorFile(file, self.writer.header)
        self.parquet.page(self.buffer[: self.fill].numpy(), {k: v[: self.fill] for k, v in self.labels.items()})
        self.fill = 0

    def commit(self) -> None:
        """Finish the current file, if there is one, and rename it into place."""
        if not self.shard_rows:
            return
        self._flush()
        record = {"version": FORMAT_VERSION, **self.writer.header.to_json(), "split": self.split}
        record |= {"rows": self.shard_rows, "samples": self.samples, "truncated": self.truncated}
        record["statistics"] = self.stats.to_json()
        assert self.parquet is not None
        self.parquet.close({FOOTER_KEY: json.dumps(record, ensure_ascii=False, allow_nan=False)})
        self.parquet.file.flush()
        # the journal comes first: a file that a kill leaves under its final name is always in it
        self.writer.journal.add(shard_name(self.split, self.writer.rank, self.index), Path(self.parquet.file.name))
        self.cleanup.close()
        self.parquet = None
        self.index += 1
        self.shard_rows = self.samples = self.truncated = 0
        self.last_sample = -1
        self.stats = ActivationStats(self.writer.header.d)

    def abort(self) -> None:
        """Drop the unfinished file."""
        self.parquet = None
        with contextlib.suppress(_Aborted), self.cleanup:
            raise _Aborted
        self.n_rows -= self.shard_rows
        self.fill = self.shard_rows = self.samples = self.truncated = 0


class _Aborted(Exception):
    """Tells `atomic_path` to remove the temporary file."""
