"""Who is asking and what they may do: tokens, users, organisations, and urls that are signed instead of authorised."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from .errors import HubError
from .settings import Org, Settings, Token


@dataclass(frozen=True)
class Caller:
    """The person behind a request, or nobody (`name` is None)."""

    name: str | None = None
    role: str = "read"

    @property
    def known(self) -> bool:
        return self.name is not None


ANONYMOUS = Caller()


class Accounts:
    """The table of tokens and organisations."""

    def __init__(self, settings: Settings) -> None:
        self.tokens: list[Token] = list(settings.tokens)
        self.orgs: dict[str, Org] = {org.name.lower(): org for org in settings.orgs}

    def identify(self, authorization: str | None) -> Caller:
        """The caller behind an `Authorization` header. A wrong token is an error, not anonymity.

        Every token is compared, each in constant time, so that timing tells nothing about them.
        """
        if not authorization:
            return ANONYMOUS
        scheme, _, secret = authorization.strip().partition(" ")
        secret = secret.strip()
        if scheme.lower() == "basic":  # git and git-lfs send user:token
            try:
                secret = base64.b64decode(secret, validate=True).decode().partition(":")[2]
            except ValueError:
                secret = ""
        elif scheme.lower() != "bearer":
            raise HubError(401, "Invalid credentials in Authorization header")
        found = ANONYMOUS
        for token in self.tokens:
            if hmac.compare_digest(token.secret.encode(), secret.encode("utf-8", "replace")):
                found = Caller(token.user, token.role)
        if not found.known:
            raise HubError(401, "Invalid credentials in Authorization header")
        return found

    def org(self, name: str) -> Org | None:
        return self.orgs.get(name.lower())

    def user_names(self) -> list[str]:
        """All people: those with a token and those who are members of something."""
        members = {user for org in self.orgs.values() for user in org.members}
        return sorted({t.user for t in self.tokens} | members)

    def full_name(self, user: str) -> str:
        """The name a person shows, by default their user name."""
        return next((t.full_name for t in self.tokens if t.user == user and t.full_name), user)

    def canonical(self, namespace: str) -> str | None:
        """The namespace as it was registered, whatever case it was asked in; None if nobody has it."""
        if org := self.org(namespace):
            return org.name
        return next((u for u in self.user_names() if u.lower() == namespace.lower()), None)

    def role_in(self, caller: Caller, namespace: str) -> str | None:
        """The caller's role in a namespace: `admin` in their own, their membership in an org, else None."""
        if caller.name is None:
            return None
        if caller.name.lower() == namespace.lower():
            return "admin"
        org = self.org(namespace)
        return org.members.get(caller.name) if org else None

    def may_read_all(self, caller: Caller, namespace: str) -> bool:
        """Whether the caller sees the private repos of a namespace."""
        return self.role_in(caller, namespace) is not None

    def may_write(self, caller: Caller, namespace: str) -> bool:
        """Whether the caller may change the repos of a namespace."""
        return caller.role == "write" and self.role_in(caller, namespace) in ("admin", "write")


class Signer:
    """Short-lived signed claims: what upload urls, CDN urls and Xet tokens are made of."""

    def __init__(self, secret: bytes, seconds: int) -> None:
        self.secret = secret
        self.seconds = seconds

    def sign(self, claims: dict[str, Any]) -> str:
        """Claims plus expiry, as one url-safe word."""
        body = json.dumps({**claims, "exp": int(time.time()) + self.seconds}, separators=(",", ":"))
        text = base64.urlsafe_b64encode(body.encode()).decode().rstrip("=")
        return f"{text}.{self._mac(text)}"

    def _mac(self, text: str) -> str:
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()

    def verify(self, word: str, kind: str) -> dict[str, Any]:
        """The claims of a word of this kind; 403 when forged or for another use, 403 when expired."""
        text, _, mac = word.partition(".")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", text) or not re.fullmatch(r"[0-9a-f]{64}", mac):
            raise HubError(403, "Invalid signature")
        if not hmac.compare_digest(self._mac(text), mac):
            raise HubError(403, "Invalid signature")
        claims = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if claims.get("kind") != kind:
            raise HubError(403, "This signature is for something else")
        if claims["exp"] < time.time():
            raise HubError(403, "Request has expired")
        return claims
