"""Gated repos: asking for access, and deciding about it."""

from __future__ import annotations

import secrets
import time
from typing import Any

from starlette.responses import Response

from ..errors import HubError, bad_request
from ..files import read_json
from ..http import Call, answer
from ..repos import Repo, iso
from ..routing import Router

routes = Router()


def _load(repo: Repo) -> dict[str, dict[str, Any]]:
    return read_json(repo.path / "hub" / "access.json") or {}


def _save(repo: Repo, table: dict[str, dict[str, Any]]) -> None:
    repo.disk.write_json(repo.path / "hub" / "access.json", table)


def _line(user: str, status: str, **more: Any) -> dict[str, Any]:
    return {"id": secrets.token_hex(12), "status": status, "time": time.time(), "user": user, **more}


@routes.on_repo("POST", "/ask-access")
def ask(call: Call) -> Response:
    """The button of a gated repo's page. Gated `auto` grants at once, `manual` waits for the owner."""
    repo = call.repo()
    user = call.need_user()
    if not repo.gated:
        raise bad_request("This repository is not gated")
    with repo.lock:
        table = _load(repo)
        table.setdefault(user, _line(user, "accepted" if repo.gated == "auto" else "pending"))
        _save(repo, table)
        return answer({"status": table[user]["status"]})


def _gated(call: Call) -> Repo:
    repo = call.repo()
    call.hub.registry.require_write(repo, call.caller)
    if not repo.gated:
        raise bad_request("This repository is not gated")
    return repo


@routes.on("GET", "/api/{kind}/{repo}/user-access-request/{status}")
def requests(call: Call) -> Any:
    repo = _gated(call)
    if call["status"] not in ("pending", "accepted", "rejected"):
        raise bad_request("The status must be pending, accepted or rejected")
    return [
        {
            "requestId": item["id"],
            "user": {"_id": item["id"], "user": name, "fullname": name, "email": None},
            "status": item["status"],
            "timestamp": iso(item["time"]),
            "fields": item.get("fields"),
            "grantedBy": item.get("granted_by"),
        }
        for name, item in sorted(_load(repo).items(), key=lambda pair: -pair[1]["time"])
        if item["status"] == call["status"]
    ]


def _user(call: Call, table: dict[str, dict[str, Any]]) -> str:
    body = call.json()
    wanted = body.get("requestId")
    name = body.get("user")
    if isinstance(wanted, str):
        name = next((n for n, item in table.items() if item["id"] == wanted), None)
    canonical = call.hub.accounts.canonical(name) if isinstance(name, str) else None
    if canonical is None or call.hub.accounts.org(canonical):
        raise HubError(404, "This user does not exist on the hub")
    return canonical


@routes.on("POST", "/api/{kind}/{repo}/user-access-request/handle")
def handle(call: Call) -> Any:
    repo = _gated(call)
    status = call.json().get("status")
    if status not in ("pending", "accepted", "rejected"):
        raise bad_request('"status" must be pending, accepted or rejected')
    with repo.lock:
        table = _load(repo)
        user = _user(call, table)
        if user not in table:
            raise HubError(404, "This user has not asked for access")
        if table[user]["status"] == status:
            raise HubError(404, f"The request is {status} already")
        table[user]["status"] = status
        if reason := call.json().get("rejectionReason"):
            table[user]["reason"] = str(reason)[:1000]
        _save(repo, table)
    return {"ok": True}


@routes.on("POST", "/api/{kind}/{repo}/user-access-request/grant")
def grant(call: Call) -> Any:
    repo = _gated(call)
    with repo.lock:
        table = _load(repo)
        user = _user(call, table)
        if table.get(user, {}).get("status") == "accepted":
            raise bad_request("This user has access already")
        table[user] = {**table.get(user, _line(user, "accepted")), "status": "accepted", "granted_by": call.caller.name}
        _save(repo, table)
    return {"ok": True}
