"""Control of the server itself: health, and faults set at run time with the admin token from `<root>/hub.json`."""

from __future__ import annotations

import hmac
from typing import Any

from ..errors import HubError, LocalHubError, bad_request
from ..faults import Fault, rate_limit_headers
from ..http import Call
from ..routing import Router

routes = Router()


def _require_admin(call: Call) -> None:
    given = call.request.headers.get("authorization", "").partition(" ")[2].strip()
    if not hmac.compare_digest(given.encode("utf-8", "replace"), call.hub.admin_token.encode()):
        raise HubError(403, "The admin token is needed; it stands in hub.json of the data folder")


@routes.on("GET", "/_local/health")
def health(call: Call) -> dict[str, Any]:
    return {"ok": True, "xet": call.hub.xet, "cdn": bool(call.hub.cdn_port)}


@routes.on("GET", "/_local/faults")
def list_faults(call: Call) -> list[dict[str, Any]]:
    _require_admin(call)
    return call.hub.faults.describe()


@routes.on("POST", "/_local/faults")
def add_fault(call: Call) -> dict[str, Any]:
    _require_admin(call)
    wanted = call.json()
    allowed = {"path", "method", "status", "drop", "lost_status", "count", "skip", "headers", "delay", "rate_limit"}
    if unknown := set(wanted) - allowed:
        raise bad_request(f"Unknown fields: {', '.join(sorted(unknown))}")
    limit = wanted.pop("rate_limit", None)
    if limit is not None:
        wanted["headers"] = {**rate_limit_headers(int(limit)), **wanted.get("headers", {})}
    try:
        call.hub.faults.add(Fault(**wanted))
    except (LocalHubError, TypeError, ValueError) as why:
        raise bad_request(str(why)) from None
    return {"ok": True}


@routes.on("DELETE", "/_local/faults")
def clear_faults(call: Call) -> dict[str, Any]:
    _require_admin(call)
    call.hub.faults.clear()
    return {"ok": True}


@routes.on("POST", "/_local/xet")
def switch_xet(call: Call) -> dict[str, Any]:
    """Turn Xet off or on in a running server: `{"enabled": false}`."""
    _require_admin(call)
    call.hub.xet = bool(call.json().get("enabled"))
    return {"xet": call.hub.xet}


@routes.on("GET", "/_local/requests")
def requests(call: Call) -> dict[str, Any]:
    """How many requests were answered so far, these of the control routes not counted, and the last of them."""
    _require_admin(call)
    return {"count": call.hub.faults.count, "last": call.hub.faults.requests[-20:]}
