"""A Parquet shard as a source of vectors: the pages of our own files read directly, others through pyarrow."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.layout import LABELS, VECTOR, read_header
from hubsae.activations.parquet_pages import (
    Footer,
    Page,
    check_page,
    footer_length,
    index_range,
    pages_of,
    parse_footer,
)
from hubsae.activations.sources import ByteFile, Source, raw_view, spans
from hubsae.activations.stats import ActivationStats
from hubsae.core.errors import DataError, FormatError
from hubsae.core.parquet import arrow

TAIL_BYTES = 256 << 10
"""First read of a file: its footer, page index and statistics are usually in it."""


class ParquetSource(Source):
    """A Parquet shard: the pages of our own files read directly, others through pyarrow."""

    def __init__(self, file: ByteFile, *, vector: str = VECTOR):
        self.file, self.name, self.vector, self.remote = file, file.name, vector, file.remote
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
                self.stats = ActivationStats.from_json(record["statistics"])
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
        self.pages = None if self.header is None else self._find_pages(tail, file.size - tail_size)
        self.starts = [p.first_row for p in self.pages or ()]
        group_starts = np.concatenate([[0], np.cumsum(self.footer.row_groups)]).tolist()
        self.group_starts: list[int] = [int(s) for s in group_starts]
        if self.pages is not None:
            self.blocks = [(page.first_row, page.n_rows) for page in self.pages]
        else:
            self.blocks = [(s, n) for s, n in zip(self.group_starts, self.footer.row_groups, strict=False) if n]
        self.whole_blocks = self.pages is None
        self._checked: set[int] = set()
        self._groups: dict[tuple[int, tuple[str, ...]], Any] = {}

    def _bytes(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.file.read_into(offset, [memoryview(data)])
        return bytes(data)

    def _foreign_shape(self) -> tuple[int, torch.dtype]:
        """Width and type of the vectors in a file of other origin."""
        pa = arrow()
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
        pa = arrow()
        try:
            return pa.parquet.ParquetFile(self.file.arrow(), page_checksum_verification=self.verify)
        except (pa.ArrowInvalid, OSError) as error:
            raise FormatError(self.name, "a readable Parquet file", str(error)) from error

    def _find_pages(self, tail: bytes, tail_start: int) -> list[Page] | None:
        if (span := index_range(self.footer)) is None:
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
        number, at = bisect_right(self.starts, start) - 1, start
        while at < stop:
            page = self.pages[number]
            upto = min(stop, page.first_row + page.n_rows)
            view = raw_view(out[at - start : upto - start])
            head_size = page.size - page.n_rows * self.row_bytes
            whole = upto - at == page.n_rows
            if whole and (number not in self._checked or self.remote):
                head = bytearray(head_size)
                self.file.read_into(page.offset, [memoryview(head), view])
                check_page(self.name, page, memoryview(head), self.d, view if self.verify else None)
                self._checked.add(number)
            else:
                if number not in self._checked:
                    self._check_apart(number, page, head_size)
                self.file.read_into(page.offset + head_size + (at - page.first_row) * self.row_bytes, [view])
            at, number = upto, number + 1

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
            pa = arrow()
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

    def _read_through_arrow(self, start: int, stop: int, out: Tensor) -> None:
        at = 0
        for number, first, last in spans(self.group_starts, start, stop):
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
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for number, first, last in spans(self.group_starts, start, stop):
            table = self._group(number, tuple(sorted(names)))
            for name in names:
                parts[name].append(table[name].slice(first, last - first).to_numpy())
        return {name: np.concatenate(found) if found else np.empty(0) for name, found in parts.items()}

    def check(self) -> int:
        """Compare every page of vectors and labels with its header and checksum, and say how many there are."""
        fresh = ParquetSource(self.file, vector=self.vector)
        fresh.verify = True
        out = torch.empty(max((n for _, n in self.blocks), default=0), self.d, dtype=self.dtype)
        for first, rows in self.blocks:
            fresh.read(first, first + rows, out[:rows])
        for first, last in itertools.pairwise(self.group_starts):
            fresh.labels(self.label_names, first, last)
        return len(self.blocks)
