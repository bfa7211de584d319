"""Write Parquet files of vectors page by page: the bytes any Parquet reader takes, without encoding value by value.

A vector page is a short header, levels that are the same few bytes for every row, and the raw values. Written
here it costs one copy and one checksum; pyarrow spends 7 to 20 us per token on it at d 896 and holds a whole row
group in memory. Label columns are small and wait in memory until their row group ends. The files are plain Parquet
(data page v2, PLAIN, uncompressed, offset index, page checksums), checked against pyarrow, duckdb and polars.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any, BinaryIO

import numpy as np

from hubsae.activations.layout import LABELS, ROW_GROUP_BYTES, VECTOR, ShardHeader, arrow_schema
from hubsae.activations.parquet_pages import MAGIC
from hubsae.core.errors import DataError
from hubsae.version import __version__

BOOLEAN, INT32, INT64, FLOAT, DOUBLE, BYTES, FIXED = 0, 1, 2, 4, 5, 6, 7
_PHYSICAL = {"bool": BOOLEAN, "int32": INT32, "int64": INT64, "float32": FLOAT, "float64": DOUBLE, "string": BYTES}
OPTIONAL, REPEATED = 1, 2

I32, I64, TEXT, LIST, STRUCT, FLAG = 5, 6, 8, 9, 12, "flag"
Field = tuple[int, Any, Any]
"""Field id, Thrift compact type, value. A list is a pair (element type, values); a struct a list of fields."""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _encode(kind: Any, value: Any) -> bytes:
    if kind in (I32, I64):
        return _varint((value << 1) ^ (value >> 63))
    if kind == TEXT:
        data = value.encode() if isinstance(value, str) else value
        return _varint(len(data)) + data
    if kind == LIST:
        element, items = value
        head = bytes([len(items) << 4 | element]) if len(items) < 15 else bytes([0xF0 | element]) + _varint(len(items))
        return head + b"".join(_encode(element, item) for item in items)
    return thrift(value)


def thrift(fields: list[Field]) -> bytes:
    """A struct in Thrift's compact protocol; fields in ascending order."""
    out, last = bytearray(), 0
    for number, kind, value in fields:
        code = (1 if value else 2) if kind == FLAG else kind
        out += bytes([number - last << 4 | code]) if number - last < 16 else bytes([code]) + _varint(number << 1)
        if kind != FLAG:
            out += _encode(kind, value)
        last = number
    return bytes(out) + b"\0"


class VectorFile:
    """One Parquet file of vectors and labels, written in order and finished by `close`."""

    def __init__(self, file: BinaryIO, header: ShardHeader):
        self.file, self.header, self.position = file, header, 0
        self.columns = {**LABELS, **header.columns}
        for name, kind in self.columns.items():
            if kind not in _PHYSICAL:
                raise DataError(f"column {name}: no type {kind!r}", hint=f"choose from {', '.join(_PHYSICAL)}")
        self.itemsize = 2 if header.dtype == "float16" else 4
        d = header.d
        # one row of repetition levels: 0 (a new vector), then d - 1 times 1, as two run-length runs
        self.row_levels = b"\x02\x00" + (_varint(d - 1 << 1) + b"\x01" if d > 1 else b"")
        self.rows = self.group_rows = 0
        self.groups: list[tuple[int, list[Any]]] = []
        self.vector_pages: list[tuple[int, int, int]] = []  # offset, size, first row in the group
        self.labels: dict[str, list[np.ndarray]] = {name: [] for name in self.columns}
        self._write(MAGIC)

    def _write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.position += len(data)

    def page(self, vectors: np.ndarray, labels: dict[str, np.ndarray]) -> None:
        """Append vectors [rows, d] as one page, with their labels; a full row group is closed."""
        rows, d = vectors.shape
        count = rows * d
        definition = _varint(count << 1) + b"\x03"  # every vector and every value is there
        levels = self.row_levels * rows + definition
        values = np.ascontiguousarray(vectors).data.cast("B")
        start = self.position
        self._page(count, rows, len(definition), len(levels) - len(definition), levels, values)
        self.vector_pages.append((start, self.position - start, self.group_rows))
        for name in self.columns:
            self.labels[name].append(labels[name].copy())
        self.group_rows += rows
        if (self.group_rows + rows) * d * self.itemsize > ROW_GROUP_BYTES:  # another such page would not fit
            self._end_group()

    def _page(
        self, count: int, rows: int, definition: int, repetition: int, levels: bytes, values: memoryview | bytes
    ) -> None:
        size = len(levels) + len(values)
        crc = zlib.crc32(values, zlib.crc32(levels))
        v2 = [(1, I32, count), (2, I32, 0), (3, I32, rows), (4, I32, 0), (5, I32, definition)]
        v2 += [(6, I32, repetition), (7, FLAG, False)]
        signed = crc - (1 << 32) if crc >= 1 << 31 else crc
        head = thrift([(1, I32, 3), (2, I32, size), (3, I32, size), (4, I32, signed), (8, STRUCT, v2)])
        self._write(head + levels)
        self._write(values)

    def _end_group(self) -> None:
        if not self.group_rows:
            return
        kind = FIXED if self.itemsize == 2 else FLOAT
        start = self.vector_pages[0][0]
        path = [VECTOR, "list", "element"]
        chunks = [self._chunk(kind, path, self.group_rows * self.header.d, start, self.vector_pages, None)]
        for name, label in self.columns.items():
            column = np.concatenate(self.labels[name])
            start = self.position
            definition = _varint(len(column) << 1) + b"\x01"
            self._page(len(column), len(column), len(definition), 0, definition, _plain(label, column))
            pages = [(start, self.position - start, 0)]
            chunks.append(self._chunk(_PHYSICAL[label], [name], len(column), start, pages, _bounds(label, column)))
        self.groups.append((self.group_rows, chunks))
        self.rows += self.group_rows
        self.group_rows = 0
        self.vector_pages = []
        self.labels = {name: [] for name in self.columns}

    def _chunk(
        self, kind: int, path: list[str], count: int, start: int, pages: list, bounds: tuple[bytes, bytes] | None
    ) -> dict[str, Any]:
        size = self.position - start
        meta: list[Field] = [(1, I32, kind), (2, LIST, (I32, [0, 3])), (3, LIST, (TEXT, path)), (4, I32, 0)]
        meta += [(5, I64, count), (6, I64, size), (7, I64, size), (9, I64, start)]
        if bounds is not None:
            low, high = bounds
            meta.append((12, STRUCT, [(3, I64, 0), (5, TEXT, high), (6, TEXT, low)]))
        places = [[(1, I64, offset), (2, I32, length), (3, I64, first)] for offset, length, first in pages]
        return {"meta": meta, "index": thrift([(1, LIST, (STRUCT, places))]), "size": size}

    def close(self, metadata: dict[str, str]) -> None:
        """Write the last row group, the page index and the footer with `metadata` in it."""
        self._end_group()
        groups = []
        for rows, chunks in self.groups:
            described = []
            for chunk in chunks:
                place = self.position
                self._write(chunk["index"])
                described.append(
                    [(2, I64, 0), (3, STRUCT, chunk["meta"]), (4, I64, place), (5, I32, len(chunk["index"]))]
                )
            total = sum(chunk["size"] for chunk in chunks)
            first = next(value for number, _, value in chunks[0]["meta"] if number == 9)
            groups.append(
                [(1, LIST, (STRUCT, described)), (2, I64, total), (3, I64, rows), (5, I64, first), (6, I64, total)]
            )
        arrow = base64.b64encode(arrow_schema(self.header).serialize().to_pybytes()).decode()
        pairs = {"ARROW:schema": arrow, **metadata}
        footer = thrift(
            [
                (1, I32, 2),
                (2, LIST, (STRUCT, self._schema())),
                (3, I64, self.rows),
                (4, LIST, (STRUCT, groups)),
                (5, LIST, (STRUCT, [[(1, TEXT, k), (2, TEXT, v)] for k, v in pairs.items()])),
                (6, TEXT, f"hubsae version {__version__}"),
                (7, LIST, (STRUCT, [[(1, STRUCT, [])] for _ in range(1 + len(self.columns))])),
            ]
        )
        self._write(footer + struct.pack("<I", len(footer)) + MAGIC)
        self.file.flush()

    def _schema(self) -> list[list[Field]]:
        nodes: list[list[Field]] = [[(4, TEXT, "schema"), (5, I32, 1 + len(self.columns))]]
        list_type = [(6, I32, 3), (10, STRUCT, [(3, STRUCT, [])])]
        nodes.append([(3, I32, OPTIONAL), (4, TEXT, VECTOR), (5, I32, 1), *list_type])
        nodes.append([(3, I32, REPEATED), (4, TEXT, "list"), (5, I32, 1)])
        if self.itemsize == 2:
            half = [(10, STRUCT, [(15, STRUCT, [])])]
            nodes.append([(1, I32, FIXED), (2, I32, 2), (3, I32, OPTIONAL), (4, TEXT, "element"), *half])
        else:
            nodes.append([(1, I32, FLOAT), (3, I32, OPTIONAL), (4, TEXT, "element")])
        for name, kind in self.columns.items():
            text = [(6, I32, 0), (10, STRUCT, [(1, STRUCT, [])])] if kind == "string" else []
            nodes.append([(1, I32, _PHYSICAL[kind]), (3, I32, OPTIONAL), (4, TEXT, name), *text])
        return nodes


def _plain(kind: str, column: np.ndarray) -> bytes:
    """A column in PLAIN encoding."""
    if kind == "bool":
        return np.packbits(column.astype(bool), bitorder="little").tobytes()
    if kind == "string":
        values = column.tolist()  # few differ (roles, stages): each is encoded once
        texts = {value: str(value).encode() for value in set(values)}
        encoded = {value: struct.pack("<I", len(text)) + text for value, text in texts.items()}
        return b"".join(map(encoded.__getitem__, values))
    return np.ascontiguousarray(column.astype(np.dtype(kind).newbyteorder("<"), copy=False)).tobytes()


def _bounds(kind: str, column: np.ndarray) -> tuple[bytes, bytes] | None:
    """Lowest and highest value of an integer column, so that queries can skip row groups."""
    if kind not in ("int32", "int64"):
        return None
    return _plain(kind, column.min(keepdims=True)), _plain(kind, column.max(keepdims=True))
