"""What `hubsae doctor` asks of the Hub: endpoint, token and its rights, cache, Xet."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from hubsae.core.text import format_bytes
from hubsae.hub.client import HubClient
from hubsae.hub.retry import describe

State = Literal["ok", "note", "problem"]

TIMEOUT = 5.0
"""Seconds that the Hub may take to answer."""
LOW_SPACE = 5 << 30
"""Bytes free below which a download of a few SAEs and a model may not fit."""


class Check(NamedTuple):
    """One line of the report."""

    name: str
    state: State
    found: str
    do: str = ""
    """What to do about it; empty where nothing is to be done."""


def hub_checks() -> list[Check]:
    """Endpoint, token, cache and upload protocol, as a client sees them."""
    from huggingface_hub import constants

    client = HubClient()
    if client.offline:
        found = f"{client.address}, offline (HF_HUB_OFFLINE is set)"
        checks = [Check("endpoint", "note", found, "only cached files load")]
    else:
        checks = [_reach(client)]
        if checks[0].state == "ok":
            checks.append(_token(client))
    return [*checks, _cache(Path(client.cache_dir)), _xet(bool(constants.HF_HUB_DISABLE_XET))]


def _reach(client: HubClient) -> Check:
    from huggingface_hub.utils import get_session

    shown = client.address
    try:
        answer = get_session().get(f"{client.endpoint}/api/models", params={"limit": 1}, timeout=TIMEOUT)
    except Exception as error:  # whatever the transport raises, the finding is the same
        return Check(
            "endpoint",
            "problem",
            f"{shown} does not answer ({type(error).__name__})",
            "check the network, proxies and HF_ENDPOINT; `hubsae hub serve` runs a Hub on this machine",
        )
    if answer.status_code >= 400:
        return Check("endpoint", "problem", f"{shown} answers {answer.status_code}", "is HF_ENDPOINT a Hub?")
    if "json" not in answer.headers.get("content-type", ""):
        login = f"a login page of this network? open {shown} in a browser"
        return Check("endpoint", "problem", f"{shown} answers, but not as a Hub does", login)
    return Check("endpoint", "ok", shown)


def _token(client: HubClient) -> Check:
    from huggingface_hub import get_token

    if get_token() is None:
        found, todo = "none: public repos load, nothing can be pushed", "hf auth login, or set HF_TOKEN"
        return Check("token", "note", found, todo)
    try:
        me = client.api.whoami()
    except Exception as error:  # refused or unreachable: the person needs the reason, not the type
        return Check("token", "problem", f"refused by {client.address}: {describe(error)}", "hf auth login")
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role", "unknown")
    found = f"{me['name']}, role {role}"
    if role == "read":
        return Check("token", "note", found, "this token cannot push: make one with write access")
    return Check("token", "ok", found)


def _cache(cache: Path) -> Check:
    there = next(p for p in (cache, *cache.parents) if p.exists())
    if not os.access(there, os.W_OK):
        return Check("cache", "problem", f"{cache} cannot be written", "set HF_HOME to a folder of yours")
    free = shutil.disk_usage(there).free
    found = f"{cache}, {format_bytes(free)} free"
    if free < LOW_SPACE:
        return Check("cache", "note", found, "free space with `hf cache prune`, or set HF_HOME elsewhere")
    return Check("cache", "ok", found)


def _xet(disabled: bool) -> Check:
    if disabled:
        return Check("xet", "note", "off (HF_HUB_DISABLE_XET): uploads use LFS")
    try:
        from importlib.metadata import version

        return Check("xet", "ok", f"hf_xet {version('hf_xet')}")
    except ImportError:
        return Check("xet", "note", "hf_xet is not installed: uploads use LFS", "pip install hf_xet")
