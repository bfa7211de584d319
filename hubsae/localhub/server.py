"""Running a hub: in a thread of this process (`running`, for tests and the demo) or in the foreground (`serve`)."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import LocalHubError
from .faults import Fault, rate_limit_headers
from .settings import Org, Settings, Token

DEFAULT_USER = "local"


class LocalHub:
    """A hub that is running. `url` is what `HF_ENDPOINT` has to be; `token` writes as `user`."""

    def __init__(self, settings: Settings) -> None:
        try:
            from .app import App
            from .hub import Hub
        except ImportError as why:
            raise LocalHubError(f"the local hub needs the package {why.name}: pip install 'hubsae[hub]'") from why

        self.settings = settings
        self.hub = Hub(settings)
        self.app = App(self.hub)
        self._sockets = [_listen(settings.host, settings.port)]
        if settings.cdn:
            self._sockets.append(_listen(settings.host, 0))
            self.hub.cdn_port = self._sockets[1].getsockname()[1]
        self.port: int = self._sockets[0].getsockname()[1]
        self.hub.port = self.port
        self._thread: threading.Thread | None = None
        self._server = _uvicorn(self.app, settings)

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "") else self.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    endpoint = url

    @property
    def root(self) -> Path:
        """The data folder."""
        return self.hub.root

    @property
    def user(self) -> str:
        """The first user."""
        return self.settings.tokens[0].user

    @property
    def token(self) -> str:
        """The first user's token."""
        return self.settings.tokens[0].secret

    @property
    def tokens(self) -> dict[str, str]:
        """The first token of every user."""
        found: dict[str, str] = {}
        for token in self.settings.tokens:
            found.setdefault(token.user, token.secret)
        return found

    def env(self, home: str | Path, **more: str) -> dict[str, str]:
        """The environment for a subprocess that uses this hub and keeps its caches under `home`.

        `HF_ENDPOINT` is read when huggingface_hub is imported, so a process that has imported it cannot be turned.
        """
        home = Path(home)
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **more,
        }

    @property
    def xet(self) -> bool:
        """Whether Xet is offered; may be set while the hub runs."""
        return self.hub.xet

    @xet.setter
    def xet(self, offered: bool) -> None:
        self.hub.xet = offered

    def git_path(self, repo_id: str, repo_type: str = "model") -> Path:
        """The bare git repo behind a repo id, for `git log` and `git fsck`."""
        from .auth import Caller

        return self.hub.registry.find(f"{repo_type}s", repo_id, Caller(repo_id.split("/")[0], "write")).path

    # -- faults -------------------------------------------------------------------------------------------

    def inject_fault(
        self,
        path: str = "",
        *,
        method: str = "*",
        status: int | None = None,
        drop: str | None = None,
        lost_status: int | None = None,
        count: int | None = 1,
        skip: int = 0,
        headers: dict[str, str] | None = None,
        rate_limit: int | None = None,
        delay: float = 0.0,
    ) -> Fault:
        """Let the next `count` requests whose path matches (a regular expression) fail.

        `status=503` answers that; `drop="before"` cuts the line before, `drop="after"` after the work is done
        (`lost_status=504`: a gateway's answer instead of the cut); `rate_limit=2` adds the headers of a 429.
        """
        extra = {**(rate_limit_headers(rate_limit) if rate_limit is not None else {}), **(headers or {})}
        return self.hub.faults.add(Fault(path, method, status, drop, lost_status, count, skip, extra, delay))

    def clear_faults(self) -> None:
        """Forget all faults."""
        self.hub.faults.clear()

    @property
    def requests(self) -> list[tuple[str, str, int]]:
        """(method, path with query, status) of the requests answered so far; status 0 is a cut line."""
        return list(self.hub.faults.requests)

    # -- life ---------------------------------------------------------------------------------------------

    def start(self) -> LocalHub:
        """Serve from a thread; returns when the hub answers."""
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": self._sockets}, name="local-hub", daemon=True
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise LocalHubError("the local hub did not start; its log says why")
            self._thread.join(0.005)
        return self

    def stop(self) -> None:
        """Stop serving and let the folder go."""
        self._server.should_exit = True
        self._server.force_exit = True
        if self._thread is not None:
            self._thread.join(10)
        for listening in self._sockets:
            listening.close()
        self.hub.close()

    def serve_forever(self) -> None:
        """Serve in the foreground until a signal stops it."""
        try:
            self._server.run(sockets=self._sockets)
        finally:
            self.hub.close()


def _uvicorn(app: Any, settings: Settings) -> Any:
    try:
        import uvicorn

        from .wire import MAX_HEAD, bounded_protocol
    except ImportError as why:
        raise LocalHubError("the local hub needs uvicorn: pip install 'hubsae[hub]'") from why
    config = uvicorn.Config(
        app,
        host=settings.host,
        log_level="warning",
        access_log=False,
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        limit_concurrency=None,
        h11_max_incomplete_event_size=MAX_HEAD,
        http=bounded_protocol(settings.head_seconds),
    )
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(512)
    except OSError as why:
        listening.close()
        raise LocalHubError(f"cannot listen on {host}:{port}: {why.strerror}. Choose another --port or --host") from why
    return listening


@contextlib.contextmanager
def running(
    root: str | Path | None = None,
    *,
    xet: bool = True,
    cdn: bool = False,
    tokens: dict[str, str] | tuple[Token, ...] | None = None,
    orgs: dict[str, dict[str, str]] | tuple[Org, ...] | None = None,
    fsync: bool = False,
    **settings: Any,
) -> Iterator[LocalHub]:
    """A hub on a free loopback port for as long as the block lasts; without `root` its data goes with it.

    `tokens={"alice": "hf_a"}` makes users (default: one user `local` with a random token), `orgs={"lab": {"alice":
    "admin"}}` organisations; other keywords are those of `Settings`.

    >>> with running() as hub:
    ...     hub.url.startswith("http://127.0.0.1:"), hub.user
    (True, 'local')
    """
    if tokens is None:
        tokens = {DEFAULT_USER: f"hf_{secrets.token_hex(16)}"}
    if isinstance(tokens, dict):
        tokens = tuple(Token(user, secret) for user, secret in tokens.items())
    if isinstance(orgs, dict):
        orgs = tuple(Org(name, members) for name, members in orgs.items())
    with contextlib.ExitStack() as stack:
        if root is None:
            root = stack.enter_context(tempfile.TemporaryDirectory(prefix="local-hub-", ignore_cleanup_errors=True))
        made = Settings(root=Path(root), xet=xet, cdn=cdn, tokens=tokens, orgs=orgs or (), fsync=fsync)
        hub = LocalHub(replace(made, **settings)).start()
        stack.callback(hub.stop)
        yield hub
