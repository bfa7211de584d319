"""Rights as data: every route of the hub, who may use it, and what everybody else is told.

The routes come from the router. One that has no line in `TABLE` fails, and so does a line without a route.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from hubsae.localhub import Org, Token
from hubsae.localhub.repos import KINDS
from hubsae.localhub.routes import all_routes

from .conftest import Raw

# `lab` owns the repo. A writer is its admin, a reader the same person with a token that only reads, a member may read
# what is private, a stranger belongs to nothing, and someone pending has asked for access and waits.
CALLERS = {
    "anonymous": None,
    "stranger": "hf_eve",
    "pending": "hf_pat",
    "member": "hf_ann",
    "reader": "hf_local_read",
    "writer": "hf_local",
}
USERS = {"stranger": "eve", "pending": "pat", "member": "ann", "reader": "local", "writer": "local"}
STATES = ("public", "private", "gated")
INSIDE = {"member", "reader", "writer"}
EVERYONE = set(CALLERS)


def see(state: str) -> set[str]:
    return INSIDE if state == "private" else EVERYONE


def content(state: str) -> set[str]:
    return EVERYONE if state == "public" else INSIDE


def user(state: str) -> set[str]:
    """Anyone with a token who sees the repo."""
    return see(state) - {"anonymous"}


def propose(state: str) -> set[str]:
    """Anyone with a token that writes who may read the content."""
    return content(state) - {"anonymous", "reader"}


def write(state: str) -> set[str]:
    return {"writer"}


def anyone(state: str) -> set[str]:
    return EVERYONE


def known(state: str) -> set[str]:
    return EVERYONE - {"anonymous"}


def insiders(state: str) -> set[str]:
    return INSIDE


def nobody(state: str) -> set[str]:
    """Routes with keys of their own: signed urls, Xet tokens, the admin's token. No user's token opens them."""
    return set()


class Case(NamedTuple):
    """One way to use a route. `path` fills the pattern; `body` may depend on the caller's user name."""

    allowed: Callable[[str], set[str]]
    body: Any = None
    query: str = ""
    fill: Mapping[str, str] = MappingProxyType({})
    also: tuple[int, ...] = ()  # refusals that say something else than "you may not"
    refused: tuple[int, ...] = ()  # what those outside are told, where it is not 401, 403 and 404


BIG = b"\x00" * 2000
OID = hashlib.sha256(BIG).hexdigest()
HEADER = {"key": "header", "value": {"summary": "change"}}
FILE = {"key": "file", "value": {"path": "new.txt", "content": "new"}}
COMMIT = "\n".join(map(json.dumps, (HEADER, FILE))).encode()
PREUPLOAD = {"files": [{"path": "b", "size": 1, "sample": "YQ=="}]}
PULL = {"revision": "refs%2Fpr%2F1"}
REPO = {"name": "x", "organization": "lab", "type": "model"}
NEW = {"name": "by-local", "organization": "lab"}
ACCESS = {"user": "pat", "status": "accepted"}


def lfs(operation: str) -> dict[str, Any]:
    return {"operation": operation, "objects": [{"oid": OID, "size": len(BIG)}]}


TABLE: dict[str, tuple[Case, ...]] = {
    # the server itself
    "GET /_local/health": (Case(anyone),),
    "GET /_local/faults": (Case(nobody, refused=(403,)),),
    "GET /_local/requests": (Case(nobody, refused=(403,)),),
    "POST /_local/faults": (Case(nobody, {"path": "/", "status": 503}, refused=(403,)),),
    "POST /_local/xet": (Case(nobody, {"enabled": False}, refused=(403,)),),
    "DELETE /_local/faults": (Case(nobody, refused=(403,)),),
    # people
    "GET /api/whoami": (Case(known),),
    "GET /api/whoami-v2": (Case(known),),
    "GET /api/users/{user}/overview": (Case(anyone),),
    "GET /api/users/{user}/following": (Case(anyone),),
    "GET /api/users/{user}/followers": (Case(anyone),),
    "GET /api/users/{user}/likes": (Case(anyone),),
    "GET /api/organizations/{org}/overview": (Case(anyone),),
    "GET /api/organizations/{org}/members": (Case(anyone),),
    "GET /api/organizations/{org}/followers": (Case(anyone),),
    "GET /api/organizations/{org}/settings/repositories": (Case(insiders, refused=(403,)),),
    "GET /api/settings/repositories": (Case(known),),
    "POST /api/validate-yaml": (Case(anyone, {"content": "---\nlicense: mit\n---\n"}),),
    "POST /api/telemetry/{path...}": (Case(anyone, {}),),
    "HEAD /api/telemetry/{path...}": (Case(anyone),),
    "POST /v1/telemetry": (Case(anyone, {}),),
    # repos
    "POST /api/repos/create": (Case(write, NEW, refused=(403,)),),
    "DELETE /api/repos/delete": (Case(write, REPO),),
    "POST /api/repos/move": (Case(write, {"fromRepo": "lab/x", "toRepo": "lab/y", "type": "model"}),),
    "POST /api/{kind}/{repo}/duplicate": (Case(propose, lambda name: {"repository": f"{name}/copy"}),),
    "GET /api/{kind}": (Case(anyone),),
    "GET /api/{kind}/{repo}": (Case(see),),
    "GET /api/{kind}/{repo}/revision/{revision}": (Case(see),),
    "PUT /api/{kind}/{repo}/settings": (Case(write, {}),),
    "GET /api/{kind}/{repo}/auth-check": (Case(content),),
    "GET /api/{kind}/{repo}/auth-check/write": (Case(write),),
    "GET /api/{kind}/{repo}/likers": (Case(see),),
    "POST /api/{kind}/{repo}/like": (Case(user, {}),),
    "DELETE /api/{kind}/{repo}/like": (Case(user),),
    # what is in them: names for all who see the repo, content for those who may read it
    "GET /api/{kind}/{repo}/tree/{revision}/{path...}": (Case(see, fill={"path...": ""}),),
    "POST /api/{kind}/{repo}/paths-info/{revision}": (Case(see, {"paths": ["a.txt"]}),),
    "GET /api/{kind}/{repo}/commits/{revision}": (Case(see),),
    "GET /api/{kind}/{repo}/commit/{revision}": (Case(see),),
    "GET /api/{kind}/{repo}/refs": (Case(see),),
    "GET /api/{kind}/{repo}/compare/{change}": (Case(content),),
    "GET /{repo}/resolve/{revision}/{path...}": (Case(content), Case(content, fill={"path...": "big.bin"})),
    "GET /{repo}/raw/{revision}/{path...}": (Case(content),),
    "GET /{repo}/features": (Case(content, also=(404,)),),
    "GET /storage/site/{word}/{repo}/resolve/{revision}/{path...}": (Case(nobody, refused=(403,)),),
    "GET /api/resolve-cache/{kind}/{repo}/{revision}/{path...}": (Case(content),),
    "GET /api/{kind}/{repo}/safetensors-metadata/{path...}": (Case(content, also=(400,)),),
    "GET /api/{kind}/{repo}/xet-read-token/{revision}": (Case(content),),
    # changing them
    "POST /api/{kind}/{repo}/preupload/{revision}": (
        Case(write, PREUPLOAD),
        Case(propose, PREUPLOAD, "?create_pr=1"),
        Case(propose, PREUPLOAD, fill=PULL),
    ),
    "POST /api/{kind}/{repo}/commit/{revision}": (
        Case(write, COMMIT),
        Case(propose, COMMIT, "?create_pr=1"),
        Case(propose, COMMIT, fill=PULL),
    ),
    "GET /api/{kind}/{repo}/xet-write-token/{revision}": (Case(write), Case(propose, None, "?create_pr=1")),
    "GET /api/{kind}/{repo}/lfs-files": (Case(write),),
    "POST /api/{kind}/{repo}/lfs-files/batch": (Case(write, {"deletions": {"sha": []}}),),
    "POST /api/{kind}/{repo}/lfs-files/duplicate": (
        Case(propose, {"target": {"type": "model", "name": "lab/x"}, "files": [{"sha256": OID}]}),
    ),
    "POST /{repo}.git/info/lfs/objects/batch": (Case(content, lfs("download")), Case(propose, lfs("upload"))),
    "POST /{repo}.git/info/lfs/verify": (Case(propose, {"oid": OID, "size": len(BIG)}),),
    "POST /api/{kind}/{repo}/branch/{branch}": (Case(write, {}, fill={"branch": "new"}),),
    "DELETE /api/{kind}/{repo}/branch/{branch}": (Case(write),),
    "POST /api/{kind}/{repo}/tag/{revision}": (Case(write, {"tag": "new"}),),
    "DELETE /api/{kind}/{repo}/tag/{tag}": (Case(write),),
    "POST /api/{kind}/{repo}/super-squash/{revision}": (Case(write, {}),),
    # talking about them
    "GET /api/{kind}/{repo}/discussions": (Case(see),),
    "GET /api/{kind}/{repo}/discussions/{number}": (Case(see), Case(content, None, "?diff=1")),
    "POST /api/{kind}/{repo}/discussions": (Case(propose, {"title": "A question", "description": ""}),),
    "POST /api/{kind}/{repo}/discussions/{number}/comment": (Case(propose, {"comment": "yes"}),),
    "POST /api/{kind}/{repo}/discussions/{number}/title": (Case(write, {"title": "Another"}),),
    "POST /api/{kind}/{repo}/discussions/{number}/status": (Case(write, {"status": "closed"}),),
    "POST /api/{kind}/{repo}/discussions/{number}/merge": (Case(write, {}),),
    "POST /api/{kind}/{repo}/discussions/{number}/comment/{event}/edit": (Case(write, {"content": "no"}),),
    "POST /api/{kind}/{repo}/discussions/{number}/comment/{event}/hide": (Case(write, {}),),
    "POST /{repo}/ask-access": (Case(user, {}, also=(400,)),),
    "GET /api/{kind}/{repo}/user-access-request/{status}": (Case(write, also=(400,)),),
    "POST /api/{kind}/{repo}/user-access-request/handle": (Case(write, ACCESS, also=(400,)),),
    "POST /api/{kind}/{repo}/user-access-request/grant": (Case(write, {"user": "pat"}, also=(400,)),),
    # collections: a private one does not exist for others
    "GET /api/collections": (Case(anyone),),
    "POST /api/collections": (Case(write, {"title": "New", "namespace": "lab"}, refused=(403,)),),
    "GET /api/collections/{owner}/{slug}": (Case(see, refused=(404,)),),
    "PATCH /api/collections/{owner}/{slug}": (Case(write, {"theme": "red"}),),
    "DELETE /api/collections/{owner}/{slug}": (Case(write),),
    "POST /api/collections/{owner}/{slug}/items": (Case(write, {"item": {"type": "paper", "id": "1234.56789"}}),),
    "PATCH /api/collections/{owner}/{slug}/items/{item}": (Case(write, {"note": "good"}),),
    "DELETE /api/collections/{owner}/{slug}/items/{item}": (Case(write),),
    # keys of their own
    "GET /storage/get/{word}": (Case(nobody, refused=(403,)),),
    "GET /storage/xorb/{word}": (Case(nobody, refused=(403,)),),
    "PUT /storage/put/{word}": (Case(nobody, b"x", refused=(400, 403)),),
    "PUT /storage/part/{word}": (Case(nobody, b"x", refused=(400, 403)),),
    "POST /storage/complete/{word}": (Case(nobody, {}, refused=(403,)),),
    "GET /xet/{data}/reconstructions/{hash}": (Case(nobody, refused=(401,)),),
    "GET /xet/{data}/v1/reconstructions/{hash}": (Case(nobody, refused=(401,)),),
    "POST /xet/{data}/v1/xorbs/{prefix}/{hash}": (Case(nobody, b"x", refused=(401,)),),
    "POST /xet/{data}/shards": (Case(nobody, b"x", refused=(401,)),),
    "POST /xet/{data}/v1/shards": (Case(nobody, b"x", refused=(401,)),),
    # pages
    "GET /": (Case(anyone),),
    "GET /login": (Case(known),),
    "GET /{repo}": (Case(see),),
    "GET /{repo}/tree/{revision}/{path...}": (Case(see, fill={"path...": ""}),),
    "GET /{repo}/blob/{revision}/{path...}": (Case(content),),
    "GET /{repo}/commits/{revision}": (Case(see),),
    "GET /{repo}/commit/{revision}": (Case(content),),
    "GET /{repo}/discussions": (Case(see),),
    "GET /{repo}/discussions/{number}": (Case(see),),
    "GET /collections/{owner}/{slug}": (Case(see, refused=(404,)),),
}


def routes() -> Iterator[str]:
    """Every route once, whatever the kind of repo."""
    for method, table in all_routes().routes.items():
        for route in table:
            pieces = route.pieces[1:] if dict(route.fixed).get("kind") in KINDS[1:] else route.pieces
            yield f"{method} /{'/'.join(pieces)}"


def test_every_route_says_who_may_use_it():
    assert set(routes()) == set(TABLE)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Iterator[Raw]:
    from hubsae.localhub import running

    tokens = tuple(Token(name, f"hf_{name}") for name in ("local", "eve", "ann", "pat"))
    tokens += (Token("local", "hf_local_read", "read"),)
    orgs = (Org("lab", {"local": "admin", "ann": "read"}),)
    with running(tmp_path_factory.mktemp("hub"), tokens=tokens, orgs=orgs) as hub:
        yield Raw(hub)


@pytest.fixture(scope="module")
def prepared() -> dict[str, str]:
    """What `prepare` made last, for the routes that only read."""
    return {}


def prepare(raw: Raw, state: str) -> dict[str, str]:
    """A fresh `lab/x` with everything that a route can name; how to fill the patterns."""
    for name in ("x", "y", "by-local"):
        raw("DELETE", "/api/repos/delete", {**REPO, "name": name})
    for token, name in (("hf_eve", "eve"), ("hf_ann", "ann"), ("hf_pat", "pat"), ("hf_local", "local")):
        raw("DELETE", "/api/repos/delete", {"name": "copy", "organization": name, "type": "model"}, token=token)
    for item in raw("GET", "/api/collections?limit=100").json:
        raw("DELETE", f"/api/collections/{item['slug']}")
    assert raw.create("lab/x", private=state == "private").status == 200
    raw.commit({"a.txt": b"very secret"}, "models/lab/x")
    raw.commit_lfs("big.bin", BIG, "lab/x")
    assert raw.commit({"p.txt": b"1"}, "models/lab/x", query="?create_pr=1").status == 200
    raw("POST", "/api/models/lab/x/branch/b", {})
    raw("POST", "/api/models/lab/x/tag/main", {"tag": "t"})
    if state == "gated":
        raw("PUT", "/api/models/lab/x/settings", {"gated": "manual"})
        assert raw("POST", "/lab/x/ask-access", {}, token="hf_pat").json == {"status": "pending"}
    comment = raw("GET", "/api/models/lab/x/discussions/1").json["events"][0]["id"]
    made = raw("POST", "/api/collections", {"title": "C", "namespace": "lab", "private": state == "private"}).json
    item = raw("POST", f"/api/collections/{made['slug']}/items", {"item": {"type": "paper", "id": "1111.11111"}}).json
    return {
        "repo": "lab/x",
        "kind": "models",
        "revision": "main",
        "path...": "a.txt",
        "change": "main..main",
        "branch": "b",
        "tag": "t",
        "number": "1",
        "event": comment,
        "status": "pending",
        "user": "local",
        "org": "lab",
        "owner": "lab",
        "slug": made["slug"].split("/")[1],
        "item": item["items"][0]["_id"],
        "word": "e30.x",
        "data": raw.hub.hub.data_id,
        "hash": "0" * 64,
        "prefix": "default",
    }


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("route", sorted(TABLE, key=lambda route: not route.startswith(("GET", "HEAD"))))
def test_a_route_serves_those_it_is_for_and_nobody_else(raw, prepared, route, state):
    method, pattern = route.split(" ")
    for case in TABLE[route]:
        if prepared.get("state") != state or method not in ("GET", "HEAD"):  # reading leaves everything as it was
            prepared.update(prepare(raw, state), state=state)
        path = pattern
        for name, value in {**prepared, **case.fill}.items():
            path = path.replace("{" + name + "}", value)
        assert "{" not in path
        for caller, token in CALLERS.items():  # the writer comes last: what is deleted is gone
            name = USERS.get(caller, "")
            body = case.body(name) if callable(case.body) else case.body
            got = raw(method, path.rstrip("/") + case.query, body, token=token or False)
            where = (caller, got.status, got.body[:200])
            if caller in case.allowed(state):
                assert got.status < 400 or got.status in case.also, where
                continue
            invisible = caller != "anonymous" and caller not in see(state)
            usual = (401,) if caller == "anonymous" else (404,) if invisible else (403,)
            if caller == "anonymous" and case.refused == (403,) and case.allowed is not nobody:
                assert got.status in (401, 403), where
            else:
                assert got.status in (case.refused or usual), where
            assert b"secret" not in got.body, where
