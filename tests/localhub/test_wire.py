"""Large bodies go around the HTTP parser: whole, broken off, refused, in unusual forms; and back by the kernel."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import os
import socket
import time

import pytest

from hubsae.localhub.app import App

CONTENT = os.urandom(3_500_001)


def upload_path(raw) -> tuple[str, str]:
    """The sha256 of the content and where to put it."""
    oid = hashlib.sha256(CONTENT).hexdigest()
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(CONTENT)}]}
    line = raw("POST", "/local/x.git/info/lfs/objects/batch", body).json["objects"][0]
    return oid, "/" + line["actions"]["upload"]["href"].split("/", 3)[3]


def stored(hub, oid: str):
    return list(hub.root.rglob(oid))


def answer_of(line: socket.socket) -> bytes:
    """All that comes until the hub closes the connection."""
    line.settimeout(20)
    text = b""
    while piece := line.recv(65536):
        text += piece
    return text


def until(happened) -> bool:
    for _ in range(200):
        if happened():
            return True
        time.sleep(0.05)
    return False


def put_head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"PUT {path} HTTP/1.1", "Host: hub", *headers, "", ""]).encode()


@pytest.mark.parametrize("pieces", [1, 2, 7, 40])
def test_a_large_body_arrives_whole_however_it_is_cut(hub, raw, pieces):
    raw.create()
    oid, path = upload_path(raw)
    step = -(-len(CONTENT) // pieces)
    with socket.create_connection(("127.0.0.1", hub.port)) as line:
        line.sendall(put_head(path, f"Content-Length: {len(CONTENT)}"))
        for at in range(0, len(CONTENT), step):
            line.sendall(CONTENT[at : at + step])
            time.sleep(0.01)
        got = answer_of(line)
    assert got.startswith(b"HTTP/1.1 200") and b"connection: close" in got.lower()
    assert stored(hub, oid)[0].read_bytes() == CONTENT


def test_a_client_may_wait_for_100_continue(hub, raw):
    raw.create()
    oid, path = upload_path(raw)
    with socket.create_connection(("127.0.0.1", hub.port)) as line:
        line.sendall(put_head(path, f"Content-Length: {len(CONTENT)}", "Expect: 100-continue"))
        line.settimeout(20)
        assert line.recv(100).startswith(b"HTTP/1.1 100")
        line.sendall(CONTENT)
        assert answer_of(line).startswith(b"HTTP/1.1 200")
    assert stored(hub, oid)[0].read_bytes() == CONTENT


def test_a_large_body_without_a_length_is_taken_too(hub, raw):
    raw.create()
    oid, path = upload_path(raw)
    chunks = [CONTENT[at : at + 700_000] for at in range(0, len(CONTENT), 700_000)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", hub.port)) as line:
        line.sendall(put_head(path, "Transfer-Encoding: chunked", "Connection: close") + body)
        assert answer_of(line).startswith(b"HTTP/1.1 200")
    assert stored(hub, oid)[0].read_bytes() == CONTENT


def test_a_large_body_with_the_wrong_content_is_refused_in_words(hub, raw):
    raw.create()
    oid, path = upload_path(raw)
    got = raw("PUT", path, CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), token=False)
    assert got.status == 400 and "sha256" in got.json["error"]
    assert raw("PUT", path, CONTENT + b"x", token=False).status == 413
    assert not stored(hub, oid) and not list((hub.root / "tmp").iterdir())


@pytest.mark.parametrize("sent", [0, 1000, 1_500_000, len(CONTENT) - 1])
def test_a_client_that_goes_away_leaves_nothing(hub, raw, sent):
    raw.create()
    oid, path = upload_path(raw)
    with socket.create_connection(("127.0.0.1", hub.port)) as line:
        line.sendall(put_head(path, f"Content-Length: {len(CONTENT)}") + CONTENT[:sent])
        time.sleep(0.1)
    assert until(lambda: not list((hub.root / "tmp").iterdir()))
    assert not stored(hub, oid)
    assert raw("PUT", path, CONTENT, token=False).status == 200


@pytest.mark.parametrize("span", [(0, None), (1, None), (1_048_575, 1_048_576), (2_000_000, 3_500_000)])
def test_ranges_of_a_large_file(raw, span):
    raw.create()
    raw.commit_lfs("w.bin", CONTENT)
    first, last = span
    got = raw("GET", "/local/x/resolve/main/w.bin", headers={"Range": f"bytes={first}-{'' if last is None else last}"})
    assert got.status == 206 and got.body == CONTENT[first : None if last is None else last + 1]


def test_many_requests_on_one_connection_around_a_large_answer(hub, raw):
    raw.create()
    raw.commit_lfs("w.bin", CONTENT)
    line = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=20)
    for _ in range(3):
        line.request("GET", "/local/x/resolve/main/w.bin")
        assert line.getresponse().read() == CONTENT
        line.request("HEAD", "/local/x/resolve/main/w.bin")
        head = line.getresponse()
        assert head.headers["content-length"] == str(len(CONTENT)) and head.read() == b""
    line.close()


def test_a_reader_that_goes_away_does_no_harm(hub, raw, caplog):
    raw.create()
    raw.commit_lfs("w.bin", CONTENT * 4)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", hub.port)) as line:
            line.sendall(b"GET /local/x/resolve/main/w.bin HTTP/1.1\r\nHost: hub\r\n\r\n")
            assert len(line.recv(1000)) > 0
    assert raw("GET", "/local/x/resolve/main/w.bin").body == CONTENT * 4
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_another_server_than_uvicorn_gets_the_same(hub, raw):
    """Through nothing but ASGI: the body in many messages, the file back in many messages."""
    raw.create()
    oid, path = upload_path(raw)
    app = App(hub.hub)

    async def ask(method: str, path: str, body: bytes = b"", *headers: tuple[bytes, bytes]) -> tuple[int, bytes]:
        pieces = [body[at : at + 300_000] for at in range(0, len(body), 300_000)] or [b""]
        sent: list[dict] = []

        async def receive():
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"hub"), (b"content-length", str(len(body)).encode()), *headers],
            "scheme": "http",
        }
        await app(scope, receive, send)
        return sent[0]["status"], b"".join(m["body"] for m in sent[1:])

    status, _ = asyncio.run(ask("PUT", path, CONTENT))
    assert status == 200 and stored(hub, oid)[0].read_bytes() == CONTENT
    raw.commit_lfs("w.bin", CONTENT)
    whose = (b"authorization", f"Bearer {hub.token}".encode())
    status, body = asyncio.run(ask("GET", "/local/x/resolve/main/w.bin", b"", whose, (b"range", b"bytes=1-2000000")))
    assert status == 206 and hashlib.sha256(body).digest() == hashlib.sha256(CONTENT[1:2_000_001]).digest()
