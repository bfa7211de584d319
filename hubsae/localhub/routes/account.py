"""Who am I, who are others, and small calls that belong to no repo (card validation, telemetry)."""

from __future__ import annotations

import hashlib
from typing import Any

from starlette.responses import PlainTextResponse, Response

from ..cards import check_card
from ..describe import used_storage
from ..errors import HubError, bad_request
from ..http import Call, answer, text_field
from ..repos import KINDS, iso
from ..routing import Router

routes = Router()


def _uid(name: str) -> str:
    return hashlib.sha256(name.lower().encode()).hexdigest()[:24]


@routes.on("GET", "/api/whoami-v2")
@routes.on("GET", "/api/whoami")
def whoami(call: Call) -> dict[str, Any]:
    name = call.need_user()
    orgs = [
        {
            "type": "org",
            "id": _uid(org.name),
            "name": org.name,
            "fullname": org.full_name or org.name,
            "email": None,
            "isEnterprise": False,
            "avatarUrl": "",
            "roleInOrg": org.members[name],
        }
        for org in call.hub.accounts.orgs.values()
        if name in org.members
    ]
    return {
        "type": "user",
        "id": _uid(name),
        "name": name,
        "fullname": call.hub.accounts.full_name(name),
        "email": f"{name}@users.noreply.local-hub",
        "emailVerified": True,
        "isPro": False,
        "canPay": False,
        "periodEnd": None,
        "avatarUrl": "",
        "orgs": orgs,
        "auth": {
            "type": "access_token",
            "accessToken": {"displayName": f"{name}-{call.caller.role}", "role": call.caller.role, "createdAt": iso(0)},
        },
    }


@routes.on("GET", "/api/users/{user}/overview")
def user_overview(call: Call) -> dict[str, Any]:
    name = _person(call)
    counts = {kind: sum(r.owner == name for r in call.hub.registry.all(kind, call.caller)) for kind in KINDS}
    orgs = [
        {"name": o.name, "fullname": o.name, "avatarUrl": ""}
        for o in call.hub.accounts.orgs.values()
        if name in o.members
    ]
    return {
        "_id": _uid(name),
        "user": name,
        "fullname": name,
        "type": "user",
        "isPro": False,
        "avatarUrl": "",
        "numModels": counts["models"],
        "numDatasets": counts["datasets"],
        "numSpaces": counts["spaces"],
        "numDiscussions": 0,
        "numPapers": 0,
        "numUpvotes": 0,
        "numLikes": 0,
        "numFollowers": 0,
        "numFollowing": 0,
        "isFollowing": False,
        "createdAt": iso(0),
        "orgs": orgs,
    }


def _person(call: Call) -> str:
    name = call.hub.accounts.canonical(call["user"])
    if name is None or call.hub.accounts.org(name):
        raise HubError(404, "User not found")
    return name


@routes.on("GET", "/api/users/{user}/followers")
@routes.on("GET", "/api/users/{user}/following")
def follows(call: Call) -> list[Any]:
    _person(call)
    return []


@routes.on("GET", "/api/users/{user}/likes")
def user_likes(call: Call) -> Any:
    name = _person(call)
    liked = []
    for kind in KINDS:
        for repo in call.hub.registry.all(kind, call.caller):
            when = dict(repo.meta.get("likes", [])).get(name)
            if when is not None:
                liked.append({"createdAt": iso(when), "repo": {"name": repo.id, "type": kind[:-1]}})
    return sorted(liked, key=lambda item: item["createdAt"], reverse=True)


@routes.on("GET", "/api/organizations/{org}/overview")
def org_overview(call: Call) -> dict[str, Any]:
    org = _org(call)
    counts = {kind: sum(r.owner == org.name for r in call.hub.registry.all(kind, call.caller)) for kind in KINDS}
    return {
        "_id": _uid(org.name),
        "name": org.name,
        "fullname": org.full_name or org.name,
        "type": "org",
        "avatarUrl": "",
        "isEnterprise": False,
        "isVerified": False,
        "numUsers": len(org.members),
        "numModels": counts["models"],
        "numDatasets": counts["datasets"],
        "numSpaces": counts["spaces"],
        "numFollowers": 0,
        "isFollowing": False,
    }


@routes.on("GET", "/api/organizations/{org}/members")
def org_members(call: Call) -> list[dict[str, Any]]:
    return [
        {"_id": _uid(u), "user": u, "fullname": u, "type": "user", "isPro": False, "avatarUrl": "", "role": role}
        for u, role in sorted(_org(call).members.items())
    ]


@routes.on("GET", "/api/organizations/{org}/followers")
def org_followers(call: Call) -> list[Any]:
    _org(call)
    return []


def _org(call: Call) -> Any:
    org = call.hub.accounts.org(call["org"])
    if org is None:
        raise HubError(404, "Organization not found")
    return org


@routes.on("GET", "/api/settings/repositories")
@routes.on("GET", "/api/organizations/{org}/settings/repositories")
def repositories(call: Call) -> list[dict[str, Any]]:
    """What takes how much space."""
    owner = _org(call).name if "org" in call.params else call.need_user()
    if not call.hub.accounts.may_read_all(call.caller, owner):
        raise HubError(403, "You cannot see the settings of this organization")
    items: list[dict[str, Any]] = []
    for kind in KINDS:
        for repo in call.hub.registry.all(kind, call.caller):
            if repo.owner == owner:
                size = used_storage(repo, repo.git.ref("refs/heads/main"))
                items.append(
                    {
                        "id": repo.id,
                        "type": kind[:-1],
                        "visibility": "private" if repo.private else "public",
                        "storage": size,
                        "storagePercent": 0.0,
                        "updatedAt": iso(repo.last_modified()),
                    }
                )
    total = sum(i["storage"] for i in items)
    for item in items:
        item["storagePercent"] = item["storage"] / total if total else 0.0
    return items


@routes.on("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Response:
    """Check a README before it is committed; JSON, or a list of lines for `Accept: text/plain`."""
    body = call.json()
    kind = text_field(body, "repoType", "model")
    if kind not in ("model", "dataset", "space", "kernel"):
        raise bad_request('"repoType" must be model, dataset or space')
    found = check_card(text_field(body, "content", limit=20_000_000), kind)
    status = 400 if found.errors else 200
    accept = call.request.headers.get("accept", "")
    if "text/plain" in accept and "json" not in accept:
        lines = [f"- Error: {e['message']}" for e in found.errors] + [
            f"- Warning: {w['message']}" for w in found.warnings
        ]
        return PlainTextResponse("\n".join(lines), status_code=status)
    return answer({"errors": found.errors, "warnings": found.warnings}, status)


@routes.on("POST", "/v1/telemetry")
@routes.on("POST", "/api/telemetry/{path...}")
@routes.on("HEAD", "/api/telemetry/{path...}")
def telemetry(call: Call) -> Response:
    """hf_xet and the client report here; nothing is kept."""
    return Response(status_code=200)
