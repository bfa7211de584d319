"""Repos as wholes: create, delete, move, list, info, settings, duplicate, like."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from starlette.responses import Response

from ..describe import describe_repo
from ..errors import HubError, bad_request
from ..http import Call, answer, paged, text_field
from ..repos import KINDS, Repo, RepoExists, check_name
from ..routing import Router

routes = Router()


def _kind_of(body: dict[str, Any]) -> str:
    kind = body.get("type")
    kind = "model" if kind is None else kind
    if not isinstance(kind, str) or f"{kind}s" not in KINDS:
        raise bad_request('"type" must be model, dataset, space or kernel')
    return f"{kind}s"


def _private(body: dict[str, Any], default: bool) -> bool:
    visibility = body.get("visibility")
    if visibility is not None:
        if visibility not in ("public", "private", "protected"):
            raise bad_request('"visibility" must be public, private or protected')
        return visibility != "public"
    private = body.get("private")
    if private is not None and not isinstance(private, bool):
        raise bad_request('"private" must be true or false')
    return default if private is None else private


def _url(call: Call, repo: Repo) -> str:
    return f"{call.base}/{repo.url_path}"


@routes.on("POST", "/api/repos/create")
def create(call: Call) -> Response:
    body = call.json()
    user = call.need_user()
    kind = _kind_of(body)
    name = text_field(body, "name", limit=300)
    namespace = body.get("organization") or user
    if "/" in name and body.get("organization") is None:
        namespace, _, name = name.partition("/")
    if not isinstance(namespace, str):
        raise bad_request('"organization" must be a string')
    extra: dict[str, Any] = {}
    if kind == "spaces":
        sdk = body.get("sdk")
        if sdk not in ("gradio", "streamlit", "docker", "static"):
            raise bad_request('"sdk" must be one of gradio, streamlit, docker, static')
        extra["sdk"] = sdk
    namespace = call.hub.registry.require_namespace(call.caller, namespace)
    org = call.hub.accounts.org(namespace)
    private = _private(body, bool(org and org.default_private))
    try:
        repo = call.hub.registry.create(kind, namespace, name, user, private, extra)
    except RepoExists as why:
        if not call.hub.registry.may_see(why.repo, call.caller):
            raise HubError(409, "You already created this repo") from None
        return answer(
            {
                "error": f"You already created this {kind[:-1]} repo",
                "url": _url(call, why.repo),
                "id": why.repo.meta["uid"],
                "name": why.repo.id,
            },
            409,
        )
    return answer({"url": _url(call, repo), "id": repo.meta["uid"], "name": repo.id})


def _require_admin(call: Call, repo: Repo) -> None:
    """Deleting, moving and settings are for write members of the namespace."""
    call.hub.registry.require_write(repo, call.caller)


@routes.on("DELETE", "/api/repos/delete")
def delete(call: Call) -> Response:
    body = call.json()
    name = text_field(body, "name", limit=300)
    namespace = body.get("organization") or (None if "/" in name else call.need_user())
    if namespace is not None and not isinstance(namespace, str):
        raise bad_request('"organization" must be a string')
    repo_id = f"{namespace}/{name}" if namespace else name
    repo = call.hub.registry.find(_kind_of(body), repo_id, call.caller)
    _require_admin(call, repo)
    call.hub.registry.delete(repo)
    return answer({"ok": True})


@routes.on("POST", "/api/repos/move")
def move(call: Call) -> Response:
    body = call.json()
    source = text_field(body, "fromRepo", limit=300)
    target = text_field(body, "toRepo", limit=300)
    call.need_user()
    if source.count("/") != 1 or target.count("/") != 1:
        raise bad_request("Both names must be of the form owner/name")
    repo = call.hub.registry.find(_kind_of(body), source, call.caller)
    _require_admin(call, repo)
    owner, name = target.split("/")
    owner = call.hub.registry.require_namespace(call.caller, owner)
    check_name(name)
    moved = call.hub.registry.move(repo, f"{owner}/{name}")
    return answer({"url": _url(call, moved), "name": moved.id})


@routes.on("POST", "/api/{kind}/{repo}/duplicate")
def duplicate(call: Call) -> Response:
    """A new repo with the files (not the history) of this one."""
    source = call.repo()
    call.hub.registry.require_content(source, call.caller)
    body = call.json()
    target = text_field(body, "repository", limit=300)
    if target.count("/") != 1:
        raise bad_request('"repository" must be of the form owner/name')
    owner, name = target.split("/")
    owner = call.hub.registry.require_namespace(call.caller, owner)
    user = call.need_user()
    extra = {"sdk": source.meta["sdk"]} if source.meta.get("sdk") else {}
    private = _private(body, source.private)
    try:
        repo = call.hub.registry.create(source.kind, owner, name, user, private, extra)
    except RepoExists as why:
        url = _url(call, why.repo) if call.hub.registry.may_see(why.repo, call.caller) else f"{call.base}/{target}"
        return answer({"error": "You already created this repo", "url": url}, 409)
    tree = source.git.commit(source.head()).tree
    with repo.lock:
        for _, entry in source.git.walk(tree):
            kind, data = source.git.read_object(entry.sha)
            repo.git.write_object(kind, data)
            if kind == "blob" and (pointer := source.blob_info(entry).lfs) is not None:
                repo.lfs.copy_from(source.lfs, pointer.oid)
        repo.git.write_object(*source.git.read_object(tree))
        sha = repo.git.write_commit(tree, [repo.head()], user, f"Duplicate from {source.id}")
        repo.git.set_ref("refs/heads/main", sha)
    return answer({"url": _url(call, repo), "id": repo.meta["uid"], "name": repo.id, "filesCopyPending": False})


def _list_param(call: Call, name: str) -> list[str]:
    values = call.query.getlist(name) + call.query.getlist(f"{name}[]")
    return [word for value in values for word in value.split(",") if word]


@routes.on("GET", "/api/{kind}")
def list_repos(call: Call) -> Any:
    """Search: `search` (in the id), `author`, `filter` (tags, all must be there), `sort`, `limit`, `full`."""
    repos = call.hub.registry.all(call.kind, call.caller)
    if author := call.query.get("author"):
        repos = [r for r in repos if r.owner.lower() == author.lower()]
    if search := call.query.get("search"):
        words = search.lower().split()
        repos = [r for r in repos if all(w in r.id.lower() for w in words)]
    wanted = [w.lower() for w in _list_param(call, "filter")]
    for name in ("pipeline_tag", "library"):
        wanted += [w.lower() for w in _list_param(call, name)]
    if wanted:
        repos = [r for r in repos if set(wanted) <= _tags(r)]
    if (gated := call.query.get("gated")) is not None:
        repos = [r for r in repos if bool(r.gated) == (gated.lower() == "true")]
    sort = call.query.get("sort", "trendingScore")
    keys = {
        "downloads": lambda r: r.meta.get("downloads", 0),
        "likes": lambda r: len(r.meta.get("likes", [])),
        "createdAt": lambda r: r.meta["created"],
        "created_at": lambda r: r.meta["created"],
    }
    repos.sort(
        key=keys.get(sort, lambda r: (r.last_modified(), r.meta["created"])), reverse=call.query.get("direction") != "1"
    )
    expand = _list_param(call, "expand")
    full = call.flag("full") or call.flag("cardData") or call.flag("config")
    limit = call.query.get("limit", "")
    size = min(int(limit), 10_000) if limit.isdigit() and len(limit) < 9 and int(limit) > 0 else 1000
    return paged(call, repos, size, describe=lambda rs: [describe_repo(r, expand=expand, full=full) for r in rs])


def _tags(repo: Repo) -> set[str]:
    with contextlib.suppress(HubError):
        sha = repo.head()
        data, _ = repo.card(sha)
        extra = [data.get("pipeline_tag"), data.get("library_name")]
        return {t.lower() for t in [*repo.tags(sha), *(e for e in extra if isinstance(e, str))]}
    return set()


@routes.on("GET", "/api/{kind}/{repo}")
@routes.on("GET", "/api/{kind}/{repo}/revision/{revision}")
def info(call: Call) -> Any:
    repo = call.repo()
    revision = call.params.get("revision")
    commit = repo.git.resolve(revision) if revision else None
    return describe_repo(
        repo,
        commit,
        expand=_list_param(call, "expand"),
        blobs=call.flag("blobs"),
        security=call.flag("securityStatus"),
    )


@routes.on("PUT", "/api/{kind}/{repo}/settings")
def settings(call: Call) -> Any:
    repo = call.repo()
    _require_admin(call, repo)
    body = call.json()
    with repo.lock:
        if "gated" in body:
            if body["gated"] not in ("auto", "manual", False):
                raise bad_request('"gated" must be "auto", "manual" or false')
            repo.meta["gated"] = body["gated"]
        repo.meta["private"] = _private(body, repo.private)
        repo.save()
    return {"private": repo.private, "gated": repo.gated, "visibility": "private" if repo.private else "public"}


@routes.on("GET", "/api/{kind}/{repo}/auth-check")
def auth_check(call: Call) -> Any:
    repo = call.repo()
    call.hub.registry.require_content(repo, call.caller)
    return {"ok": True}


@routes.on("GET", "/api/{kind}/{repo}/auth-check/write")
def auth_check_write(call: Call) -> Any:
    call.hub.registry.require_write(call.repo(), call.caller)
    return {"ok": True}


@routes.on("POST", "/api/{kind}/{repo}/like")
def like(call: Call) -> Any:
    repo = call.repo()
    user = call.need_user()
    with repo.lock:
        likes = dict(repo.meta.get("likes", []))
        likes.setdefault(user, time.time())
        repo.meta["likes"] = list(likes.items())
        repo.save()
    return {"ok": True}


@routes.on("DELETE", "/api/{kind}/{repo}/like")
def unlike(call: Call) -> Any:
    repo = call.repo()
    user = call.need_user()
    with repo.lock:
        repo.meta["likes"] = [item for item in repo.meta.get("likes", []) if item[0] != user]
        repo.save()
    return {"ok": True}


@routes.on("GET", "/api/{kind}/{repo}/likers")
def likers(call: Call) -> Any:
    return [
        {"user": u, "fullname": u, "type": "user", "isPro": False, "avatarUrl": ""}
        for u, _ in call.repo().meta.get("likes", [])
    ]
