"""The ASGI application: fault injection, routing, rights, errors as the clients expect them, request ids.

A plain ASGI callable: the raw path, HEAD and cutting a connection are all needed, and a framework hides each of them.
Handlers are plain functions run in a thread (git and disk work blocks), or coroutines where a body is streamed.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .errors import HubError, RepoMoved
from .http import Call, answer, header_value
from .hub import Hub
from .routes import all_routes

log = logging.getLogger("hubsae.localhub")


PREFLIGHT = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, HEAD",
    "Access-Control-Allow-Headers": "Range",
}


class App:
    """The callable uvicorn runs."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.router = all_routes()
        self.anonymous_bytes = 0  # of bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        method = scope["method"]
        path = scope["raw_path"].decode("latin-1")
        full = f"{path}?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else path
        fault = None if path.startswith("/_local/") else self.hub.faults.pick(method, full)
        if fault is not None and fault.delay:
            await asyncio.sleep(fault.delay)
        if fault is not None and fault.drop == "before":
            self.hub.faults.note(method, full, 0)
            return _cut(send)
        if fault is not None and fault.status is not None and fault.drop is None:
            response = _error(HubError(fault.status, "Injected fault", headers=fault.headers))
        else:
            response = await self.respond(request, method, path)
        if fault is not None and fault.drop == "after":
            self.hub.faults.note(method, full, 0)
            if fault.lost_status is None:
                return _cut(send)
            response = _error(HubError(fault.lost_status, "Injected fault: the answer was lost"))
        if fault is not None and fault.status is None:
            response.headers.update(fault.headers)
        if not path.startswith("/_local/"):
            self.hub.faults.note(method, full, response.status_code)
        _stamp(request, response)
        await response(scope, receive, _without_body(send) if method == "HEAD" else send)

    async def respond(self, request: Request, method: str, path: str) -> Response:
        """The answer to a request; every refusal becomes one, and a bug a logged 500."""
        call = Call(self.hub, request, {})
        try:
            if method == "OPTIONS":  # may a page of a sandbox ask for ranges? It may; answers say who may read them
                return Response(status_code=204, headers=PREFLIGHT)
            _refuse_foreign_pages(request, method)
            match = self.router.find(method, path)
            call.params = match.params
            call.caller = self.hub.accounts.identify(_credentials(request, path))
            if match.route.body == "json" and method not in ("GET", "HEAD"):
                await self._load(call)
            handler = match.route.handler
            if inspect.iscoroutinefunction(handler):
                result = await handler(call)
            else:
                result = await run_in_threadpool(handler, call)
            return result if isinstance(result, Response) else answer(result)
        except HubError as why:
            return _error(why)
        except RepoMoved as why:
            return self._moved(request, call.params, why)
        except Exception:
            log.exception("%s %s", method, path)
            return _error(HubError(500, "Internal error of the local hub; its log has the traceback"))
        finally:
            self.anonymous_bytes -= call.held

    async def _load(self, call: Call) -> None:
        """A body that is held in memory: in bounded time, and bounded over all callers that show no token."""
        settings, known = self.hub.settings, call.caller.known
        try:
            async with asyncio.timeout(settings.body_seconds):
                async for size in call.load_body(settings.max_json if known else settings.max_anonymous_json):
                    if not known:
                        call.held += size
                        self.anonymous_bytes += size
                        if self.anonymous_bytes > settings.max_anonymous_memory:
                            raise HubError(503, "Too many requests without a token", headers={"Retry-After": "2"})
        except TimeoutError:
            raise HubError(408, f"The body did not come within {settings.body_seconds:g} s") from None

    def _moved(self, request: Request, params: dict[str, str], why: RepoMoved) -> Response:
        """307 to the same url with the new name."""
        raw = request.scope["raw_path"].decode("latin-1")
        old = params["repo"]
        for spelled in (quote(old, safe="/"), quote(old, safe=""), old):
            if f"/{spelled}" in raw:
                raw = raw.replace(f"/{spelled}", f"/{quote(why.new_id, safe='/')}", 1)
                break
        query = request.scope["query_string"].decode("latin-1")
        location = f"{Call(self.hub, request, params).base}{raw}{'?' + query if query else ''}"
        return answer({"error": "Moved", "url": location}, 307, {"Location": location})


def _refuse_foreign_pages(request: Request, method: str) -> None:
    """Writes that a page of another site makes a browser send, with the password that the browser remembers.

    `Sec-Fetch-Site` is missing over plain HTTP, `Origin` is not. Of credentials browsers keep only Basic ones by
    themselves, and they send JSON elsewhere only after asking, which is never granted; so Basic needs JSON.
    """
    if method in ("GET", "HEAD"):
        return
    headers = request.headers
    origin = headers.get("origin")
    foreign = origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()
    if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise HubError(403, "A page of another origin may not change anything here")
    basic = headers.get("authorization", "").lower().startswith("basic ")
    if basic and method == "POST" and "json" not in headers.get("content-type", "").partition(";")[0].lower():
        raise HubError(415, "With user name and password the body must be JSON and say so in Content-Type")


def _credentials(request: Request, path: str) -> str | None:
    """The Authorization header, except where a route has a scheme of its own (Xet tokens, signed urls, admin)."""
    if path.startswith(("/xet/", "/storage/", "/_local/")):
        return None
    return request.headers.get("authorization")


def _error(why: HubError) -> Response:
    headers = {"X-Error-Message": header_value(why.message), **why.headers}
    if why.code:
        headers["X-Error-Code"] = why.code
    return answer({"error": why.message.encode("utf-8", "replace").decode(), **why.extra}, why.status, headers)


def _stamp(request: Request, response: Response) -> None:
    wanted = request.headers.get("x-request-id") or request.headers.get("x-amzn-trace-id") or str(uuid.uuid4())
    response.headers["X-Request-Id"] = header_value(wanted)
    response.headers["X-Content-Type-Options"] = "nosniff"


def _without_body(send: Send) -> Send:
    """HEAD of a GET route: same headers, no content."""

    async def forward(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return forward


def _cut(send: Any) -> None:
    """Close the connection without an answer, as a dying server or a cut cable would.

    ASGI has no word for that. uvicorn's `send` is a method of its connection cycle, which holds the transport;
    elsewhere returning without an answer makes the server close or answer 500, which tests the same.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()
