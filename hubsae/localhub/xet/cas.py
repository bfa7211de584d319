"""The content-addressed store behind Xet: xorbs by hash, files as lists of terms, rebuilt on demand.

On disk: `xet/xorbs/ab/<hash>` (body as uploaded) with `<hash>.idx` (per chunk: hash, offset, lengths), and
`xet/files/ab/<hash>` (JSON: sha256, size, terms). Nothing is stored before it hashed to its name, so whatever is
there can be trusted without looking again. A body is renamed into place after its index: a xorb that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import HubError, bad_request
from ..files import Disk, read_json
from .formats import Chunk, FileRecord, Term, missing_xorb, read_chunks, unpack
from .hashing import chunk_hash, file_hash, from_hex, range_hash, to_hex, tree_hash

_INDEX = struct.Struct("<32sIIBxxxI")  # hash, offset, packed, scheme, length


class XorbIndex(NamedTuple):
    """Chunk table of one xorb."""

    hashes: list[bytes]
    chunks: list[Chunk]


class XetFile(NamedTuple):
    """A file known to the store."""

    hash: str
    sha256: str
    size: int
    terms: list[Term]


class Piece(NamedTuple):
    """What a reader must fetch of one xorb: chunk range and the bytes (inclusive) that hold it."""

    xorb: str
    start: int
    end: int
    first_byte: int
    last_byte: int


class CasStore:
    """Stores and serves Xet content. Safe to call from many threads."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder = folder
        self.disk = disk
        self._indexes: OrderedDict[str, XorbIndex] = OrderedDict()
        self._lock = threading.Lock()

    def xorb_path(self, name: str) -> Path:
        return self.folder / "xorbs" / name[:2] / name

    def _file_path(self, name: str) -> Path:
        return self.folder / "files" / name[:2] / name

    # -- writing ------------------------------------------------------------------------------------------

    def add_xorb(self, name: str, temp: Path) -> bool:
        """Check an uploaded body against its name and keep it. False if it was there already."""
        target = self.xorb_path(name)
        if target.exists():
            return False
        hashes: list[bytes] = []
        chunks: list[Chunk] = []
        with open(temp, "rb") as handle:
            for chunk, data in read_chunks(handle):
                hashes.append(chunk_hash(unpack(chunk, data)))
                chunks.append(chunk)
        root = tree_hash([(h, c.length) for h, c in zip(hashes, chunks, strict=True)])
        if not chunks or to_hex(root) != name:
            raise bad_request(f"xorb: content hashes to {to_hex(root)}, not to its name {name}")
        table = b"".join(
            _INDEX.pack(h, c.offset, c.packed, c.scheme, c.length) for h, c in zip(hashes, chunks, strict=True)
        )
        self.disk.write(target.with_suffix(".idx"), table)
        with open(temp, "r+b") as handle:
            self.disk.publish(temp, target, handle)
        return True

    def add_file(self, record: FileRecord) -> XetFile:
        """Check one file of a shard (ranges, proofs, its name, its sha256) and keep it."""
        known = self.file(record.hash)
        leaves: list[tuple[bytes, int]] = []
        if record.proofs and len(record.proofs) != len(record.terms):
            raise bad_request("shard: not one range proof per term")
        for at, term in enumerate(record.terms):
            index = self.index(term.xorb)
            if index is None:
                raise missing_xorb(term.xorb)
            if not 0 <= term.start < term.end <= len(index.chunks):
                raise bad_request(f"shard: xorb {term.xorb} has no chunks {term.start} to {term.end}")
            hashes = index.hashes[term.start : term.end]
            lengths = [c.length for c in index.chunks[term.start : term.end]]
            if sum(lengths) != term.length:
                raise bad_request(f"shard: a term claims {term.length} bytes and has {sum(lengths)}")
            # the proof keeps someone who merely learned a xorb's name from laying claim to its content
            if not record.proofs or record.proofs[at] != range_hash(hashes):
                raise bad_request(f"shard: the range proof for xorb {term.xorb} does not hold")
            leaves += zip(hashes, lengths, strict=True)
        if to_hex(file_hash(leaves)) != record.hash:
            raise bad_request(f"shard: the terms of file {record.hash} hash to another name")
        if known is None:
            digest = hashlib.sha256()
            size = 0
            for data in self._unpacked(record.terms):
                digest.update(data)
                size += len(data)
            known = XetFile(record.hash, digest.hexdigest(), size, record.terms)
        if record.sha256 is not None and record.sha256 != known.sha256:
            raise bad_request(
                f"shard: the content of file {record.hash} has sha256 {known.sha256}, not {record.sha256}"
            )
        if not self._file_path(known.hash).exists():
            value = {"sha256": known.sha256, "size": known.size, "terms": [list(t) for t in known.terms]}
            self.disk.write(self._file_path(known.hash), json.dumps(value).encode())
        return known

    # -- reading ------------------------------------------------------------------------------------------

    def index(self, name: str) -> XorbIndex | None:
        """The chunk table of a xorb, or None where it is not stored."""
        with self._lock:
            if (known := self._indexes.get(name)) is not None:
                self._indexes.move_to_end(name)
                return known
        path = self.xorb_path(name)
        if not path.exists():
            return None
        hashes, chunks = [], []
        for raw, offset, packed, scheme, length in _INDEX.iter_unpack(path.with_suffix(".idx").read_bytes()):
            hashes.append(raw)
            chunks.append(Chunk(offset, packed, scheme, length))
        index = XorbIndex(hashes, chunks)
        with self._lock:
            self._indexes[name] = index
            while len(self._indexes) > 64:  # about 200 kB each
                self._indexes.popitem(last=False)
        return index

    def file(self, name: str) -> XetFile | None:
        """A file by its Xet hash."""
        value = read_json(self._file_path(name))
        if value is None:
            return None
        return XetFile(name, value["sha256"], value["size"], [Term(*t) for t in value["terms"]])

    def _index_of(self, term: Term) -> XorbIndex:
        index = self.index(term.xorb)
        if index is None:
            raise HubError(500, f"Xet storage lost xorb {term.xorb}")
        return index

    def _unpacked(self, terms: list[Term]) -> Iterator[bytes]:
        for term in terms:
            chunks = self._index_of(term).chunks[term.start : term.end]
            with open(self.xorb_path(term.xorb), "rb") as handle:
                handle.seek(chunks[0].offset)
                for chunk in chunks:
                    yield unpack(chunk, handle.read(chunk.packed)[8:])

    def read(self, file: XetFile, start: int, end: int) -> Iterator[bytes]:
        """The bytes `[start, end)` of a file."""
        if start >= end:
            return
        terms, skip, _ = self.plan(file, start, end)
        left = end - start
        for data in self._unpacked(terms):
            piece = data[skip : skip + left]
            skip = max(0, skip - len(data))
            left -= len(piece)
            if piece:
                yield piece
            if left == 0:
                return

    def plan(self, file: XetFile, start: int, end: int) -> tuple[list[Term], int, list[Piece]]:
        """How to get bytes `[start, end)`: terms cut to whole chunks, bytes to skip in the first, pieces to fetch.

        Pieces of one xorb that overlap or touch are merged: hf_xet panics on overlapping ranges.
        """
        terms: list[Term] = []
        skip: int | None = None
        at = 0
        for term in file.terms:
            if at + term.length <= start or at >= end:
                at += term.length
                continue
            first = last = None
            length = 0
            here = at
            for number in range(term.start, term.end):
                size = self._index_of(term).chunks[number].length
                if here + size > start and here < end:
                    if first is None:
                        first = number
                        if skip is None:
                            skip = start - here
                    last = number + 1
                    length += size
                here += size
            at = here
            if first is not None and last is not None:
                terms.append(Term(term.xorb, first, last, length))
        return terms, max(skip or 0, 0), self._pieces(terms)

    def _pieces(self, terms: list[Term]) -> list[Piece]:
        ranges: dict[str, list[list[int]]] = {}
        for term in sorted(terms, key=lambda t: (t.xorb, t.start)):
            spans = ranges.setdefault(term.xorb, [])
            if spans and term.start <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], term.end)
            else:
                spans.append([term.start, term.end])
        pieces = []
        for xorb, spans in ranges.items():
            index = self.index(xorb)
            assert index is not None
            for start, end in spans:
                last = index.chunks[end - 1]
                pieces.append(Piece(xorb, start, end, index.chunks[start].offset, last.offset + last.packed - 1))
        return pieces


def is_xet_hash(text: str) -> bool:
    """Whether a word can be a Xet hash (also keeps names inside the store's folders).

    >>> is_xet_hash("ab" * 32), is_xet_hash("../x")
    (True, False)
    """
    try:
        return len(text) == 64 and text == text.lower() and len(from_hex(text)) == 32 and text.isalnum()
    except ValueError:
        return False
