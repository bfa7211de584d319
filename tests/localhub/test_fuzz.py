"""Malformed requests: never a 500, never a file outside the folder, never a byte of a private repo."""

from __future__ import annotations

import http.client
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubsae.localhub.cards import card_data, check_card
from hubsae.localhub.commitops import CommitPlan
from hubsae.localhub.errors import HubError
from hubsae.localhub.lfs import AttributeRules
from hubsae.localhub.routes.pages import render_markdown
from hubsae.localhub.xet.formats import read_chunks, read_shard, unpack

SECRET = b"the-private-content-nobody-may-see"

PIECES = [
    "..",
    "%2e%2e",
    "..%2f..%2f..%2fetc%2fpasswd",
    "%00",
    "%ff%fe",
    "%2F",
    ".",
    "%20",
    "-1",
    "0",
    "99999999999999999999",
    "a" * 3000,
    "local",
    "eve",
    "open",
    "secret",
    "nothing",
    "main",
    "refs%2Fpr%2F1",
    "refs%2Fheads%2Fmain",
    "refs%2F..%2F..%2Fhub%2Frepo.json",
    "HEAD",
    "hub%2Frepo.json",
    "config",
    "%E2%98%83",
    "a.txt",
    "secret.txt",
    "README.md",
    "deadbeef",
    "d" * 40,
    "e" * 64,
    "NaN",
    "*",
    "models",
    "datasets",
    "objects",
    "token",
    "hub.json",
    "'\"<script>",
    "%0d%0aX-Injected: 1",
    "None",
    "1",
    "open..main",
    "main..open",
]

VALUES: list = [
    None,
    True,
    False,
    0,
    -1,
    2**70,
    1.5,
    "",
    " ",
    "x",
    "../../x",
    "a/../../b",
    "\ud800",
    "\x00",
    "a\nb",
    "main",
    "refs/pr/1",
    "d" * 40,
    "e" * 64,
    [],
    [[]],
    {},
    {"a": {}},
    [None],
    ["x"] * 50,
    "local/open",
    "local/secret",
    "eve/mine",
    "model",
    "dataset",
    "public",
    "private",
    "a" * 5000,
    "---\nlicense: [\n---",
    "---\na: &a [*a]\n---",
    "open",
    "closed",
    "merged",
    "base64",
    "auto",
    {"id": "local/secret", "type": "model"},
    {"sha": ["e" * 64, None]},
    {"type": "model", "name": "local/open"},
    [{"path": "../x", "size": "y"}],
    [{"oid": "e" * 64, "size": 3}],
]

WORDS = """
name organization type private visibility gated sdk fromRepo toRepo repository files gitIgnore gitAttributes
path sample size key value summary description parentCommit content encoding algo oid tag message
startingPoint overwrite emptyBranch title comment status pullRequest user requestId rejectionReason operation
transfers objects hash_algo parts deletions target item note position theme namespace repoType id paths expand
"""
KEYS = tuple(WORDS.split())

HEADERS = {
    "Range": [
        "bytes=0-",
        "bytes=-0",
        "bytes=5-2",
        "bytes=" + "9" * 40 + "-",
        "bytes=0-1,5-6",
        "lines=1-2",
        "bytes=--1",
        "\xff",
    ],
    "Content-Length": ["-1", "abc", "999999999999"],
    "Content-Type": [
        "application/x-www-form-urlencoded",
        "application/json",
        "multipart/form-data; boundary=x",
        "\xff",
    ],
    "Host": ["", "evil.example", "a b", "[::1", "x" * 3000, "127.0.0.1:0"],
    "X-Request-Id": ["a\tb", "\xe9" * 100, ""],
    "Accept": ["text/plain", "*/*"],
}


def body_of(rng: random.Random) -> bytes:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.randrange(400))
    if kind == 1:
        return b"[" * 5000
    if kind == 2:
        return b"&".join(f"{rng.choice(KEYS)}={rng.choice(PIECES)}".encode() for _ in range(5))
    if kind == 3:
        return b'{"a": NaN, "b": "\\ud800"}'
    values = [{rng.choice(KEYS): rng.choice(VALUES) for _ in range(rng.randrange(6))} for _ in range(3)]
    if kind == 4:
        names = ["header", "file", "lfsFile", "deletedFile", "deletedFolder", "nonsense"]
        header = {"key": "header", "value": {"summary": rng.choice(["s", *VALUES])}}
        return "\n".join(
            json.dumps(x) for x in [header, *({"key": rng.choice(names), "value": v} for v in values)]
        ).encode()
    return json.dumps(values[0]).encode()


def request_of(
    rng: random.Random, patterns: list[tuple[str, tuple[str, ...]]]
) -> tuple[str, str, bytes | None, dict[str, str]]:
    method, pieces = rng.choice(patterns)
    if rng.random() < 0.15:
        pieces = tuple(rng.choice(PIECES) for _ in range(rng.randrange(9)))
    if rng.random() < 0.1:
        method = rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW"])
    path = ""
    for piece in pieces:
        if piece.startswith("{repo}"):
            sane = rng.choice(["local/open", "local/secret", "eve/mine", "open", "local%2Fsecret"])
            piece = piece.replace("{repo}", sane if rng.random() < 0.7 else "/".join(rng.choices(PIECES, k=2)))
        elif piece == "{kind}":
            piece = rng.choice(["models", "models", "models", "datasets", "kinds"])
        elif piece == "{path...}":
            piece = "/".join(rng.choices(PIECES, k=rng.randrange(4)))
        elif piece.startswith("{"):
            piece = rng.choice(PIECES)
        path += f"/{piece}"
    if rng.random() < 0.3:
        path += "?" + "&".join(
            f"{rng.choice([*KEYS, 'cursor', 'limit', 'p', 'create_pr', 'recursive'])}={rng.choice(PIECES)}"
            for _ in range(3)
        )
    headers = {name: rng.choice(values) for name, values in HEADERS.items() if rng.random() < 0.06}
    body = None if method in ("GET", "HEAD") and rng.random() < 0.8 else body_of(rng)
    return method, path.replace(" ", "%20") or "/", body, headers


@pytest.mark.parametrize("seed", [0, 1])
def test_malformed_requests_do_no_harm(local_hub_factory, raw_for, tmp_path, seed):
    run_fuzz(local_hub_factory, raw_for, tmp_path, seed, 1500)


@pytest.mark.slow
def test_many_malformed_requests_do_no_harm(local_hub_factory, raw_for, tmp_path):
    run_fuzz(local_hub_factory, raw_for, tmp_path, random.SystemRandom().randrange(10**9), 30_000)


def run_fuzz(local_hub_factory, raw_for, tmp_path, seed: int, count: int) -> None:
    outer = tmp_path / "outer"
    hub = local_hub_factory(
        root=outer / "hub", tokens={"local": "hf_l", "eve": "hf_e"}, max_json=100_000, max_commit=200_000
    )
    raw = raw_for(hub)
    raw.create("local/open")
    raw.commit({"a.txt": b"open", "README.md": b"---\nlicense: mit\n---\n# hi"}, "models/local/open")
    raw.create("local/secret", private=True)
    raw.commit({"hidden-name.txt": SECRET, "secret.txt": SECRET}, "models/local/secret")
    raw.commit_lfs("secret.bin", SECRET * 10, "local/secret")
    raw("POST", "/api/repos/create", {"name": "mine"}, token="hf_e")
    outside = sorted(p for p in tmp_path.rglob("*") if not p.is_relative_to(hub.root))
    patterns = [
        (m, route.pieces)
        for m, routes in hub.app.router.routes.items()
        for route in routes
        if route.pieces[:1] != ("_local",)
    ]
    rng = random.Random(seed)
    seen: dict[int, int] = {}
    for number in range(count):
        method, path, body, headers = request_of(rng, patterns)
        token = rng.choice(["hf_e", "hf_e", False, "wrong", "Basic x"])
        try:
            got = raw(method, path, body, token=token, headers=headers)
        except (http.client.HTTPException, ConnectionError, TimeoutError):
            continue  # the server hung up on broken framing, which is its right
        except (ValueError, UnicodeError):
            continue  # http.client would not send it
        seen[got.status] = seen.get(got.status, 0) + 1
        sent = f"seed {seed} request {number}: {method} {path[:300]} {headers} {(body or b'')[:300]!r}"
        what = f"{sent} -> {got.status} {got.body[:300]!r}"
        assert got.status < 500, what
        assert SECRET not in got.body and b"hidden-name" not in got.body, what
        assert "x-injected" not in got.headers, what
    assert sorted(p for p in tmp_path.rglob("*") if not p.is_relative_to(hub.root)) == outside
    assert raw("GET", "/local/secret/resolve/main/secret.txt").body == SECRET
    assert raw("GET", "/local/open/resolve/main/a.txt").body == b"open"
    assert sum(n for s, n in seen.items() if s < 300) > count // 50, f"hardly anything got through: {seen}"


def test_broken_framing_does_not_stop_the_server(local_hub, raw_for):
    import socket

    for junk in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"A" * 100_000,
        b"POST /api/repos/create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with socket.create_connection(("127.0.0.1", local_hub.port), timeout=5) as line:
            try:
                line.sendall(junk)
                line.settimeout(0.3)
                line.recv(100)
            except OSError:
                pass
    assert raw_for(local_hub)("GET", "/_local/health").status == 200


SOME = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@SOME
@given(st.binary(max_size=400))
def test_xorb_and_shard_readers_only_refuse(data):
    import io

    for start in (b"", b"HFRepoMetaData".ljust(48, b"\0")):
        try:
            read_shard(start + data)
        except HubError as why:
            assert why.status == 400
    try:
        for chunk, body in read_chunks(io.BytesIO(data)):
            unpack(chunk, body)
    except HubError as why:
        assert why.status == 400


@SOME
@given(st.text(max_size=300))
def test_card_and_attribute_readers_take_anything(text):
    for form in (text, f"---\n{text}\n---\n"):
        json.dumps(card_data(form))
        check_card(form, "model")
        check_card(form, "dataset")
    AttributeRules(text).is_lfs("a/b.bin")
    html = render_markdown(text)
    assert "<script" not in html and "javascript:" not in html.split("href=")[-1][:12]


def test_a_yaml_bomb_is_refused_at_once():
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
    )
    assert "aliases" in check_card(f"---\n{bomb}---\n", "model").errors[0]["message"]


def test_a_commit_message_is_what_was_sent():
    assert CommitPlan(summary="a", description="b").message == "a\n\nb"
