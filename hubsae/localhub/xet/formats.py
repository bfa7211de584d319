"""Xet's two upload formats, read strictly: a xorb (a run of compressed chunks) and a shard (which chunks make a file).

xorb:  chunks `version u8 = 0 | compressed length u24 | scheme u8 | length u24 | data`, little-endian, no footer.
shard: 48-byte header, then 48-byte records. Per file: header (hash, flags, n), n terms (xorb, chunk range), n range
       proofs if bit 31 is set, one sha256 record if bit 30 is set. A record of 0xff ends the list.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO, NamedTuple

import lz4.frame

from ..errors import HubError, bad_request
from .hashing import to_hex

MAX_CHUNK = 1 << 20  # clients cut at 128 KiB; the field allows 16 MiB
_RECORD = 48
_END = b"\xff" * 32
_FOOTER_MARK = b"XETBLOB"


class Chunk(NamedTuple):
    """A chunk on the wire: where its header starts, its packed length with header, scheme and real length."""

    offset: int
    packed: int
    scheme: int
    length: int


class Term(NamedTuple):
    """A run of chunks `[start, end)` of one xorb; `length` is what they unpack to."""

    xorb: str
    start: int
    end: int
    length: int


class FileRecord(NamedTuple):
    """One file of a shard. `proofs` and `sha256` are absent (empty, None) where the sender left them out."""

    hash: str
    terms: list[Term]
    proofs: list[bytes]
    sha256: str | None


def read_chunks(handle: IO[bytes]) -> Iterator[tuple[Chunk, bytes]]:
    """The chunks of a xorb with their packed data."""
    at = 0
    while head := handle.read(8):
        if head[:7] == _FOOTER_MARK:
            return
        if len(head) < 8 or head[0] != 0:
            raise bad_request(f"xorb: no chunk header at byte {at}")
        packed = int.from_bytes(head[1:4], "little")
        length = int.from_bytes(head[5:8], "little")
        if not 0 < length <= MAX_CHUNK:
            raise bad_request(f"xorb: chunk at byte {at} claims {length} bytes")
        data = handle.read(packed)
        if len(data) < packed:
            raise bad_request(f"xorb: chunk at byte {at} is cut off")
        yield Chunk(at, 8 + packed, head[4], length), data
        at += 8 + packed


def unpack(chunk: Chunk, data: bytes) -> bytes:
    """The content of a chunk; never more than it claims, whatever the compressed bytes say."""
    if chunk.scheme == 0:
        out = data
    elif chunk.scheme in (1, 2):
        try:
            reader = lz4.frame.LZ4FrameDecompressor()
            out = reader.decompress(data, max_length=chunk.length + 1)
        except RuntimeError as why:
            raise bad_request(f"xorb: chunk at byte {chunk.offset} is not LZ4 ({why})") from None
        if chunk.scheme == 2:
            out = _ungroup(out)
    else:
        raise bad_request(f"xorb: chunk at byte {chunk.offset} has unknown compression {chunk.scheme}")
    if len(out) != chunk.length:
        raise bad_request(f"xorb: chunk at byte {chunk.offset} unpacks to {len(out)} bytes, not {chunk.length}")
    return bytes(out)


def _ungroup(data: bytes) -> bytes:
    """Undo byte grouping: the i-th bytes of all 4-byte words stand together, i = 0..3."""
    out = bytearray(len(data))
    at = 0
    for i in range(4):
        size = (len(data) + 3 - i) // 4
        out[i::4] = data[at : at + size]
        at += size
    return bytes(out)


def read_shard(body: bytes) -> list[FileRecord]:
    """The files of an uploaded shard."""
    at = 48
    files: list[FileRecord] = []

    def record() -> bytes:
        nonlocal at
        piece = body[at : at + _RECORD]
        if len(piece) < _RECORD:
            raise bad_request("shard: cut off in the file section")
        at += _RECORD
        return piece

    if len(body) < 96 or body[:14] != b"HFRepoMetaData":
        raise bad_request("shard: not a shard")
    while (head := record())[:32] != _END:
        flags, count = struct.unpack_from("<II", head, 32)
        if count * _RECORD > len(body) - at:
            raise bad_request("shard: a file claims more terms than the shard holds")
        terms = []
        for _ in range(count):
            piece = record()
            _, length, start, end = struct.unpack_from("<IIII", piece, 32)
            terms.append(Term(to_hex(piece[:32]), start, end, length))
        proofs = [record()[:32] for _ in range(count)] if flags & (1 << 31) else []
        sha256 = to_hex(record()[:32]) if flags & (1 << 30) else None
        files.append(FileRecord(to_hex(head[:32]), terms, proofs, sha256))
    return files


def missing_xorb(name: str) -> HubError:
    """What a shard is told that names a xorb this hub never got."""
    return bad_request(f"shard: xorb {name} is not stored here; upload it first")
