"""What `hubsae doctor` asks of the Hub: endpoint, token and its rights, cache, Xet."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from hubsae.core.text import format_bytes
from hubsae.hub.retry import describe, without_password

State = Literal["ok", "note", "problem"]

LOW_SPACE = 5 << 30
"""Bytes free below which a download of a few SAEs and a model may not fit."""


class Check(NamedTuple):
    """One line of the report."""

    name: str
    state: State
    found: str
    do: str = ""
    """What to do about it; empty where nothing is to be done."""


def hub_checks(*, timeout: float = 5.0) -> list[Check]:
    """Endpoint, token, cache and upload protocol, as huggingface_hub sees them."""
    from huggingface_hub import constants

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if constants.HF_HUB_OFFLINE:
        checks = [
            Check(
                "endpoint",
                "note",
                f"{without_password(endpoint)}, offline (HF_HUB_OFFLINE is set)",
                "only cached files load",
            )
        ]
    else:
        reachable = _reach(endpoint, timeout)
        checks = [reachable]
        if reachable.state == "ok":
            checks.append(_token(endpoint))
    return [*checks, _cache(Path(constants.HF_HUB_CACHE)), _xet(bool(constants.HF_HUB_DISABLE_XET))]


def _reach(endpoint: str, timeout: float) -> Check:
    from huggingface_hub.utils import get_session

    try:
        answer = get_session().get(f"{endpoint}/api/models", params={"limit": 1}, timeout=timeout)
    except Exception as error:  # whatever the transport raises, the finding is the same
        return Check(
            "endpoint",
            "problem",
            f"{without_password(endpoint)} does not answer ({type(error).__name__})",
            "check the network, proxies and HF_ENDPOINT; `hubsae hub serve` runs a Hub on this machine",
        )
    shown = without_password(endpoint)
    if answer.status_code >= 400:
        return Check("endpoint", "problem", f"{shown} answers {answer.status_code}", "is HF_ENDPOINT a Hub?")
    if "json" not in answer.headers.get("content-type", ""):
        login = f"a login page of this network? open {shown} in a browser"
        return Check("endpoint", "problem", f"{shown} answers, but not as a Hub does", login)
    return Check("endpoint", "ok", shown)


def _token(endpoint: str) -> Check:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        return Check(
            "token", "note", "none: public repos load, nothing can be pushed", "hf auth login, or set HF_TOKEN"
        )
    try:
        me = HfApi(endpoint=endpoint).whoami()
    except Exception as error:  # refused or unreachable: the person needs the reason, not the type
        return Check("token", "problem", f"refused by {without_password(endpoint)}: {describe(error)}", "hf auth login")
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
