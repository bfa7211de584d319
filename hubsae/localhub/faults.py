"""Faults on demand: make the next N requests of a kind fail the way a busy or broken Hub fails.

Three ways, because clients have to survive each differently: an error status instead of the work (`status`), the
connection cut before anything is done (`drop="before"`), and the work done but its answer lost (`drop="after"`, the
nastiest: the commit exists and the client does not know).
"""

from __future__ import annotations

import re
import threading
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import LocalHubError


@dataclass
class Fault:
    """One rule. `path` is a regular expression searched in the raw path (with query)."""

    path: str = ""
    method: str = "*"
    status: int | None = None
    drop: str | None = None  # "before" | "after"
    lost_status: int | None = None  # with drop="after": answer this (a gateway's 504) instead of cutting the line
    count: int | None = 1  # None: until cleared
    skip: int = 0  # let this many matching requests through first
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hits: int = 0

    def __post_init__(self) -> None:
        if self.drop not in (None, "before", "after"):
            raise LocalHubError(f"fault: drop is 'before' or 'after', not {self.drop!r}")
        if self.status is None and self.drop is None and not self.delay and not self.headers:
            raise LocalHubError("fault: give status=, drop=, delay= or headers=")
        if self.status is not None and not 200 <= int(self.status) <= 599:
            raise LocalHubError(f"fault: status {self.status} is not an HTTP status")
        try:
            re.compile(self.path)
        except re.error as why:
            raise LocalHubError(f"fault: path {self.path!r} is not a regular expression ({why})") from why

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read `METHOD:PATTERN:STATUS|drop|lost[:COUNT]`, as the command line gives it.

        >>> Fault.parse("POST:/commit/:503:2").count
        2
        """
        found = re.fullmatch(r"([A-Za-z*]+):(.+?):(\d{3}|drop|lost)(?::(\d+|\*))?", text)
        if not found:
            raise LocalHubError(f"--fault {text!r}: expected METHOD:PATTERN:STATUS|drop|lost[:COUNT]")
        method, path, what, count = found.groups()
        return cls(
            path=path,
            method=method.upper(),
            status=int(what) if what.isdigit() else None,
            drop={"drop": "before", "lost": "after"}.get(what),
            count=None if count == "*" else int(count or 1),
        )


class Faults:
    """The rules in force, and a short memory of the requests seen (so a test can look at what was sent)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.rules: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        self.count = 0

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self.rules.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self.rules.clear()

    def pick(self, method: str, path: str) -> Fault | None:
        """The first rule that applies to this request; it is used up by one."""
        with self._lock:
            for rule in self.rules:
                if rule.method not in ("*", method) or not re.search(rule.path, path):
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                if rule.count is not None and rule.hits >= rule.count:
                    continue
                rule.hits += 1
                return rule
        return None

    def note(self, method: str, path: str, status: int) -> None:
        """Remember a finished request (the last 20,000)."""
        with self._lock:
            self.count += 1
            self.requests.append((method, path, status))
            if len(self.requests) > 20_000:
                del self.requests[:10_000]

    def describe(self) -> list[dict[str, Any]]:
        """The rules as plain data."""
        with self._lock:
            return [asdict(rule) for rule in self.rules]


def rate_limit_headers(seconds: int) -> dict[str, str]:
    """The headers of a Hub 429, which the client sleeps by.

    >>> rate_limit_headers(2)["RateLimit"]
    '"api";r=0;t=2'
    """
    return {"RateLimit": f'"api";r=0;t={seconds}', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
