"""Web pages for a person: what is on this hub, and per repo its card, files, commits and pull requests.

Everything shown comes from repos, so nothing of it is trusted: Jinja escapes all text, tags in Markdown appear as text
(folding sections work, comments are left out), `javascript:` links are dropped, the pages forbid scripts altogether.
"""

from __future__ import annotations

import contextlib
import re
import time
from functools import cache
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.responses import HTMLResponse, RedirectResponse, Response

from ..cards import split_card
from ..describe import read_blob, used_storage
from ..discussions import Board
from ..errors import HubError
from ..history import log, unified_diff
from ..http import Call, quote_path
from ..repos import KINDS, Repo
from ..routing import Router
from .content import find_file, has_site
from .discussions import number_of
from .tree import find_folder

routes = Router()

_POLICY = (
    "default-src 'none'; img-src 'self' data: {}; style-src 'unsafe-inline'; form-action 'none'; frame-ancestors 'none'"
)
_SHOWN = 1000
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FOLDING = re.compile(r"&lt;(/?(?:details|summary))&gt;")


@cache
def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent.parent / "templates"), autoescape=True, trim_blocks=True
    )
    made.filters.update(size=_size, when=_when, urlencode_all=lambda t: quote(t, safe=""), urlencode_path=quote_path)
    return made


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _page(call: Call, template: str, **values: Any) -> Response:
    text = _templates().get_template(template).render(user=call.caller.name, base=call.base, xet=call.hub.xet, **values)
    return HTMLResponse(
        text, headers={"Content-Security-Policy": _POLICY.format(call.storage_base), "Referrer-Policy": "no-referrer"}
    )


def _repo_page(call: Call, repo: Repo, template: str, tab: str, revision: str = "main", **values: Any) -> Response:
    tags: list[str] = []
    with contextlib.suppress(HubError):
        tags = repo.tags(repo.head())
    kind = repo.kind[:-1]
    return _page(
        call,
        template,
        repo=repo,
        kind=kind,
        url=quote_path(repo.url_path),
        tags=tags,
        tab=tab,
        revision=revision,
        features=has_site(repo),
        **values,
    )


@routes.on("GET", "/")
def index(call: Call) -> Response:
    """Everything the caller may see."""
    groups = []
    for kind in KINDS:
        repos = sorted(call.hub.registry.all(kind, call.caller), key=lambda r: -r.last_modified())
        if repos or kind in ("models", "datasets"):
            groups.append((kind, [_line(r) for r in repos[:_SHOWN]]))
    return _page(call, "index.html", groups=groups)


@routes.on("GET", "/login")
def login(call: Call) -> Response:
    """Let a browser ask for user name and token, so that private repos show."""
    if not call.caller.known:
        return Response("Log in with your user name and token.", 401, {"WWW-Authenticate": 'Basic realm="local hub"'})
    return RedirectResponse("/", 303)


def _line(repo: Repo) -> dict[str, Any]:
    sha = repo.git.ref("refs/heads/main")
    tags = [t for t in repo.tags(sha) if not t.startswith(("region:", "format:"))] if sha else []
    return {
        "id": repo.id,
        "url": quote_path(repo.url_path),
        "private": repo.private,
        "gated": repo.gated,
        "tags": tags[:6],
        "size": used_storage(repo, sha),
        "updated": repo.last_modified(),
    }


def render_markdown(text: str, link_base: str = "", image_base: str = "") -> str:
    """Markdown as HTML that is safe to show; relative links and images are led into the repo.

    >>> render_markdown("<script>alert(1)</script>")
    '&lt;script&gt;alert(1)&lt;/script&gt;'
    >>> render_markdown("<!-- hidden -->\\n# Hi <b>you</b>")
    '\\n<h1>Hi &lt;b&gt;you&lt;/b&gt;</h1>\\n'
    """
    from markdown_it import MarkdownIt

    # HTML is parsed, so that a comment ends a table as on the real Hub, and then dropped or shown as text
    reader = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
    tokens = reader.parse(text)
    for token in tokens:
        if token.type == "html_block":
            token.content = _harmless(token.content)
        for child in token.children or []:
            if child.type == "html_inline":
                child.content = _harmless(child.content)
            for name, base in (("href", link_base), ("src", image_base)):
                value = str(child.attrs.get(name, ""))
                if value and base and not value.startswith(("#", "/")) and ":" not in value.split("/")[0]:
                    child.attrs[name] = f"{base}/{value.removeprefix('./')}"
    return reader.renderer.render(tokens, reader.options, {})


def _harmless(html: str) -> str:
    """Comments are dropped, folding sections kept, every other tag becomes text."""
    return _FOLDING.sub(r"<\1>", escape(_COMMENT.sub("", html)))


@routes.on_repo("GET", "")
def card(call: Call) -> Response:
    repo = call.repo()
    html = ""
    with contextlib.suppress(HubError):
        sha = repo.head()
        text = repo.text(sha, "README.md")
        if text is not None:
            base = f"/{quote_path(repo.url_path)}"
            html = render_markdown(split_card(text)[1][:500_000], f"{base}/blob/main", f"{base}/resolve/main")
    return _repo_page(call, repo, "card.html", "card", card=html)


@routes.on_repo("GET", "/tree/{revision}/{path...}")
def files(call: Call) -> Response:
    repo, sha, path, folder = find_folder(call)
    items = []
    entries = sorted(repo.git.tree(folder.sha).items(), key=lambda e: (not e[1].is_tree, e[0]))
    for name, entry in entries[:_SHOWN]:
        item: dict[str, Any] = {"name": name, "path": f"{path}/{name}" if path else name, "folder": entry.is_tree}
        if not entry.is_tree:
            info = repo.blob_info(entry)
            stored = "git" if info.lfs is None else "Xet" if repo.lfs.xet_hash(info.lfs.oid) else "LFS"
            item |= {"size": info.size, "storage": stored}
        items.append(item)
    return _repo_page(
        call,
        repo,
        "files.html",
        "files",
        call["revision"],
        sha=sha,
        path=path,
        parent=path.rpartition("/")[0],
        items=items,
        more=max(0, len(entries) - _SHOWN),
        branches=list(repo.git.refs("heads"))[:50],
        tag_names=list(repo.git.refs("tags"))[:50],
    )


@routes.on_repo("GET", "/blob/{revision}/{path...}")
def blob(call: Call) -> Response:
    repo, _, path, entry, info = find_file(call)
    text = None
    if info.size <= 200_000 and info.lfs is None:
        with contextlib.suppress(UnicodeDecodeError):
            text = read_blob(repo, entry, 0, info.size).decode()
    oid = info.lfs.oid if info.lfs else None
    return _repo_page(call, repo, "blob.html", "files", call["revision"], path=path, size=info.size, oid=oid, text=text)


@routes.on_repo("GET", "/commits/{revision}")
def commits(call: Call) -> Response:
    repo = call.repo()
    found = list(islice(log(repo.git, repo.git.resolve(call["revision"])), 201))
    return _repo_page(
        call, repo, "commits.html", "commits", call["revision"], commits=found[:200], more=len(found) > 200
    )


@routes.on_repo("GET", "/commit/{revision}")
def commit(call: Call) -> Response:
    repo = call.repo()
    call.hub.registry.require_content(repo, call.caller)
    found = repo.git.commit(repo.git.resolve(call["revision"]))
    parent = repo.git.commit(found.parents[0]).tree if found.parents else None
    lines = unified_diff(repo.git, parent, found.tree).splitlines()
    return _repo_page(call, repo, "commit.html", "commits", commit=found, diff=lines[:2000], cut=len(lines) > 2000)


@routes.on_repo("GET", "/discussions")
def discussions(call: Call) -> Response:
    repo = call.repo()
    return _repo_page(call, repo, "discussions.html", "discussions", items=Board(repo).all()[:_SHOWN])


@routes.on_repo("GET", "/discussions/{number}")
def discussion(call: Call) -> Response:
    repo = call.repo()
    return _repo_page(call, repo, "discussion.html", "discussions", item=Board(repo).get(number_of(call)))


@routes.on("GET", "/collections/{owner}/{slug}")
def collection(call: Call) -> Response:
    from .collections import describe_collection

    return _page(call, "collection.html", item=describe_collection(call))
