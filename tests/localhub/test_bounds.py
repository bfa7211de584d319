"""What a stranger can cost the hub: memory for bodies, open connections, time for YAML. All of it is bounded."""

from __future__ import annotations

import http.client
import json
import select
import socket

import pytest

MB = 1024 * 1024


def send(raw, *pieces: bytes) -> socket.socket:
    line = socket.create_connection(("127.0.0.1", raw.hub.port), timeout=20)
    for piece in pieces:
        line.sendall(piece)
    return line


def post(path: str, length: int, token: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: hub\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
    return (head + (f"Authorization: Bearer {token}\r\n" if token else "") + "\r\n").encode()


def test_a_caller_without_a_token_cannot_send_what_one_with_a_token_can(raw):
    raw.create()
    body = json.dumps({"paths": ["a" * 3 * MB]}).encode()
    kind = {"Content-Type": "application/json"}
    assert raw("POST", "/api/models/local/x/paths-info/main", body, headers=kind, token=False).status == 413
    assert raw("POST", "/api/models/local/x/paths-info/main", body, headers=kind).status == 200


def test_strangers_share_one_bound_on_memory(local_hub_factory, raw_for):
    raw = raw_for(local_hub_factory(max_anonymous_memory=MB))
    card = json.dumps({"content": "x" * 600_000, "repoType": "model"}).encode()
    half = post("/api/validate-yaml", len(card)) + card[:-1]
    lines = [send(raw, half), send(raw, half)]  # never finished: a body stays in memory
    (refused,) = select.select(lines, [], [], 20)[0]  # which of them was read later is not ours to say
    assert refused.recv(65536).startswith(b"HTTP/1.1 503"), "the second does not fit beside the first"
    (kept,) = (line for line in lines if line is not refused)
    kept.sendall(card[-1:])
    assert kept.recv(65536).startswith(b"HTTP/1.1 200")
    kept.close()
    refused.close()
    third = send(raw, post("/api/validate-yaml", len(card)) + card)
    assert third.recv(65536).startswith(b"HTTP/1.1 200"), "what was held is free again"
    third.close()


def test_a_body_that_does_not_come_is_not_waited_for(local_hub_factory, raw_for):
    raw = raw_for(local_hub_factory(body_seconds=0.3))
    for token in ("", raw.token):
        with send(raw, post("/api/validate-yaml", 100, token) + b'{"content": ') as line:
            assert line.recv(65536).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: hub\r\nX-Slow: "])
def test_a_connection_that_sends_no_request_is_closed(local_hub_factory, raw_for, begun):
    raw = raw_for(local_hub_factory(head_seconds=0.3))
    with send(raw, begun) as line:
        assert closed(line)
    whole = b"GET /_local/health HTTP/1.1\r\nHost: hub\r\n\r\n"
    with send(raw, whole) as line:
        for _ in range(3):  # a connection that is used stays open
            assert status(line) == 200
            line.sendall(whole)
        assert status(line) == 200
        if begun:  # between requests only the next one's head is timed
            line.sendall(begun)
            assert closed(line)


def status(line: socket.socket) -> int:
    """The next answer on a connection, read to its end."""
    answer = http.client.HTTPResponse(line)
    answer.begin()
    answer.read()
    return answer.status


def test_a_request_head_without_end_is_cut_off(raw):
    with send(raw, b"GET / HTTP/1.1\r\nHost: hub\r\n") as line:
        try:
            for number in range(4000):
                line.sendall(f"X-{number}: {'x' * 1000}\r\n".encode())
        except ConnectionError:
            return
        assert closed(line)


def closed(line: socket.socket) -> bool:
    try:
        return line.recv(65536) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "front",
    [
        "\n".join(f"key{number}: [a, b]" for number in range(40_000)),
        "[" * 100_000,
        "- " * 60_000,
        "a: &a [1]\nb: *a",
        "a: " + "x" * 300_000,
    ],
)
def test_front_matter_is_read_within_bounds(raw, front):
    card = {"content": f"---\n{front}\n---\n", "repoType": "model"}
    got = raw("POST", "/api/validate-yaml", card, token=False)
    assert got.status == 400 and got.json["errors"][0]["message"].startswith("YAML metadata is not valid")
