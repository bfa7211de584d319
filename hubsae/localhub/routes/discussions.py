"""Discussions and pull requests over HTTP; what they are is in `..discussions`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..discussions import Board, event_view
from ..errors import HubError, bad_request
from ..http import Call, text_field
from ..repos import Repo, iso
from ..routing import Router
from .commits import may_contribute

routes = Router()
PAGE = 10


def number_of(call: Call) -> int:
    """The number in the url."""
    text = call["number"]
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise HubError(404, f"Discussion {text[:40]!r} not found")
    return int(text)


@routes.on("GET", "/api/{kind}/{repo}/discussions")
def list_discussions(call: Call) -> Any:
    repo = call.repo()
    board = Board(repo)
    items = board.all()
    if author := call.query.get("author"):
        items = [i for i in items if i["author"].lower() == author.lower()]
    kind = call.query.get("type", "all")
    if kind in ("pull_request", "discussion"):
        items = [i for i in items if i["pull_request"] == (kind == "pull_request")]
    status = call.query.get("status", "all")
    if status == "open":
        items = [i for i in items if i["status"] in ("open", "draft")]
    elif status == "closed":
        items = [i for i in items if i["status"] in ("closed", "merged")]
    page = call.query.get("p", "0")
    start = (int(page) if page.isdigit() and len(page) < 6 else 0) * PAGE
    lines = [board.summary(i) for i in items[start : start + PAGE]]
    return {"discussions": lines, "count": len(items), "start": start, "numClosedDiscussions": 0}


@routes.on("POST", "/api/{kind}/{repo}/discussions")
def create(call: Call) -> Any:
    repo = call.repo()
    author = may_contribute(call, repo)
    body = call.json()
    pull_request = body.get("pullRequest", False)
    if not isinstance(pull_request, bool):
        raise bad_request('"pullRequest" must be true or false')
    board = Board(repo)
    title = text_field(body, "title", limit=10_000)
    item = board.open(author, title, text_field(body, "description", ""), pull_request)
    return {**board.summary(item), "url": f"{call.base}/{repo.url_path}/discussions/{item['num']}"}


@routes.on("GET", "/api/{kind}/{repo}/discussions/{number}")
def details(call: Call) -> Any:
    repo = call.repo()
    diff = call.flag("diff")
    if diff:
        call.hub.registry.require_content(repo, call.caller)
    board = Board(repo)
    return board.details(board.get(number_of(call)), diff)


@contextmanager
def _change(call: Call) -> Iterator[tuple[Repo, Board, dict[str, Any], str]]:
    """Repo, board, the discussion of the url and who changes it, while nobody else writes."""
    repo = call.repo()
    author = may_contribute(call, repo)
    board = Board(repo)
    with repo.lock:
        yield repo, board, board.get(number_of(call)), author


def _owner_or_author(call: Call, repo: Repo, item: dict[str, Any], author: str) -> None:
    if item["author"] != author and not call.hub.registry.may_write(repo, call.caller):
        raise HubError(403, "Only the author or someone with write access to the repository may do this")


@routes.on("POST", "/api/{kind}/{repo}/discussions/{number}/comment")
def comment(call: Call) -> Any:
    with _change(call) as (_, board, item, author):
        return {"newMessage": event_view(board.comment(item, author, text_field(call.json(), "comment")))}


@routes.on("POST", "/api/{kind}/{repo}/discussions/{number}/title")
def retitle(call: Call) -> Any:
    with _change(call) as (repo, board, item, author):
        _owner_or_author(call, repo, item, author)
        return {"newTitle": event_view(board.retitle(item, author, text_field(call.json(), "title")))}


@routes.on("POST", "/api/{kind}/{repo}/discussions/{number}/status")
def status(call: Call) -> Any:
    with _change(call) as (repo, board, item, author):
        _owner_or_author(call, repo, item, author)
        body = call.json()
        event = board.set_status(item, author, text_field(body, "status"), text_field(body, "comment", ""))
        return {"newStatus": event_view(event)}


@routes.on("POST", "/api/{kind}/{repo}/discussions/{number}/merge")
def merge(call: Call) -> Any:
    with _change(call) as (repo, board, item, author):
        call.hub.registry.require_write(repo, call.caller)
        board.merge(item, author, text_field(call.json(), "comment", ""))
        return {"newStatus": "merged", "mergeCommitId": item["merge_commit"]}


@routes.on("POST", "/api/{kind}/{repo}/discussions/{number}/comment/{event}/edit")
def edit_comment(call: Call) -> Any:
    with _change(call) as (_, board, item, author):
        text = text_field(call.json(), "content")
        event = board.find_comment(item, call["event"])
        if event["author"] != author:
            raise HubError(403, "Only the author of a comment may edit it")
        if event["data"]["hidden"]:
            raise HubError(403, "A hidden comment cannot be edited")
        data = event["data"]
        data["edited"] = True
        data["numEdits"] = data.get("numEdits", 0) + 1
        data["latest"] = {**data["latest"], "raw": text, "updatedAt": iso(time.time())}
        board.save(item)
        return {"updatedComment": event_view(event)}


@routes.on("POST", "/api/{kind}/{repo}/discussions/{number}/comment/{event}/hide")
def hide_comment(call: Call) -> Any:
    with _change(call) as (repo, board, item, author):
        event = board.find_comment(item, call["event"])
        _owner_or_author(call, repo, event, author)
        data = event["data"]
        data["hidden"] = True
        data["hiddenBy"] = author
        data["latest"] = {**data["latest"], "raw": "This comment has been hidden"}
        board.save(item)
        return {"updatedComment": event_view(event)}
