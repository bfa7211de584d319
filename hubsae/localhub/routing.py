"""Routing on the raw path: split on `/` first, unquote each piece after.

The clients quote revisions with `safe=''`, so `refs/pr/1` arrives as one piece `refs%2Fpr%2F1`. Frameworks decode first
and lose that; this table does not. A pattern is pieces: a literal, `{name}` for one piece, `{repo}` for one or two
(`name` or `owner/name`), `{kind}` for `models|datasets|spaces|kernels`, and `{path...}` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

from .errors import HubError, bad_request
from .repos import KINDS

Handler = Callable[..., Any]

# first pieces of urls that are no repo's owner
RESERVED = frozenset(
    {"api", "storage", "xet", "_local", "v1", "collections", "login", "favicon.ico", "robots.txt", *KINDS}
)


@dataclass(frozen=True)
class Route:
    """A pattern and who answers it. `body`: "json" (read before the handler runs), "stream" (handler reads)."""

    method: str
    pieces: tuple[str, ...]
    handler: Handler
    body: str
    fixed: tuple[tuple[str, str], ...] = ()


class Match(NamedTuple):
    route: Route
    params: dict[str, str]


class Router:
    """All routes, by method."""

    def __init__(self) -> None:
        self.routes: dict[str, list[Route]] = {}

    def add(self, method: str, pattern: str, handler: Handler, body: str = "json", **fixed: str) -> None:
        pieces = tuple(pattern.strip("/").split("/")) if pattern != "/" else ()
        self.routes.setdefault(method, []).append(Route(method, pieces, handler, body, tuple(fixed.items())))

    def on(self, method: str, pattern: str, body: str = "json") -> Callable[[Handler], Handler]:
        """Decorator: `@router.on("GET", "/api/{kind}/{repo}/refs")`."""

        def register(handler: Handler) -> Handler:
            self.add(method, pattern, handler, body)
            return handler

        return register

    def on_repo(self, method: str, tail: str, body: str = "json") -> Callable[[Handler], Handler]:
        """Decorator for routes below a repo's page: `/me/x<tail>`, `/datasets/me/x<tail>`, ..."""

        def register(handler: Handler) -> Handler:
            for kind in KINDS[1:]:
                self.add(method, f"/{kind}/{{repo}}{tail}", handler, body, kind=kind)
            self.add(method, f"/{{repo}}{tail}", handler, body, kind="models")
            return handler

        return register

    def include(self, other: Router) -> None:
        """Take over the routes of another table."""
        for method, routes in other.routes.items():
            self.routes.setdefault(method, []).extend(routes)

    def find(self, method: str, raw_path: str) -> Match:
        """The first route that fits; 404 or 405 where none does."""
        pieces = split_path(raw_path)
        wanted = [method, "GET"] if method == "HEAD" else [method]
        for verb in wanted:
            for route in self.routes.get(verb, []):
                params = _match(route, pieces)
                if params is not None:
                    return Match(route, {**params, **dict(route.fixed)})
        for verb, routes in self.routes.items():
            if verb not in wanted and any(_match(r, pieces) is not None for r in routes):
                raise HubError(405, f"{method} is not allowed here", headers={"Allow": verb})
        raise HubError(404, "Sorry, we can't find the page you are looking for.")


def split_path(raw_path: str) -> list[str]:
    """The decoded pieces of a raw path; 400 for bytes that are not UTF-8 or hold a NUL.

    >>> split_path("/api/models/me/x/tree/refs%2Fpr%2F1")[-1]
    'refs/pr/1'
    """
    text = raw_path.strip("/")
    if not text:
        return []
    try:
        pieces = [unquote(piece, errors="strict") for piece in text.split("/")]
    except UnicodeDecodeError:
        raise bad_request("The url is not valid UTF-8") from None
    if any("\0" in piece for piece in pieces) or len(text) > 16_000:
        raise bad_request("The url is not valid")
    return pieces


def _match(route: Route, pieces: list[str]) -> dict[str, str] | None:
    if route.pieces and route.pieces[0].startswith("{repo}") and pieces and pieces[0] in RESERVED:
        return None
    return _fit(route.pieces, pieces)


def _fit(pattern: tuple[str, ...], pieces: list[str]) -> dict[str, str] | None:
    if not pattern:
        return None if pieces else {}
    head, rest = pattern[0], pattern[1:]
    if head == "{path...}":
        return {"path": "/".join(pieces)}
    if not pieces:
        return None
    if head == "{repo}":
        for size in (2, 1):
            name = "/".join(pieces[:size])
            if len(pieces) >= size and name.count("/") == size - 1:
                found = _fit(rest, pieces[size:])
                if found is not None:
                    return {"repo": name, **found}
        return None
    if head == "{repo}.git":
        name = "/".join(pieces[:2])
        if len(pieces) < 2 or not name.endswith(".git"):
            return None
        found = _fit(rest, pieces[2:])
        return None if found is None else {"repo": name[:-4], **found}
    if head == "{kind}":
        if pieces[0] not in KINDS:
            return None
    elif not head.startswith("{"):
        return _fit(rest, pieces[1:]) if head == pieces[0] else None
    found = _fit(rest, pieces[1:])
    return None if found is None else {head[1:-1]: pieces[0], **found}
