"""Where vectors are read from: one interface over Parquet shards, bare tensors, and SAELens' cached activations.

A source has rows of vectors in file order, natural blocks in which reading is cheap (pages, row groups,
record batches), and label columns. `read(start, stop, out)` fills rows of a tensor; nothing else is assumed.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.layout import LABELS, VECTOR, ShardHeader, read_header
from hubsae.activations.parquet_pages import (
    Footer,
    Page,
    check_page,
    footer_length,
    index_range,
    pages_of,
    parse_footer,
)
from hubsae.activations.stats import RunningStats
from hubsae.core.errors import DataError, FormatError
from hubsae.core.extras import require

TAIL_BYTES = 256 << 10
"""First read of a file: its footer, page index and statistics are usually in it."""
REMOTE_PAGES = 4
"""Pages fetched together from the Hub: 32 MB ranges waste little time waiting."""
BLOCK_ROWS = 4096
"""Rows of a block where the format has no blocks of its own."""


class ByteFile(Protocol):
    """A file that can be read at any place: a local one, or ranges of one on the Hub."""

    name: str
    size: int
    remote: bool

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill the views, one after the other, from `offset` on."""
        ...

    def arrow(self) -> Any:
        """The file as pyarrow opens it."""
        ...


class LocalFile:
    """A file on this machine, read with `preadv` straight into the caller's memory."""

    remote = False

    def __init__(self, path: str | os.PathLike[str]):
        self.name = os.fspath(path)
        try:
            self.handle = os.open(self.name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise DataError(f"{self.name} cannot be opened: {error.strerror}") from error
        self.size = os.fstat(self.handle).st_size

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill the views from `offset` on."""
        wanted = sum(len(v) for v in views)
        done = os.preadv(self.handle, list(views), offset)
        while done < wanted:  # a single call returns at most 2 GiB, and may be interrupted
            rest, skip = [], done
            for view in views:
                if skip < len(view):
                    rest.append(view[skip:])
                skip = max(0, skip - len(view))
            more = os.preadv(self.handle, rest, offset + done)
            if more <= 0:
                raise FormatError(
                    self.name, f"{wanted} bytes at {offset}", f"only {done}", hint="the file was cut while it was read"
                )
            done += more

    def arrow(self) -> Any:
        """The path."""
        return self.name

    def __reduce__(self) -> Any:
        return type(self), (self.name,)  # a worker process opens its own

    def __del__(self) -> None:
        if (handle := getattr(self, "handle", None)) is not None:
            os.close(handle)


def raw_view(rows: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return rows.view(torch.uint8).numpy().reshape(-1).data


class Source:
    """Rows of vectors. Subclasses set `name, n_rows, d, dtype, blocks, label_names` and implement `read`."""

    name: str
    n_rows: int
    d: int
    dtype: torch.dtype
    blocks: list[tuple[int, int]]
    """(first row, rows) of each natural block"""
    label_names: tuple[str, ...] = ()
    scale: float = 1.0
    header: ShardHeader | None = None
    stats: RunningStats | None = None
    counts: Mapping[str, int] = MappingProxyType({})
    """Samples in the file, and how many of them were cut at the length limit."""
    remote = False

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, d], of `dtype`, with stored values."""
        raise NotImplementedError

    def labels(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Label columns of rows start to stop."""
        if names:
            raise DataError(f"{self.name} has no column {names[0]!r}: it holds bare vectors")
        return {}


def _joined(pages: Sequence[Page], count: int) -> list[tuple[int, int]]:
    """Blocks of up to `count` neighbouring pages of one row group."""
    blocks: list[tuple[int, int]] = []
    held, group = 0, -1
    for page in pages:
        if page.row_group == group and held < count:
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + page.n_rows)
            held += 1
        else:
            blocks.append((page.first_row, page.n_rows))
            held, group = 1, page.row_group
    return blocks


def _even_blocks(rows: int) -> list[tuple[int, int]]:
    return [(first, min(BLOCK_ROWS, rows - first)) for first in range(0, rows, BLOCK_ROWS)]


class _Run:
    """Reads of adjacent places of a file, gathered into few calls."""

    MOST = 512
    """Views of one call; the system's limit is 1024."""

    def __init__(self, file: ByteFile):
        self.file, self.start, self.end = file, 0, 0
        self.views: list[memoryview] = []

    def add(self, offset: int, view: memoryview) -> None:
        """Read `view` from `offset`, now or with the next flush."""
        if self.views and (offset != self.end or len(self.views) >= self.MOST):
            self.flush()
        if not self.views:
            self.start = self.end = offset
        self.views.append(view)
        self.end += len(view)

    def flush(self) -> None:
        """Do the reads that wait."""
        if self.views:
            self.file.read_into(self.start, self.views)
            self.views = []


class ParquetSource(Source):
    """A Parquet shard: pages read directly where the layout allows it, through pyarrow elsewhere."""

    def __init__(self, file: ByteFile, *, vector: str = VECTOR, verify: bool = False):
        self.file, self.name, self.vector, self.verify, self.remote = file, file.name, vector, verify, file.remote
        tail_size = min(TAIL_BYTES, file.size)
        tail = self._bytes(file.size - tail_size, tail_size)
        length = footer_length(self.name, tail, file.size)
        if length > tail_size:
            tail_size = min(file.size, length + TAIL_BYTES)
            tail = self._bytes(file.size - tail_size, tail_size)
        self.footer: Footer = parse_footer(self.name, tail[-length:], vector)
        if vector not in {name.split(".")[0] for name in self.footer.columns}:
            raise DataError(
                f"{self.name} has no column {vector!r}",
                hint=f"its columns are {', '.join(sorted({c.split('.')[0] for c in self.footer.columns}))}; "
                "name the one with the vectors: vector=...",
            )
        found = read_header(self.name, self.footer.metadata)
        if found is not None:
            self.header, record = found
            self.d, self.dtype, self.scale = self.header.d, getattr(torch, self.header.dtype), self.header.scale
            self.counts = {k: int(record.get(k, 0)) for k in ("samples", "truncated")}
            try:
                self.stats = RunningStats.from_json(record["statistics"])
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(self.name, "statistics in the footer", f"none that parse ({error})") from error
        else:
            self.d, self.dtype = self._foreign_shape()
        self.n_rows = self.footer.n_rows
        self.label_names = tuple(c for c in self.footer.columns if "." not in c and c != vector)
        if self.header is not None and set(self.label_names) != set(LABELS) | set(self.header.columns):
            raise FormatError(
                self.name,
                f"the columns {', '.join([*LABELS, *self.header.columns])}",
                ", ".join(self.label_names),
                hint="the file is damaged",
            )
        self.row_bytes = self.d * self.dtype.itemsize
        self.pages = self._find_pages(tail, file.size - tail_size)
        if self.header is None and self.pages is not None and not self._all_dense(self.pages):
            self.pages = None
        self.starts = [p.first_row for p in self.pages or ()]
        group_starts = np.concatenate([[0], np.cumsum(self.footer.row_groups)]).tolist()
        self.group_starts: list[int] = [int(s) for s in group_starts]
        if self.pages is not None:
            self.blocks = _joined(self.pages, REMOTE_PAGES if self.remote else 1)
        else:
            self.blocks = [(s, n) for s, n in zip(self.group_starts, self.footer.row_groups, strict=False) if n]
        self._checked: set[int] = set()
        self._groups: dict[tuple[int, tuple[str, ...]], Any] = {}

    def _bytes(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.file.read_into(offset, [memoryview(data)])
        return bytes(data)

    def _all_dense(self, pages: list[Page]) -> bool:
        """Whether every page of a file of other origin is laid out as the direct path needs it."""
        try:
            for page in pages:
                head = self._bytes(page.offset, page.size - page.n_rows * self.row_bytes)
                check_page(self.name, page, head, self.d)
        except FormatError:
            return False  # pyarrow reads it, or says what is wrong
        return True

    def _foreign_shape(self) -> tuple[int, torch.dtype]:
        """Width and type of the vectors in a file of other origin."""
        pa = require("pyarrow", extra="train")
        kind = self._arrow_file().schema_arrow.field(self.vector).type
        if not pa.types.is_fixed_size_list(kind):
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise DataError(f"{self.name}: column {self.vector!r} holds {kind}, not vectors")
            first = self._arrow_file().read_row_group(0, columns=[self.vector])[self.vector][0].as_py()
            d = len(first or ())
        else:
            d = kind.list_size
        types = {pa.float16(): torch.float16, pa.float32(): torch.float32, pa.float64(): torch.float32}
        if kind.value_type not in types or not d:
            raise DataError(f"{self.name}: column {self.vector!r} holds {kind}, not vectors of float16 or float32")
        return d, types[kind.value_type]

    def _arrow_file(self) -> Any:
        pq = require("pyarrow.parquet", extra="train")
        pa = require("pyarrow", extra="train")
        try:
            return pq.ParquetFile(self.file.arrow(), page_checksum_verification=self.verify)
        except (pa.ArrowInvalid, OSError) as error:
            raise FormatError(self.name, "a readable Parquet file", str(error)) from error

    def _find_pages(self, tail: bytes, tail_start: int) -> list[Page] | None:
        span = index_range(self.footer)
        physical = {c.get(3, {}).get(1) for c in self.footer.chunks}
        if span is None or physical != {7 if self.dtype == torch.float16 else 4}:
            return None
        start, stop = span
        if start >= tail_start and stop <= self.file.size:
            index = tail[start - tail_start : stop - tail_start]
        elif 0 < start <= stop <= self.file.size:
            index = self._bytes(start, stop - start)
        else:
            raise FormatError(self.name, "a page index inside the file", f"one at bytes {start} to {stop}")
        return pages_of(self.name, self.footer, index, start, self.row_bytes, self.file.size)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` with rows start to stop: whole pages in one call each, header checked; parts by their bytes."""
        if self.pages is None:
            self._read_through_arrow(start, stop, out)
            return
        number = bisect_right(self.starts, start) - 1
        at = start
        run = _Run(self.file)  # pages that follow each other in the file are read in one call
        heads: list[tuple[int, bytearray, memoryview]] = []
        while at < stop:
            page = self.pages[number]
            upto = min(stop, page.first_row + page.n_rows)
            view = raw_view(out[at - start : upto - start])
            head_size = page.size - page.n_rows * self.row_bytes
            if upto - at == page.n_rows:
                if number not in self._checked or self.remote:
                    head = bytearray(head_size)
                    run.add(page.offset, memoryview(head))
                    heads.append((number, head, view))
                run.add(page.offset + head_size, view)
            else:
                if number not in self._checked:
                    self._check_apart(number, page, head_size)
                run.add(page.offset + head_size + (at - page.first_row) * self.row_bytes, view)
            at, number = upto, number + 1
        run.flush()
        for index, head, view in heads:
            check_page(self.name, self.pages[index], memoryview(head), self.d, view if self.verify else None)
            self._checked.add(index)

    def _check_apart(self, number: int, page: Page, head_size: int) -> None:
        """Check a page of which only a part is wanted."""
        head = bytearray(page.size if self.verify else head_size)
        self.file.read_into(page.offset, [memoryview(head)])
        values = memoryview(head)[head_size:] if self.verify else None
        check_page(self.name, page, memoryview(head)[:head_size], self.d, values)
        self._checked.add(number)

    def _group(self, number: int, names: tuple[str, ...]) -> Any:
        """Columns of a row group, the last few kept: neighbouring blocks ask for the same ones."""
        key = (number, names)
        if key not in self._groups:
            pa = require("pyarrow", extra="train")
            try:
                table = self._arrow_file().read_row_group(number, columns=list(names))
                if missing := set(names) - set(table.schema.names):
                    raise OSError(f"no column {', '.join(sorted(missing))}")
            except (pa.ArrowInvalid, OSError) as error:
                raise FormatError(self.name, f"a readable row group {number}", str(error)) from error
            while len(self._groups) >= (1 if self.vector in names else 16):
                self._groups.pop(next(iter(self._groups)))
            self._groups[key] = table
        return self._groups[key]

    def _spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(row group, first, last) inside each row group that rows start to stop touch."""
        spans = []
        number = bisect_right(self.group_starts, start) - 1
        while start < stop:
            first, last = self.group_starts[number], self.group_starts[number + 1]
            upto = min(stop, last)
            if upto > start:
                spans.append((number, start - first, upto - first))
            start, number = max(start, upto), number + 1
        return spans

    def _read_through_arrow(self, start: int, stop: int, out: Tensor) -> None:
        at = 0
        for number, first, last in self._spans(start, stop):
            column = self._group(number, (self.vector,))[self.vector].slice(first, last - first).combine_chunks()
            flat = column.flatten()
            if column.null_count or flat.null_count or len(flat) != (last - first) * self.d:
                raise DataError(
                    f"{self.name}: rows {start} to {stop - 1} hold missing values or vectors that are not of {self.d}"
                )
            values = torch.from_numpy(flat.to_numpy(zero_copy_only=False).reshape(-1, self.d).copy())
            out[at : at + last - first] = values
            at += last - first

    def labels(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Label columns of rows start to stop."""
        if missing := [n for n in names if n not in self.label_names]:
            raise DataError(
                f"{self.name} has no column {missing[0]!r}", hint=f"its columns are {', '.join(self.label_names)}"
            )
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for number, first, last in self._spans(start, stop):
            table = self._group(number, tuple(sorted(names)))
            for name in names:
                parts[name].append(table[name].slice(first, last - first).to_numpy())
        return {name: np.concatenate(found) if found else np.empty(0) for name, found in parts.items()}


class TensorSource(Source):
    """A matrix in memory or memory-mapped: `from_tensor`, `.pt` piles."""

    def __init__(self, tensor: Tensor, name: str = "tensor", labels: dict[str, np.ndarray] | None = None):
        if tensor.ndim != 2:
            raise DataError(f"{name}: expected a matrix [rows, d], found shape {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float16, torch.float32, torch.bfloat16, torch.float64):
            raise DataError(f"{name}: expected floating-point activations, found {tensor.dtype}")
        self.tensor = tensor.detach().cpu()
        if self.tensor.dtype == torch.float64:
            self.tensor = self.tensor.float()
        self.name, (self.n_rows, self.d), self.dtype = name, tensor.shape, self.tensor.dtype
        self.blocks = _even_blocks(self.n_rows)
        self.extra = {k: np.asarray(v) for k, v in (labels or {}).items()}
        for key, column in self.extra.items():
            if len(column) != self.n_rows:
                raise DataError(f"{name}: column {key} has {len(column)} values for {self.n_rows} rows")
        self.label_names = tuple(self.extra)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copy rows."""
        out.copy_(self.tensor[start:stop])

    def labels(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Label columns given beside the tensor."""
        missing = [n for n in names if n not in self.extra]
        return super().labels(missing, start, stop) or {n: self.extra[n][start:stop] for n in names}


class RawSource(Source):
    """A matrix that lies contiguously in a file (`.npy`, a tensor of a `.safetensors`), read like a page."""

    def __init__(self, file: ByteFile, offset: int, shape: tuple[int, int], dtype: torch.dtype, name: str):
        self.file, self.offset, self.name, self.dtype, self.remote = file, offset, name, dtype, file.remote
        self.n_rows, self.d = shape
        self.row_bytes = self.d * dtype.itemsize
        if offset + self.n_rows * self.row_bytes > file.size:
            raise FormatError(name, f"{self.n_rows} rows of {self.row_bytes} bytes", f"{file.size - offset} bytes")
        self.blocks = _even_blocks(self.n_rows)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Read rows."""
        self.file.read_into(self.offset + start * self.row_bytes, [raw_view(out)])


class ArrowSource(Source):
    """SAELens' cached activations: Arrow files with one context of vectors [context, d] and its tokens per row."""

    label_names = tuple(LABELS)

    def __init__(self, path: Path, hook: str, first_sample: int):
        pa = require("pyarrow", extra="train")
        try:
            with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
                self.batches = [batch for batch in stream if batch.num_rows]
        except (pa.ArrowInvalid, OSError) as error:
            raise FormatError(path, "an Arrow stream file", str(error)) from error
        self.name, self.hook, self.first_sample = str(path), hook, first_sample
        self.n_samples = sum(b.num_rows for b in self.batches)
        if not self.batches:
            raise FormatError(path, "cached activations", "no rows")
        first = self._vectors(self.batches[0].slice(0, 1))
        contexts = self.batches[0].column("token_ids").slice(0, 1).flatten()
        self.context = len(contexts) if "token_ids" in self.batches[0].schema.names else 1
        self.d, remainder = divmod(first.size, self.context)
        if remainder:
            raise FormatError(path, f"vectors for {self.context} tokens per row", f"{first.size} values")
        self.dtype = torch.float16 if first.dtype == np.float16 else torch.float32
        self.sizes = [b.num_rows * self.context for b in self.batches]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).tolist()
        self.n_rows = int(self.starts[-1])
        self.blocks = list(zip(self.starts[:-1], self.sizes, strict=True))

    def _vectors(self, batch: Any) -> np.ndarray:
        column = batch.column(self.hook)
        column = getattr(column, "storage", column)
        while hasattr(column, "flatten") and str(column.type).startswith(("list", "fixed_size_list", "large_list")):
            column = column.flatten()
        return column.to_numpy(zero_copy_only=False)

    def _spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        number, spans = bisect_right(self.starts, start) - 1, []
        while start < stop:
            upto = min(stop, self.starts[number + 1])
            spans.append((number, start - self.starts[number], upto - self.starts[number]))
            start, number = upto, number + 1
        return spans

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copy rows out of the mapped file."""
        at = 0
        for number, first, last in self._spans(start, stop):
            low, high = first // self.context, -(-last // self.context)
            values = self._vectors(self.batches[number].slice(low, high - low)).reshape(-1, self.d)
            rows = values[first - low * self.context : last - low * self.context]
            out[at : at + len(rows)] = torch.from_numpy(np.ascontiguousarray(rows))
            at += len(rows)

    def labels(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Token, position and sample of each row; the cache does not say which tokens were prompt."""
        rows = np.arange(start, stop)
        parts = {
            "position": (rows % self.context).astype(np.int32),
            "sample_id": rows // self.context + self.first_sample,
            "is_prompt": np.zeros(len(rows), dtype=bool),
        }
        if "token_id" in names:
            tokens = [
                self.batches[n].column("token_ids").flatten().to_numpy(zero_copy_only=False)[a:b]
                for n, a, b in self._spans(start, stop)
            ]
            parts["token_id"] = np.concatenate(tokens).astype(np.int32) if tokens else np.empty(0, np.int32)
        if missing := [n for n in names if n not in parts]:
            raise DataError(f"{self.name} has no column {missing[0]!r}", hint=f"it has {', '.join(self.label_names)}")
        return {n: parts[n] for n in names}
