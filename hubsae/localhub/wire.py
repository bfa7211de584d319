"""The connection under a request: large bodies go straight from the socket to worker threads, files back by sendfile.

Through plain ASGI a byte of a body is copied five times on its way and every 256 KiB costs a new buffer. Here the
socket fills two fixed buffers in turn: while one is hashed and written in a thread, the other fills. uvicorn's request
cycle is what `receive` and `send` are bound to; under any other server (`None` from `connection`) callers use ASGI.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import HubError

BLOCK = 1 << 20
MAX_HEAD = 64 * 1024  # bytes of a request's line and headers
_NEEDED = ("transport", "flow", "keep_alive", "more_body", "expected_content_length", "disconnected")


def connection(bound: Any) -> Any:
    """uvicorn's request cycle behind `receive` or `send`, or None."""
    cycle = getattr(bound, "__self__", None)
    return cycle if all(hasattr(cycle, name) for name in _NEEDED) else None


def bounded_protocol(seconds: float) -> Any:
    """uvicorn's protocol, closing connections whose next request has no complete head after `seconds` or `MAX_HEAD`."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Bounded(base):
        _timer: asyncio.TimerHandle | None = None
        _head = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._head = 0
                self._stop_timer()
                return
            if self._timer is None:
                self._timer = self.loop.call_later(seconds, self.transport.abort)
            if self.cycle is None or not self.cycle.more_body:  # else the rest of a body that was refused
                self._head += len(data)
                if self._head > MAX_HEAD:
                    self.transport.abort()

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Bounded


class _Filler(asyncio.BufferedProtocol):
    """Stands in for uvicorn's protocol while a body comes: fills a buffer, then stops the socket until it is taken."""

    def __init__(self, usual: Any, transport: Any, left: int) -> None:
        self.usual = usual
        self.transport = transport
        self.left = left
        self.lost = False
        self.full = asyncio.Event()
        self.views = [memoryview(bytearray(min(BLOCK, left))) for _ in range(2)]
        self.filled = 0

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.views[0][self.filled : self.filled + self.left]

    def buffer_updated(self, nbytes: int) -> None:
        self.filled += nbytes
        self.left -= nbytes
        if not self.left or self.filled == len(self.views[0]):
            self.transport.pause_reading()
            self.full.set()

    def take(self) -> memoryview:
        """What is there; the other buffer fills next."""
        block = self.views[0][: self.filled]
        self.views.reverse()
        self.filled = 0
        self.full.clear()
        if self.left and not self.lost:
            self.transport.resume_reading()
        return block

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.full.set()
        self.usual.connection_lost(exc)

    def pause_writing(self) -> None:
        self.usual.pause_writing()

    def resume_writing(self) -> None:
        self.usual.resume_writing()


async def read_body(cycle: Any, length: int, put: Callable[[Any], Any]) -> None:
    """Hand a body of `length` bytes to `put` block by block, in order, each in a worker thread.

    uvicorn's parser never sees most of these bytes, so the connection closes after the answer.
    """
    first = await cycle.receive()  # also tells a client that waits for "100 Continue" to go on
    if first["type"] != "http.request":
        raise gone()
    left = length - len(first["body"])
    if not left:
        await run_in_threadpool(put, first["body"])
        return
    cycle.flow.pause_reading()
    cycle.keep_alive = False
    usual = cycle.transport.get_protocol()
    filler = _Filler(usual, cycle.transport, left)
    cycle.transport.set_protocol(filler)
    cycle.transport.resume_reading()
    work = asyncio.ensure_future(run_in_threadpool(put, first["body"]))
    try:
        more = True
        while more:
            await filler.full.wait()
            if filler.lost:
                raise gone()
            await work  # before its buffer fills again
            more = filler.left > 0
            work = asyncio.ensure_future(run_in_threadpool(put, filler.take()))
        await work
    finally:
        cycle.transport.pause_reading()
        cycle.transport.set_protocol(usual)
        await asyncio.wait([work])  # a thread that still writes must not meet a closed file


def gone() -> HubError:
    """The answer nobody will read to a client that closed its connection."""
    return HubError(400, "The client went away while sending")


class FileAnswer(Response):
    """Bytes `[start, end)` of a file, sent by the kernel without passing through Python."""

    def __init__(self, path: Path, start: int, end: int, status: int, headers: dict[str, str]) -> None:
        super().__init__(status_code=status, headers=headers)
        try:
            self.handle = open(path, "rb")  # noqa: SIM115 - closed when sent, or with this answer
        except FileNotFoundError:
            raise HubError(404, "This object was deleted") from None
        self.start = start
        self.end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.handle as handle:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            cycle = connection(send)
            if cycle is None:
                handle.seek(self.start)
                left = self.end - self.start
                while left and (data := await run_in_threadpool(handle.read, min(BLOCK, left))):
                    left -= len(data)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            else:
                loop = asyncio.get_running_loop()
                try:
                    await loop.sendfile(cycle.transport, handle, self.start, self.end - self.start)
                except (ConnectionError, RuntimeError) as why:
                    if isinstance(why, RuntimeError) and not cycle.transport.is_closing():
                        raise
                    cycle.transport.abort()  # the client went away
                    await asyncio.sleep(0)  # uvicorn hears of it before this answer ends
                    return
                cycle.expected_content_length = 0
            await send({"type": "http.response.body", "body": b"", "more_body": False})
