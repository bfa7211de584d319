"""Where vectors are read from: one interface over Parquet shards, bare tensors, and SAELens' cached activations.

A source has rows of vectors in file order, natural blocks in which reading is cheap (pages, row groups,
record batches), and label columns. `read(start, stop, out)` fills rows of a tensor; nothing else is assumed.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.layout import LABELS, ShardHeader
from hubsae.activations.stats import ActivationStats
from hubsae.core.errors import DataError, FormatError
from hubsae.core.parquet import arrow

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
        # at the end of the process modules may go before their objects
        if os is not None and (handle := getattr(self, "handle", None)) is not None:
            os.close(handle)


def spans(edges: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Of parts that begin at `edges`, the last being the end: each that rows start to stop touch, and where in it.

    >>> list(spans([0, 4, 4, 6], 3, 6))
    [(0, 3, 4), (2, 0, 2)]
    """
    number = bisect_right(edges, start) - 1
    while start < stop:
        first, last = edges[number], edges[number + 1]
        upto = min(stop, last)
        if upto > start:
            yield number, start - first, upto - first
        start, number = max(start, upto), number + 1


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
    stats: ActivationStats | None = None
    counts: Mapping[str, int] = MappingProxyType({})
    """Samples in the file, and how many of them were cut at the length limit."""
    remote = False
    whole_blocks = False
    """Whether reading part of a block costs as much as all of it."""
    verify = False
    """Compare every page with its checksum, where there are any, when it is read first."""

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, d], of `dtype`, with stored values."""
        raise NotImplementedError

    def labels(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Label columns of rows start to stop; bare vectors have none."""
        return {}

    def check(self) -> int:
        """Compare every page with its header and checksum, and say how many there are: none but in Parquet."""
        return 0


def _even_blocks(rows: int) -> list[tuple[int, int]]:
    return [(first, min(BLOCK_ROWS, rows - first)) for first in range(0, rows, BLOCK_ROWS)]


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
        return {n: self.extra[n][start:stop] for n in names}


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
        pa = arrow()
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

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copy rows out of the mapped file."""
        at = 0
        for number, first, last in spans(self.starts, start, stop):
            low, high = first // self.context, -(-last // self.context)
            values = self._vectors(self.batches[number].slice(low, high - low)).reshape(-1, self.d)
            rows = values[first - low * self.context : last - low * self.context]
            out[at : at + len(rows)] = torch.from_numpy(np.array(rows))  # a copy: mapped memory is read-only
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
                for n, a, b in spans(self.starts, start, stop)
            ]
            parts["token_id"] = np.concatenate(tokens).astype(np.int32) if tokens else np.empty(0, np.int32)
        return {n: parts[n] for n in names}
