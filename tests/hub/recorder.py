"""A proxy in front of a hub that writes down the shape of every request: method, place, query, form of the body."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit


class Shape(NamedTuple):
    """What a server could tell requests apart by, names and numbers taken out."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...]
    body: str
    """The keys of one object in it; a request with several objects has a shape for each."""


class Recorder:
    """The shapes of the requests seen so far."""

    def __init__(self, url: str):
        self.url = url
        self.shapes: list[Shape] = []

    def take(self) -> set[Shape]:
        """What was seen, and start over."""
        seen, self.shapes = set(self.shapes), []
        return seen


def shapes_of(method: str, target: str, body: bytes) -> list[Shape]:
    """One request without what is its own: repo, commits, numbers, file names."""
    parts = urlsplit(target)
    path = unquote(parts.path)
    for pattern, name in (
        (r"/(me|other)/[\w.-]+?(?=/|\.git/|$)", "/REPO"), (r"refs/pr/\d+", "PR"), (r"\b[0-9a-f]{64}\b", "OID"),
        (r"\b[0-9a-f]{40}\b", "SHA"), (r"/discussions/\d+", "/discussions/N"), (r"(/resolve/\w+)/.*", r"\1/FILE"),
        (r"/(tag|branch)/[\w.-]+$", r"/\1/NAME"), (r"^/storage/(\w+)/.*", r"/storage/\1/SIGNED"),
    ):  # fmt: skip
        path = re.sub(pattern, name, path)
    query = tuple(sorted((k, "…" if v.isdigit() and k != "create_pr" else v) for k, v in parse_qsl(parts.query)))
    return [Shape(method, path, query, form) for form in sorted(set(_form(body))) or [""]]


def _form(body: bytes) -> Iterator[str]:
    """The keys of JSON, of each line of ndjson by its kind; nothing of anything else."""
    for line in body.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            kind = f"{value['key']}: " if "key" in value and "value" in value else ""
            yield kind + " ".join(_keys(value.get("value", value) if kind else value))


def _keys(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, list):
        return sorted({key for item in value for key in _keys(item, prefix)})
    if not isinstance(value, dict):
        return []
    return sorted({key for name, item in value.items() for key in (prefix + name, *_keys(item, f"{prefix}{name}."))})


@contextmanager
def recording(upstream: str) -> Iterator[Recorder]:
    """Forward everything to a hub, and write it down."""
    there = urlsplit(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def _forward(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            recorder.shapes += shapes_of(self.command, self.path, body)
            onward = http.client.HTTPConnection(there.hostname or "", there.port)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
            onward.request(self.command, self.path, body or None, {**headers, "Content-Length": str(len(body))})
            answer = onward.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            onward.close()

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _forward

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recorder = Recorder(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
