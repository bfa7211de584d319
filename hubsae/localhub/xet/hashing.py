"""Xet hashes: chunks, the tree over chunk hashes that names xorbs and files, and the proof of knowing a range.

All are keyed BLAKE3. Checked against the real hf_xet in tests/localhub: every xorb and file it sends hashes to the
name it sent it under.
"""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

DATA_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
RANGE_KEY = bytes.fromhex("7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3")
FILE_KEY = bytes(32)

_FANOUT = 4  # mean number of children; a node has 2 to 9, cut after a hash divisible by 4


def chunk_hash(data: bytes) -> bytes:
    """Hash of one chunk."""
    return blake3(data, key=DATA_KEY).digest()


def to_hex(raw: bytes) -> str:
    """Xet's text form of a hash: four 64-bit words, each written little-endian.

    >>> to_hex(bytes(range(32)))[:16]
    '0706050403020100'
    """
    return "".join(raw[i : i + 8][::-1].hex() for i in range(0, 32, 8))


def from_hex(text: str) -> bytes:
    """The inverse of `to_hex`.

    >>> from_hex(to_hex(bytes(range(32)))) == bytes(range(32))
    True
    """
    return b"".join(bytes.fromhex(text[i : i + 16])[::-1] for i in range(0, 64, 16))


def _cut(nodes: Sequence[tuple[bytes, int]], start: int) -> int:
    left = len(nodes) - start
    if left <= 2:
        return len(nodes)
    end = min(2 * _FANOUT + 1, left)
    for i in range(2, end):
        if int.from_bytes(nodes[start + i][0][24:], "little") % _FANOUT == 0:
            return start + i + 1
    return start + end


def tree_hash(chunks: Sequence[tuple[bytes, int]]) -> bytes:
    """Root over (hash, length) leaves; this names a xorb."""
    if not chunks:
        return bytes(32)
    nodes = list(chunks)
    while len(nodes) > 1:
        above: list[tuple[bytes, int]] = []
        at = 0
        while at < len(nodes):
            end = _cut(nodes, at)
            text = "".join(f"{to_hex(h)} : {size}\n" for h, size in nodes[at:end])
            above.append((blake3(text.encode(), key=NODE_KEY).digest(), sum(size for _, size in nodes[at:end])))
            at = end
        nodes = above
    return nodes[0][0]


def file_hash(chunks: Sequence[tuple[bytes, int]]) -> bytes:
    """Name of a file made of these chunks."""
    return blake3(tree_hash(chunks), key=FILE_KEY).digest() if chunks else bytes(32)


def range_hash(hashes: Sequence[bytes]) -> bytes:
    """Proof that the sender knows the chunks of a range (it cannot be made from the xorb's name alone)."""
    return blake3(b"".join(hashes), key=RANGE_KEY).digest()
