"""Xet: the store believes nothing that does not hash to its name, and hands out exactly what was signed for.

The uploads here are made by hand from the published format; that the real hf_xet agrees with these hashes is shown in
test_stock_clients, where its uploads would be refused otherwise.
"""

from __future__ import annotations

import hashlib
import os
import struct

import lz4.frame
import pytest

from hubsae.localhub.xet.formats import Chunk, read_chunks, unpack
from hubsae.localhub.xet.hashing import chunk_hash, file_hash, from_hex, range_hash, to_hex, tree_hash


def pack(chunks: list[bytes], scheme: int = 0) -> bytes:
    out = b""
    for data in chunks:
        body = data
        if scheme == 2:
            body = b"".join(data[i::4] for i in range(4))
        if scheme:
            body = lz4.frame.compress(body)
        out += b"\0" + len(body).to_bytes(3, "little") + bytes([scheme]) + len(data).to_bytes(3, "little") + body
    return out


def shard(
    chunks: list[bytes], terms: list[tuple[int, int]], sha256: str | None = None, proof: bytes | None = None
) -> tuple[str, bytes]:
    """A shard for one file made of chunk ranges of the xorb of `chunks`; the file's Xet hash."""
    leaves = [(chunk_hash(c), len(c)) for c in chunks]
    xorb = tree_hash(leaves)
    content = b"".join(c for a, b in terms for c in chunks[a:b])
    name = file_hash([leaf for a, b in terms for leaf in leaves[a:b]])
    body = b"HFRepoMetaData".ljust(32, b"\0") + struct.pack("<QQ", 2, 0)
    body += name + struct.pack("<II8x", 0xC0000000, len(terms))
    for a, b in terms:
        body += xorb + struct.pack("<IIII", 0, sum(map(len, chunks[a:b])), a, b)
    for a, b in terms:
        body += (proof or range_hash([h for h, _ in leaves[a:b]])) + bytes(16)
    body += from_hex(sha256 or hashlib.sha256(content).hexdigest()) + bytes(16)
    body += b"\xff" * 32 + bytes(16) + b"\xff" * 32 + bytes(16)
    return to_hex(name), body


class Xet:
    """The calls hf_xet makes, by hand."""

    def __init__(self, raw, repo="local/x", token=None):
        self.raw = raw
        got = raw("GET", f"/api/models/{repo}/xet-write-token/main", token=token)
        assert got.status == 200
        assert got.headers["x-xet-access-token"] == got.json["accessToken"]
        self.base = "/" + got.json["casUrl"].split("/", 3)[3]
        self.word = got.json["accessToken"]

    def __call__(self, method, path, body=None, **headers):
        return self.raw(
            method, self.base + path, body, token=False, headers={"Authorization": f"Bearer {self.word}", **headers}
        )

    def xorb(self, chunks, scheme=0):
        name = to_hex(tree_hash([(chunk_hash(c), len(c)) for c in chunks]))
        return name, self("POST", f"/v1/xorbs/default/{name}", pack(chunks, scheme))


CHUNKS = [os.urandom(5000), bytes(9001), b"abc" * 3000, os.urandom(7)]


@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_chunks_unpack_to_what_was_packed(tmp_path, scheme):
    path = tmp_path / "xorb"
    path.write_bytes(pack(CHUNKS, scheme))
    with open(path, "rb") as handle:
        assert [unpack(c, d) for c, d in read_chunks(handle)] == CHUNKS


def test_a_compression_bomb_is_cut_at_its_claim():
    bomb = lz4.frame.compress(bytes(50_000_000))
    with pytest.raises(Exception, match="unpacks to"):
        unpack(Chunk(0, len(bomb) + 8, 1, 100), bomb)


def test_upload_and_every_kind_of_reading(raw, hub):
    raw.create()
    xet = Xet(raw)
    name, got = xet.xorb(CHUNKS, 1)
    assert got.json == {"was_inserted": True} and xet.xorb(CHUNKS)[1].json == {"was_inserted": False}
    # a file that takes chunks twice, out of order and overlapping: fetch ranges of one xorb must come merged
    terms = [(1, 3), (0, 2), (1, 3), (3, 4)]
    content = b"".join(c for a, b in terms for c in CHUNKS[a:b])
    file, body = shard(CHUNKS, terms)
    assert xet("POST", "/v1/shards", body).json == {"result": 1}
    assert xet("POST", "/v1/shards", body).json == {"result": 0}
    plan = xet("GET", f"/v1/reconstructions/{file}").json
    assert [t["range"] for t in plan["terms"]] == [{"start": a, "end": b} for a, b in terms]
    assert [p["range"] for p in plan["fetch_info"][name]] == [{"start": 0, "end": 4}]
    oid = hashlib.sha256(content).hexdigest()
    lines = (
        '{"key":"header","value":{"summary":"xet"}}\n'
        f'{{"key":"lfsFile","value":{{"path":"w.bin","algo":"sha256","oid":"{oid}","size":{len(content)}}}}}'
    )
    assert raw("POST", "/api/models/local/x/commit/main", lines.encode()).status == 200
    assert raw("GET", "/local/x/resolve/main/w.bin").body == content
    assert raw("HEAD", "/local/x/resolve/main/w.bin").headers["x-xet-hash"] == file
    for start, end in [(0, 1), (4999, 5002), (9000, 9002), (20_000, 30_000), (len(content) - 3, len(content))]:
        got = raw("GET", "/local/x/resolve/main/w.bin", headers={"Range": f"bytes={start}-{end - 1}"})
        assert got.body == content[start:end]
        part = xet("GET", f"/v1/reconstructions/{file}", Range=f"bytes={start}-{end - 1}").json
        parts = b"".join(c for t in part["terms"] for c in CHUNKS[t["range"]["start"] : t["range"]["end"]])
        skip = part["offset_into_first_range"]
        assert parts[skip : skip + end - start] == content[start:end]
    assert xet("GET", f"/v1/reconstructions/{file}", Range=f"bytes={len(content)}-").status == 416
    hub.hub.xet = False
    assert raw("GET", "/local/x/resolve/main/w.bin").body == content, "without Xet the file is rebuilt"
    assert "x-xet-hash" not in raw("HEAD", "/local/x/resolve/main/w.bin").headers


def test_a_signed_range_serves_only_itself(raw):
    raw.create()
    xet = Xet(raw)
    name, _ = xet.xorb(CHUNKS)
    file, body = shard(CHUNKS, [(1, 2)])
    xet("POST", "/v1/shards", body)
    piece = xet("GET", f"/v1/reconstructions/{file}").json["fetch_info"][name][0]
    url = "/" + piece["url"].split("/", 3)[3]
    first, last = piece["url_range"]["start"], piece["url_range"]["end"]
    assert raw("GET", url, token=False, headers={"Range": f"bytes={first}-{last}"}).body == pack(CHUNKS[1:2])
    for wrong in (f"bytes={first - 1}-{last}", f"bytes={first}-{last + 1}", "bytes=0-10", "bytes=-10"):
        assert raw("GET", url, token=False, headers={"Range": wrong}).status == 403
    assert raw("GET", url, token=False).status == 403


def test_wrong_content_is_refused(raw, hub):
    raw.create()
    xet = Xet(raw)
    good = to_hex(tree_hash([(chunk_hash(c), len(c)) for c in CHUNKS]))
    for body in (pack(CHUNKS[:3]), pack(CHUNKS) + b"x", pack(CHUNKS)[:-1], b"", b"\0" * 100, os.urandom(1000)):
        assert xet("POST", f"/v1/xorbs/default/{good}", body).status == 400
    assert xet("POST", "/v1/xorbs/default/..%2F..%2Fx", pack(CHUNKS)).status == 400
    assert not list((hub.root / "xet").rglob("*.*")) and not list((hub.root / "tmp").iterdir())
    xet.xorb(CHUNKS)
    for body in (
        shard(CHUNKS, [(0, 2)], sha256="ab" * 32)[1],
        shard(CHUNKS, [(0, 2)], proof=bytes(32))[1],
        shard([b"never uploaded"], [(0, 1)])[1],
        shard(CHUNKS, [(0, 2)])[1][:150],
        b"HFRepoMetaData" + b"\xff" * 20,
    ):
        assert xet("POST", "/v1/shards", body).status == 400


def test_tokens_are_for_one_repo_and_one_use(raw):
    raw.create(private=True)
    raw("POST", "/api/repos/create", {"name": "y"}, token="hf_eve")
    mine, eves = Xet(raw), Xet(raw, "eve/y", "hf_eve")
    mine.xorb(CHUNKS)
    file, body = shard(CHUNKS, [(0, 4)])
    mine("POST", "/v1/shards", body)
    assert mine("GET", f"/v1/reconstructions/{file}").status == 200
    assert eves("GET", f"/v1/reconstructions/{file}").status == 404, "knowing a file's name is not reading it"
    # who has only learned names cannot prove to know the content
    assert eves("POST", "/v1/shards", shard(CHUNKS, [(0, 4)], proof=os.urandom(32))[1]).status == 400
    eves.word = raw("GET", "/api/models/eve/y/xet-read-token/main", token="hf_eve").json["accessToken"]
    assert eves("POST", f"/v1/xorbs/default/{'ab' * 32}", b"").status == 403
    eves.word = "forged.word"
    assert eves("GET", f"/v1/reconstructions/{file}").status == 401


def test_a_hub_without_xet_says_so(local_hub_factory, raw_for):
    raw = raw_for(local_hub_factory(xet=False))
    raw.create()
    got = raw("GET", "/api/models/local/x/xet-write-token/main")
    assert got.status == 404 and "HF_HUB_DISABLE_XET" in got.json["error"]


def test_a_wiped_folder_has_another_cas_url(local_hub_factory, raw_for, tmp_path):
    urls = set()
    for name in ("one", "two"):
        raw = raw_for(local_hub_factory(root=tmp_path / name))
        raw.create()
        urls.add(raw("GET", "/api/models/local/x/xet-write-token/main").json["casUrl"].rsplit("/", 1)[1])
    assert len(urls) == 2
