"""Retries of requests to a Hub: what is worth repeating, how long to wait before, and when to stop.

The client library repeats some of its requests by itself (listings, uploads, tokens of the storage) and not others
(`create_repo`, `create_commit`, tags and branches fail on the first 429 or 5xx). Each request has one owner of its
retries: `retrying` counts the tries that the library has made already, so that none is sent more than six times. It
waits as long as the server says (`RateLimit` and `Retry-After` headers), and otherwise doubles its pause; all pauses of
one request stay within `budget` seconds.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from hubsae.core.errors import ConfigError
from hubsae.core.text import printable

T = TypeVar("T")

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently to repeat a request.

    >>> RetryPolicy(base=1.0, jitter=0.0).pause(attempt=3)
    4.0
    """

    attempts: int = 6
    """Tries in all."""
    base: float = 1.0
    """Seconds before the second try; doubles from then on."""
    cap: float = 60.0
    """Longest pause of our own choosing. A pause the server asks for may be longer."""
    patience: float = 310.0
    """Longest pause that is accepted from the server's headers: the Hub counts requests in windows of five minutes."""
    budget: float = 600.0
    """Seconds of all pauses of one request together."""
    jitter: float = 0.25
    """Share of the pause that is random, so that many writers do not come back at once."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    @classmethod
    def from_environment(cls) -> RetryPolicy:
        """The default policy; `HUBSAE_RETRY_ATTEMPTS` and `HUBSAE_RETRY_BASE` (seconds) change it."""
        return cls(
            attempts=max(1, int(_number("HUBSAE_RETRY_ATTEMPTS", cls.attempts))),
            base=_number("HUBSAE_RETRY_BASE", cls.base),
        )

    def pause(self, attempt: int) -> float:
        """Seconds to wait after the failed try number `attempt`, when the server says nothing."""
        plain = min(self.cap, self.base * 2 ** (attempt - 1))
        return plain * (1 + self.jitter * random.random())


def _number(name: str, default: float) -> float:
    given = os.environ.get(name, "")
    try:
        return float(given) if given else default
    except ValueError:
        raise ConfigError(f"{name} is {given!r} and not a number", hint=f"unset it, or {name}={default:g}") from None


def asked_pause(headers: Mapping[str, str]) -> float | None:
    """The pause a server asks for, in seconds, or None.

    >>> asked_pause({"RateLimit": '"api";r=0;t=55'})
    56.0
    >>> asked_pause({"Retry-After": "7"})
    7.0
    >>> asked_pause({"RateLimit": '"api";r=12;t=55'}) is None
    True
    """
    lowered = {key.lower(): value for key, value in headers.items()}
    fields = dict(part.strip().split("=", 1) for part in lowered.get("ratelimit", "").split(";") if "=" in part)
    if fields.get("r") == "0" and fields.get("t", "").isdigit():
        return float(fields["t"]) + 1.0  # the header counts whole seconds
    after = lowered.get("retry-after", "").strip()
    if after.isdigit():
        return float(after)
    if after:
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
        except (TypeError, ValueError):
            return None
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status an exception carries, if it carries one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def kinds(error: BaseException) -> frozenset[str]:
    """Names of an exception's classes: the client library's transport differs between its versions."""
    return frozenset(kind.__name__ for kind in type(error).__mro__)


BAD_ADDRESS = frozenset({"UnsupportedProtocol", "InvalidURL", "InvalidSchema", "MissingSchema"})
LOST = frozenset({"TransportError", "ConnectionError", "TimeoutError", "Timeout", "ChunkedEncodingError"})


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: lost connections, time-outs, 429 and 5xx."""
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT_STATUS
    names = kinds(error)
    if "OfflineModeIsEnabled" in names or names & BAD_ADDRESS:
        return False
    if names & LOST:
        # hf_xet raises ConnectionError with the status only in its text
        text = str(error)
        return not any(f"HTTP status client error ({code}" in text for code in (400, 401, 403, 404))
    # the LFS uploader and forced downloads wrap what happened into these
    cause = error.__cause__
    return isinstance(error, RuntimeError | ValueError) and cause is not None and is_transient(cause)


def tries_made(error: BaseException) -> int:
    """How often the request that failed was sent in this call: the client library may have repeated it by itself.

    It keeps the number in a local variable of the function that repeats; a storage library of its own (Xet) repeats
    too and does not say how often, hence counts as all the tries there are.
    """
    made = 1
    chain: BaseException | None = error
    while chain is not None:
        frame = chain.__traceback__
        last = ""
        while frame is not None:
            last = frame.tb_frame.f_code.co_name
            made = max(made, int(frame.tb_frame.f_locals.get("nb_tries") or 0))
            frame = frame.tb_next
        if last in _REPEATED_BELOW:
            return ALL_TRIES
        chain = chain.__cause__
    return made


ALL_TRIES = 1 << 10
_REPEATED_BELOW = frozenset({"_upload_xet_files", "xet_get"})


def retrying(
    call: Callable[[], T],
    *,
    policy: RetryPolicy | None = None,
    what: str = "the request",
    notify: Callable[[str], None] | None = None,
    transient: Callable[[BaseException], bool] = is_transient,
) -> T:
    """Run `call`, again after transient failures; the last failure is raised as it is.

    `notify` gets one line per repetition, e.g. to show it to a person who waits.

    >>> answers = iter([ConnectionError("reset"), 42])
    >>> def ask():
    ...     answer = next(answers)
    ...     if isinstance(answer, Exception):
    ...         raise answer
    ...     return answer
    >>> retrying(ask, policy=RetryPolicy(base=0.0), notify=print)
    the request failed (ConnectionError: reset); trying again in 0 s (2 of 6)
    42
    """
    policy = policy or RetryPolicy.from_environment()
    attempt, waited = 0, 0.0
    while True:
        try:
            return call()
        except Exception as error:
            attempt += tries_made(error)
            if not transient(error) or attempt >= policy.attempts:
                raise
            asked = asked_pause(getattr(getattr(error, "response", None), "headers", None) or {})
            pause = policy.pause(attempt) if asked is None else asked
            if (asked or 0) > policy.patience or waited + pause > policy.budget:
                raise
            if notify is not None:
                notify(
                    f"{what} failed ({describe(error)}); trying again in {pause:.0f} s "
                    f"({attempt + 1} of {policy.attempts})"
                )
            policy.sleep(pause)
            waited += pause


def describe(error: BaseException) -> str:
    """One short line for an exception: the status, or its type and the first line of its text."""
    status = status_of(error)
    if status is not None:
        return "429, rate limited" if status == 429 else f"HTTP {status}"
    lines = without_password(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0], 300)}" if lines else type(error).__name__


def without_password(text: str) -> str:
    """Text with addresses in it, without the names and passwords that stand in them.

    >>> without_password("HTTP 500 for http://me:secret@hub.lab/api")
    'HTTP 500 for http://hub.lab/api'
    """
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
