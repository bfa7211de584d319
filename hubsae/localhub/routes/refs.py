"""Branches, tags, and squashing a branch's history into one commit."""

from __future__ import annotations

import re
from typing import Any

from ..errors import HubError, bad_request, revision_not_found
from ..gitstore import is_ref_name
from ..http import Call, text_field
from ..repos import Repo
from ..routing import Router

routes = Router()


def _writable(call: Call) -> Repo:
    repo = call.repo()
    call.hub.registry.require_write(repo, call.caller)
    return repo


@routes.on("POST", "/api/{kind}/{repo}/branch/{branch}")
def create_branch(call: Call) -> Any:
    """`startingPoint` (default main) may be any revision; `emptyBranch` starts without history."""
    repo = _writable(call)
    name = call["branch"]
    body = call.json()
    if not is_ref_name(name) or name.startswith("refs/") or re.fullmatch(r"[0-9a-f]{40}", name):
        raise bad_request(f"Invalid branch name: {name!r}")
    start = body.get("startingPoint") or "main"
    if not isinstance(start, str):
        raise bad_request('"startingPoint" must be a string')
    with repo.lock:
        if repo.git.ref(f"refs/heads/{name}") is not None:
            if body.get("overwrite"):
                repo.git.set_ref(f"refs/heads/{name}", repo.git.resolve(start))
                return {"ok": True}
            raise HubError(409, f"Reference refs/heads/{name} already exists")
        if body.get("emptyBranch"):
            tree = repo.git.write_tree({})
            sha = repo.git.write_commit(tree, [], call.need_user(), "initial commit")
        else:
            sha = repo.git.resolve(start)
        repo.git.set_ref(f"refs/heads/{name}", sha)
    return {"ok": True}


@routes.on("DELETE", "/api/{kind}/{repo}/branch/{branch}")
def delete_branch(call: Call) -> Any:
    repo = _writable(call)
    name = call["branch"]
    if name in ("main", "refs/heads/main"):
        raise HubError(403, "Cannot delete refs/heads/main")
    with repo.lock:
        if not is_ref_name(name) or repo.git.ref(f"refs/heads/{name}") is None:
            raise revision_not_found(name)
        repo.git.delete_ref(f"refs/heads/{name}")
    return {"ok": True}


@routes.on("POST", "/api/{kind}/{repo}/tag/{revision}")
def create_tag(call: Call) -> Any:
    repo = _writable(call)
    body = call.json()
    name = text_field(body, "tag", limit=300)
    message = body.get("message")
    if message is not None and not isinstance(message, str):
        raise bad_request('"message" must be a string')
    with repo.lock:
        commit = repo.git.resolve(call["revision"])
        if not is_ref_name(name):
            raise bad_request(f"Invalid tag name: {name!r}")
        if repo.git.ref(f"refs/tags/{name}") is not None:
            raise HubError(409, f"Tag {name} already exists: reference refs/tags/{name} already exists")
        target = repo.git.write_tag(name, commit, call.need_user(), message) if message else commit
        repo.git.set_ref(f"refs/tags/{name}", target)
    return {"ok": True}


@routes.on("DELETE", "/api/{kind}/{repo}/tag/{tag}")
def delete_tag(call: Call) -> Any:
    repo = _writable(call)
    name = call["tag"]
    with repo.lock:
        if not is_ref_name(name) or repo.git.ref(f"refs/tags/{name}") is None:
            raise HubError(404, f"Tag {name} does not exist", code="RevisionNotFound")
        repo.git.delete_ref(f"refs/tags/{name}")
    return {"ok": True}


@routes.on("POST", "/api/{kind}/{repo}/super-squash/{revision}")
def super_squash(call: Call) -> Any:
    """Replace the history of a branch (or any ref) by one commit with the same files."""
    repo = _writable(call)
    name = call["revision"]
    message = text_field(call.json(), "message", f"Super-squash branch '{name}' using huggingface_hub")
    ref = name if name.startswith("refs/") else f"refs/heads/{name}"
    with repo.lock:
        sha = repo.git.ref(ref) if is_ref_name(ref) else None
        if sha is None:
            raise HubError(404, f"Invalid rev id: {name}", code="RevisionNotFound")
        tree = repo.git.commit(repo.git.peel(sha)).tree
        repo.git.set_ref(ref, repo.git.write_commit(tree, [], call.need_user(), message or "Super-squash"))
    return {"ok": True}
