"""The request as the routes see it, bodies read within bounds, and streamed answers with Range and HEAD."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .auth import ANONYMOUS, Caller
from .errors import HubError, bad_request
from .repos import Repo
from .wire import BLOCK, FileAnswer, connection, gone, read_body

if TYPE_CHECKING:
    from .hub import Hub

_RANGE = re.compile(r"^bytes=(\d*)-(\d*)$")


class Call:
    """One request on its way through the hub: who asks, the url's parts, the body."""

    def __init__(self, hub: Hub, request: Request, params: dict[str, str]) -> None:
        self.hub = hub
        self.request = request
        self.params = params
        self.caller: Caller = ANONYMOUS
        self.body = bytearray()
        self.held = 0  # bytes of it that count as held for callers without a token

    def __getitem__(self, name: str) -> str:
        return self.params[name]

    @property
    def kind(self) -> str:
        return self.params["kind"]

    @property
    def query(self) -> Any:
        return self.request.query_params

    @property
    def base(self) -> str:
        """Scheme, host and port as the client wrote them."""
        host = self.request.headers.get("host", "")
        if not re.fullmatch(r"[A-Za-z0-9.:\[\]_-]{1,255}", host):
            host = f"{self.hub.settings.host}:{self.hub.port}"
        return f"{self.request.url.scheme}://{host}"

    @property
    def storage_base(self) -> str:
        """Where large content is served: this origin, or with the CDN switch the second one."""
        if not self.hub.settings.cdn or not self.hub.cdn_port:
            return self.base
        scheme, _, host = self.base.partition("://")
        return f"{scheme}://{re.sub(r':[0-9]+$', '', host)}:{self.hub.cdn_port}"

    def flag(self, name: str) -> bool:
        """A query switch: `?name=1`, `?name=true`."""
        return self.query.get(name, "").lower() in ("1", "true")

    def repo(self) -> Repo:
        """The repo of the url, visible to the caller."""
        return self.hub.registry.find(self.kind, self.params["repo"], self.caller)

    def need_user(self) -> str:
        """The caller's name; 401 for nobody."""
        if self.caller.name is None:
            raise HubError(401, "Invalid username or password.")
        return self.caller.name

    # -- body ---------------------------------------------------------------------------------------------

    async def load_body(self, limit: int) -> AsyncIterator[int]:
        """Read a bounded body into memory; yields how much came with each piece."""
        async for block in self.stream(limit):
            self.body += block
            yield len(block)

    async def stream(self, limit: int) -> AsyncIterator[bytes]:
        """The body block by block; 413 when it grows past the limit."""
        announced = self.request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise HubError(413, f"Body of {announced} bytes is over the limit of {limit}")
        size = 0
        try:
            async for block in self.request.stream():
                size += len(block)
                if size > limit:
                    raise HubError(413, f"Body is over the limit of {limit} bytes")
                if block:
                    yield block
        except ClientDisconnect:
            raise gone() from None

    async def drain(self, limit: int, put: Callable[[Any], Any]) -> None:
        """Hand a large body to `put`, block by block and in order, each in a worker thread."""
        announced = self.request.headers.get("content-length", "")
        cycle = connection(self.request.receive)
        if cycle is not None and announced.isdigit() and BLOCK <= int(announced) <= limit:
            return await read_body(cycle, int(announced), put)
        buffer = bytearray()
        async for block in self.stream(limit):
            buffer += block
            if len(buffer) >= BLOCK:
                await run_in_threadpool(put, buffer)
                buffer = bytearray()
        await run_in_threadpool(put, buffer)

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is an empty object."""
        if not self.body.strip():
            return {}
        value = parse_json(self.body)
        if not isinstance(value, dict):
            raise bad_request("The body must be a JSON object")
        return value

    def form(self) -> dict[str, list[str]]:
        """A form-encoded body (or the same thing as JSON)."""
        if "json" in self.request.headers.get("content-type", ""):
            return {k: [str(x) for x in (v if isinstance(v, list) else [v])] for k, v in self.json().items()}
        try:
            return parse_qs(self.body.decode(), keep_blank_values=True, errors="strict", max_num_fields=100_000)
        except ValueError:
            raise bad_request("The body is not a form") from None


def parse_json(data: bytes | bytearray | str) -> Any:
    """JSON from outside; 400 for anything that is not JSON, or absurdly nested, or not text."""
    try:
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(text, parse_constant=_no_constant)
        text.encode()
    except (ValueError, RecursionError):
        raise bad_request("The body is not valid JSON") from None
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def text_field(value: dict[str, Any], name: str, default: str | None = None, limit: int = 100_000) -> str:
    """A text field of a JSON body; 400 when missing (without a default), not text, too long, or not encodable."""
    found = value.get(name, default)
    if found is None and default is not None:
        found = default
    if not isinstance(found, str):
        raise bad_request(f'"{name}" must be a string')
    if len(found) > limit:
        raise bad_request(f'"{name}" is longer than {limit} characters')
    return clean(found, name)


def clean(text: str, name: str = "text") -> str:
    """Refuse lone surrogates, which JSON can carry and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_request(f'"{name}" is not valid Unicode') from None
    return text


def check_path(path: object) -> str:
    """A file path inside a repo; 422 for anything that could mean another place."""
    if not isinstance(path, str):
        raise bad_request('"path" must be a string')
    clean(path, "path")
    parts = path.split("/")
    bad = any(p in ("", ".", "..") or p.lower() == ".git" or len(p.encode()) > 255 for p in parts)
    # like the Hub: a leading `..\` is refused too, for the sake of Windows clients; the path never meets this disk
    if bad or path.startswith("..\\") or len(path) > 4096 or re.search(r"[\x00-\x1f\x7f]", path):
        raise HubError(422, f"Invalid path: {path[:200]!r}. A path must not be empty, start with '..' or hold '..'")
    return path


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> JSONResponse:
    """A JSON answer."""
    return JSONResponse(value, status_code=status, headers=headers)


def header_value(text: str) -> str:
    """Text made fit for a header: one line, Latin-1."""
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text)[:1000].encode("latin-1", "replace").decode("latin-1")


def quote_path(path: str) -> str:
    """A path for a url; slashes stay."""
    return quote(path, safe="/")


def byte_range(request: Request, size: int) -> tuple[int, int] | None:
    """The single range asked for as `[start, end)`; None for the whole; 416 outside.

    Several ranges at once, or nonsense, get the whole file: the standard allows it.
    """
    found = _RANGE.match(request.headers.get("range", "").replace(" ", ""))
    if not found or found.groups() == ("", "") or any(len(g) > 18 for g in found.groups()):
        return None
    first, last = found.groups()
    if first == "":
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < start:
            return None
    if start >= size or start >= end:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def content_answer(
    request: Request, size: int, source: Path | Callable[[int, int], Iterator[bytes]], headers: dict[str, str]
) -> Response:
    """Serve `size` bytes of a file, or that `source(start, end)` yields, with Range and HEAD; never compressed."""
    wanted = byte_range(request, size)
    start, end = wanted or (0, size)
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Length": str(end - start)}
    status = 200
    if wanted:
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    if isinstance(source, Path):
        return FileAnswer(source, start, end, status, headers)
    return StreamingResponse(iterate_in_threadpool(source(start, end)), status_code=status, headers=headers)


def paged(
    call: Call,
    items: list[Any],
    size: int,
    headers: dict[str, str] | None = None,
    describe: Callable[[list[Any]], list[Any]] = list,
) -> JSONResponse:
    """One page of a list, with a `Link: <...>; rel="next"` that keeps the rest of the query.

    `describe` turns the items of this page (and only these) into what is sent.
    """
    cursor = call.query.get("cursor", "0")
    start = int(cursor) if cursor.isdigit() and len(cursor) < 10 else 0
    headers = dict(headers or {})
    if start + size < len(items):
        rest = [(k, v) for k, v in call.query.multi_items() if k != "cursor"] + [("cursor", str(start + size))]
        text = "&".join(f"{quote(k)}={quote(v)}" for k, v in rest)
        path = call.request.scope["raw_path"].decode("latin-1")
        headers["Link"] = f'<{call.base}{path}?{text}>; rel="next"'
    return answer(describe(items[start : start + size]), headers=headers)
