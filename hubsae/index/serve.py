"""A small server for the feature pages of one release, for this machine alone: the page and its tables only."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hubsae.core.extras import require
from hubsae.index.page import FOLDER, TABLES, indexes, render


def application(release: Path, repo: str | None = None, notify: Callable[[str, str | None], None] | None = None) -> Any:
    """The ASGI application. The page is this version's own, whatever `index.html` lies in the release."""
    require("starlette", extra="hub")
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    def tell(request: Request) -> None:
        if notify is not None:
            notify(request.url.path, request.headers.get("range"))

    def page(request: Request) -> Response:
        tell(request)
        return HTMLResponse(render(indexes(release), title=repo or release.resolve().name, repo=repo))

    def table(request: Request) -> Response:
        tell(request)
        name, file = request.path_params["name"], request.path_params["file"]
        path = release / FOLDER / name / file
        if file not in TABLES or name.startswith(".") or not path.is_file():
            return PlainTextResponse("Not found", 404)
        return FileResponse(path, media_type="application/vnd.apache.parquet")

    return Starlette(
        routes=[Route("/", page), Route("/index.html", page), Route(f"/{FOLDER}/{{name}}/{{file}}", table)],
        # a web page whose name was made to mean this machine does not get to read what is private
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
    )


@contextlib.contextmanager
def serve(
    release: str | Path,
    *,
    port: int = 0,
    repo: str | None = None,
    notify: Callable[[str, str | None], None] | None = None,
) -> Iterator[str]:
    """Serve the pages of a release on loopback while the block lasts; yields the address.

    `notify` is called with the path and the `Range` of every request.
    """
    app = application(Path(release), repo, notify)
    uvicorn = require("uvicorn", extra="hub")
    listening = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", server_header=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(5)
        listening.close()
