"""Where the vectors of a Parquet file lie on disk: the footer and page index, read without a Parquet library.

A generic reader decodes a fixed-size list value by value (1 to 5 % of raw file bandwidth). In a page that is
PLAIN, uncompressed and without nulls the values are simply the last `rows * d * itemsize` bytes of the page, and the
offset index says where each page begins and how long it is. So this file parses just enough of the
Thrift compact protocol to find those byte ranges; everything else about Parquet is left to pyarrow.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

from hubsae.core.errors import FormatError

MAGIC = b"PAR1"
PLAIN, RLE, UNCOMPRESSED, DATA_PAGE_V2 = 0, 3, 0, 3


class _Thrift:
    """A reader of Thrift compact protocol: structs become `{field id: value}`, lists become lists."""

    def __init__(self, data: bytes | memoryview, position: int = 0):
        self.data, self.position = data, position

    def varint(self) -> int:
        result = shift = 0
        while True:
            byte = self.data[self.position]
            self.position += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7
            if shift > 70:
                raise ValueError("a number that does not end")

    def integer(self) -> int:
        raw = self.varint()
        return (raw >> 1) ^ -(raw & 1)

    def value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            self.position += 1
            return self.data[self.position - 1]
        if kind in (4, 5, 6):
            return self.integer()
        if kind == 7:
            self.position += 8
            return struct.unpack_from("<d", self.data, self.position - 8)[0]
        if kind == 8:
            length = self.varint()
            start = self.position
            self.position += length
            if self.position > len(self.data):
                raise ValueError("a string longer than the data")
            return bytes(self.data[start : self.position])
        if kind in (9, 10):
            head = self.data[self.position]
            self.position += 1
            count, element = head >> 4, head & 15
            if count == 15:
                count = self.varint()
            if count > len(self.data):
                raise ValueError("a list longer than the data")
            if element in (1, 2):  # booleans in a list take a byte each
                self.position += count
                return [b == 1 for b in self.data[self.position - count : self.position]]
            return [self.value(element, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"an unknown type {kind}")

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > 32:
            raise ValueError("too deep a nesting")
        fields: dict[int, Any] = {}
        number = 0
        while True:
            head = self.data[self.position]
            self.position += 1
            if head == 0:
                return fields
            number = number + (head >> 4) if head >> 4 else self.integer()
            fields[number] = self.value(head & 15, depth)


@dataclass(frozen=True)
class Page:
    """One data page of the vector column."""

    first_row: int
    """row in the file"""
    n_rows: int
    offset: int
    """where the page header begins in the file"""
    size: int
    """bytes of header, levels and values together"""


@dataclass(frozen=True)
class Footer:
    """What the end of a Parquet file says, as far as we need it."""

    n_rows: int
    row_groups: tuple[int, ...]
    """rows of each row group"""
    columns: tuple[str, ...]
    """leaf columns by dotted path"""
    metadata: dict[str, str]
    """the file's key-value metadata"""
    chunks: tuple[dict[int, Any], ...]
    """the vector column's chunk of each row group, as parsed"""


def footer_length(path: str, tail: bytes, file_size: int) -> int:
    """Bytes of the whole footer with its 8-byte end, or an error that says what is wrong with the file."""
    if file_size < 12 or len(tail) < 8:
        raise FormatError(path, "a Parquet file", f"{file_size} bytes, too few for one", _TRUNCATED)
    if tail[-4:] != MAGIC:
        raise FormatError(path, "a Parquet file that ends in PAR1", "another ending", _TRUNCATED)
    length = struct.unpack("<I", tail[-8:-4])[0] + 8
    if length > file_size - 4:
        raise FormatError(path, "a footer inside the file", f"a footer of {length} bytes in {file_size}", _TRUNCATED)
    return length


_TRUNCATED = "the file is truncated or damaged: download or harvest it again (a resumed harvest redoes what is missing)"


def parse_footer(path: str, footer: bytes, vector: str) -> Footer:
    """Parse the footer bytes (with the 8-byte end); `vector` is the name of the vector column."""
    try:
        fields = _Thrift(footer).struct()
        pairs = {p[1].decode(): p.get(2, b"").decode() for p in fields.get(5, [])}
        chunks, leaves = [], ()
        for group in fields[4]:
            paths = [".".join(part.decode() for part in c[3][3]) for c in group[1]]
            leaves = tuple(paths)
            mine = [c for c, name in zip(group[1], paths, strict=True) if name.split(".")[0] == vector]
            chunks.append(mine[0] if len(mine) == 1 else {})
        rows = tuple(int(g[3]) for g in fields[4])
        if sum(rows) != fields[3]:
            raise ValueError("row groups that do not add up")
    except (KeyError, IndexError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise FormatError(path, "a readable Parquet footer", f"a damaged one ({error})", _TRUNCATED) from error
    return Footer(int(fields[3]), rows, leaves, pairs, tuple(chunks))


def index_range(footer: Footer) -> tuple[int, int] | None:
    """The byte range of the file that holds every offset index of the vector column, if it has them."""
    starts = [(c.get(4), c.get(5)) for c in footer.chunks]
    if not starts or any(offset is None or length is None for offset, length in starts):
        return None
    return min(int(o or 0) for o, _ in starts), max(int(o or 0) + int(n or 0) for o, n in starts)


def pages_of(
    path: str, footer: Footer, index: memoryview | bytes, index_start: int, row_bytes: int, file_size: int
) -> list[Page] | None:
    """The pages of the vector column, or None where the file is not laid out for direct reading."""
    pages: list[Page] = []
    first = 0
    for chunk, group_rows in zip(footer.chunks, footer.row_groups, strict=True):
        meta = chunk.get(3, {})
        plain = set(meta.get(2, [])) <= {PLAIN, RLE}
        if meta.get(4) != UNCOMPRESSED or not plain or 11 in meta:
            return None
        try:
            found = _Thrift(index, chunk[4] - index_start).struct()[1]
            starts = [p[3] for p in found] + [group_rows]
            for place, start, stop in zip(found, starts[:-1], starts[1:], strict=True):
                page = Page(first + start, stop - start, place[1], place[2])
                if stop < start or page.offset < 4 or page.offset + page.size > file_size:
                    raise ValueError("a page outside the file")
                if page.size < page.n_rows * row_bytes:
                    return None  # fewer bytes than dense values take: nulls, or another encoding
                if page.n_rows:
                    pages.append(page)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise FormatError(path, "a readable page index", f"a damaged one ({error})", _TRUNCATED) from error
        first += group_rows
    return pages


def check_page(path: str, page: Page, head: memoryview | bytes, d: int, values: memoryview | None = None) -> None:
    """Refuse a page whose header contradicts the direct reading; with `values`, verify its checksum too.

    `head` holds the header and the levels, i.e. everything before the values.
    """
    try:
        reader = _Thrift(head)
        fields = reader.struct()
        body, detail = len(head) - reader.position, fields[8]
        good = fields[1] == DATA_PAGE_V2 and detail[2] == 0 and detail[3] == page.n_rows and detail[4] == PLAIN
        good = good and body == detail[5] + detail[6] and detail[1] == page.n_rows * d
        good = good and fields[3] == page.size - reader.position
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise FormatError(path, f"a page header at byte {page.offset}", f"damage ({error})", _TRUNCATED) from error
    if not good:
        raise FormatError(
            path,
            f"{page.n_rows} plain vectors of {d} in the page at byte {page.offset}",
            "a header that says otherwise",
            _TRUNCATED,
        )
    if values is not None and 4 in fields:
        found = zlib.crc32(values, zlib.crc32(head[reader.position :]))
        last = page.first_row + page.n_rows - 1
        if found != fields[4] & 0xFFFFFFFF:
            raise FormatError(
                path,
                f"checksum {fields[4] & 0xFFFFFFFF:08x} for rows {page.first_row} to {last}",
                f"{found:08x}: bytes of this page changed since it was written",
                _TRUNCATED,
            )
