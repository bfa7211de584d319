"""Collections: a titled list of repos with notes. One JSON file each under `<root>/collections`."""

from __future__ import annotations

import re
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from starlette.responses import Response

from ..errors import HubError, bad_request
from ..files import read_json
from ..http import Call, answer, paged, text_field
from ..repos import iso
from ..routing import Router

routes = Router()
_lock = threading.RLock()
_TYPES = ("model", "dataset", "space", "paper", "collection")


def _folder(call: Call) -> Path:
    return call.hub.root / "collections"


def _save(call: Call, item: dict[str, Any]) -> None:
    item["updated"] = time.time()
    call.hub.disk.write_json(_folder(call) / f"{item['id']}.json", item)


def _visible(call: Call, item: dict[str, Any]) -> bool:
    return not item["private"] or call.hub.accounts.may_read_all(call.caller, item["owner"])


def _find(call: Call) -> dict[str, Any]:
    """By slug; only its last 24 digits count, so a renamed collection keeps its old url."""
    found = re.search(r"([0-9a-f]{24})$", call["slug"])
    item = read_json(_folder(call) / f"{found[1]}.json") if found else None
    if item is None or item["owner"].lower() != call["owner"].lower() or not _visible(call, item):
        raise HubError(404, "Collection not found")
    return item


def _slug(item: dict[str, Any]) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", item["title"].lower()).strip("-")[:60]
    return f"{item['owner']}/{words + '-' if words else ''}{item['id']}"


def _view(call: Call, item: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    items = []
    for position, line in enumerate(item["items"]):
        if not _item_visible(call, line):
            continue
        view = {
            "_id": line["_id"],
            "id": line["id"],
            "type": line["type"],
            "position": position,
            "repoType": line["type"],
        }
        if line.get("note"):
            view["note"] = {"text": line["note"], "html": ""}
        if line["type"] == "collection":
            view["slug"] = line["id"]
        items.append(view)
    return {
        "slug": _slug(item),
        "title": item["title"],
        "description": item["description"],
        "owner": {"name": item["owner"], "type": "org" if call.hub.accounts.org(item["owner"]) else "user"},
        "items": items[:limit],
        "lastUpdated": iso(item["updated"]),
        "position": item["position"],
        "private": item["private"],
        "theme": item["theme"],
        "upvotes": 0,
        "gating": False,
        "url": f"{call.base}/collections/{_slug(item)}",
    }


def _item_visible(call: Call, line: dict[str, Any]) -> bool:
    """Repos the caller may not see, and deleted ones, are left out."""
    if line["type"] not in ("model", "dataset", "space"):
        return True
    try:
        call.hub.registry.find(f"{line['type']}s", line["id"], call.caller)
        return True
    except HubError:
        return False


@routes.on("GET", "/api/collections")
def list_collections(call: Call) -> Any:
    items = [item for path in _folder(call).glob("*.json") if (item := read_json(path)) and _visible(call, item)]
    owners = {o.lower() for o in call.query.getlist("owner")}
    if owners:
        items = [i for i in items if i["owner"].lower() in owners]
    if wanted := call.query.getlist("item"):
        pairs = [w.strip("/").split("/", 1) for w in wanted]
        items = [
            i for i in items if any(l["type"] + "s" == p[0] and l["id"] == p[-1] for l in i["items"] for p in pairs)
        ]
    if query := call.query.get("q"):
        items = [i for i in items if query.lower() in i["title"].lower()]
    items.sort(key=lambda i: i["updated"], reverse=True)
    limit = call.query.get("limit", "")
    size = int(limit) if limit.isdigit() and 0 < int(limit[:6]) <= 100 else 20
    return paged(call, items, size, describe=lambda page: [_view(call, i, 4) for i in page])


@routes.on("POST", "/api/collections")
def create(call: Call) -> Response:
    user = call.need_user()
    body = call.json()
    owner = call.hub.registry.require_namespace(call.caller, text_field(body, "namespace", user))
    title = text_field(body, "title", limit=10_000).strip()
    if not 1 <= len(title) <= 60:
        raise bad_request('"title" must be 1 to 60 characters long')
    item: dict[str, Any] = {
        "id": secrets.token_hex(12),
        "owner": owner,
        "title": title,
        "description": _description(body),
        "private": _flag(body, "private", False),
        "theme": "green",
        "position": 0,
        "items": [],
    }
    with _lock:
        for path in _folder(call).glob("*.json"):
            other = read_json(path)
            if other and other["owner"] == owner and other["title"] == title:
                return answer({"error": "A collection with this title exists already", "slug": _slug(other)}, 409)
        _save(call, item)
    return answer(_view(call, item))


def _description(body: dict[str, Any]) -> str | None:
    if body.get("description") is None:
        return None
    text = text_field(body, "description", limit=10_000)
    if len(text) > 150:
        raise bad_request('"description" must be at most 150 characters long')
    return text


def _flag(body: dict[str, Any], name: str, default: bool) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise bad_request(f'"{name}" must be true or false')
    return value


@routes.on("GET", "/api/collections/{owner}/{slug}")
def describe_collection(call: Call) -> Any:
    """One collection, without the items the caller may not see."""
    return _view(call, _find(call))


def _writable(call: Call) -> dict[str, Any]:
    call.need_user()
    item = _find(call)
    if not call.hub.accounts.may_write(call.caller, item["owner"]):
        raise HubError(403, "You may not change this collection")
    return item


@routes.on("PATCH", "/api/collections/{owner}/{slug}")
def update(call: Call) -> Any:
    body = call.json()
    with _lock:
        item = _writable(call)
        if "title" in body:
            title = text_field(body, "title", limit=10_000).strip()
            if not 1 <= len(title) <= 60:
                raise bad_request('"title" must be 1 to 60 characters long')
            item["title"] = title
        if "description" in body:
            item["description"] = _description(body)
        item["private"] = _flag(body, "private", item["private"])
        if "theme" in body:
            item["theme"] = text_field(body, "theme", limit=40)
        if isinstance(body.get("position"), int):
            item["position"] = body["position"]
        _save(call, item)
        return {"success": True, "data": _view(call, item)}


@routes.on("DELETE", "/api/collections/{owner}/{slug}")
def delete(call: Call) -> Any:
    with _lock:
        item = _writable(call)
        (_folder(call) / f"{item['id']}.json").unlink(missing_ok=True)
    return {"success": True}


@routes.on("POST", "/api/collections/{owner}/{slug}/items")
def add_item(call: Call) -> Response:
    body = call.json()
    wanted = body.get("item")
    if not isinstance(wanted, dict):
        raise bad_request('"item" must be an object with "id" and "type"')
    kind, name = text_field(wanted, "type", limit=40), text_field(wanted, "id", limit=300)
    if kind not in _TYPES:
        raise bad_request(f'"type" must be one of {", ".join(_TYPES)}')
    note = body.get("note")
    if note is not None and len(text_field(body, "note", limit=10_000)) > 500:
        raise bad_request('"note" must be at most 500 characters long')
    if kind in ("model", "dataset", "space"):
        name = call.hub.registry.find(f"{kind}s", name, call.caller).id
    with _lock:
        item = _writable(call)
        if any(line["type"] == kind and line["id"] == name for line in item["items"]):
            return answer({"error": "The item is in this collection already"}, 409)
        item["items"].append({"_id": secrets.token_hex(12), "type": kind, "id": name, "note": note})
        _save(call, item)
        return answer(_view(call, item))


def _line(call: Call, item: dict[str, Any]) -> dict[str, Any]:
    for line in item["items"]:
        if line["_id"] == call["item"]:
            return line
    raise HubError(404, "The collection has no such item")


@routes.on("PATCH", "/api/collections/{owner}/{slug}/items/{item}")
def update_item(call: Call) -> Any:
    body = call.json()
    with _lock:
        item = _writable(call)
        line = _line(call, item)
        if body.get("note") is not None:
            note = text_field(body, "note", limit=10_000)
            if len(note) > 500:
                raise bad_request('"note" must be at most 500 characters long')
            line["note"] = note
        if isinstance(position := body.get("position"), int) and 0 <= position < len(item["items"]):
            item["items"].remove(line)
            item["items"].insert(position, line)
        _save(call, item)
        return {"success": True}


@routes.on("DELETE", "/api/collections/{owner}/{slug}/items/{item}")
def delete_item(call: Call) -> Any:
    with _lock:
        item = _writable(call)
        item["items"].remove(_line(call, item))
        _save(call, item)
        return {"success": True}
