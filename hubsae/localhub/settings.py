"""Everything a local hub can be told, in one frozen record: folder, people, switches, limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import LocalHubError
from .faults import Fault

MB = 1024 * 1024

_ACCOUNT = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}$")


@dataclass(frozen=True)
class Token:
    """An access token: who it belongs to and whether it may write."""

    user: str
    secret: str
    role: str = "write"  # "write" | "read"
    full_name: str = ""

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read `NAME=TOKEN` or `NAME=TOKEN:read`.

        >>> Token.parse("alice=hf_abc:read").role
        'read'
        """
        name, _, rest = text.partition("=")
        secret, _, role = rest.partition(":")
        if not _ACCOUNT.match(name) or not secret or role not in ("", "read", "write"):
            raise LocalHubError(f"--token {text!r}: expected NAME=TOKEN or NAME=TOKEN:read")
        return cls(name, secret, role or "write")


@dataclass(frozen=True)
class Org:
    """An organisation and its members with their roles (`admin`, `write`, `contributor` or `read`)."""

    name: str
    members: dict[str, str] = field(default_factory=dict)
    default_private: bool = False
    full_name: str = ""

    @classmethod
    def parse(cls, text: str) -> Org:
        """Read `ORG=alice,bob:read` (a member without a role is an admin); `ORG!private=...` makes new repos private.

        >>> Org.parse("lab=alice,bob:read").members
        {'alice': 'admin', 'bob': 'read'}
        """
        name, _, rest = text.partition("=")
        name, mark, flag = name.partition("!")
        if not _ACCOUNT.match(name) or (mark and flag != "private"):
            raise LocalHubError(f"--org {text!r}: expected ORG=member[:role],... (or ORG!private=...)")
        members: dict[str, str] = {}
        for item in filter(None, rest.split(",")):
            user, _, role = item.partition(":")
            if role not in ("", "admin", "write", "contributor", "read") or not _ACCOUNT.match(user):
                raise LocalHubError(f"--org {text!r}: member {item!r} is not NAME or NAME:admin|write|contributor|read")
            members[user] = role or "admin"
        return cls(name, members, bool(flag))


@dataclass(frozen=True)
class Settings:
    """The settings of one server. Only `root` has no default.

    >>> Settings(root=Path("/data/hub")).xet
    True
    """

    root: Path
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free port
    tokens: tuple[Token, ...] = ()
    orgs: tuple[Org, ...] = ()
    xet: bool = True
    cdn: bool = False  # large files are answered by a redirect to a second port, as the Hub does to its CDN
    multipart_threshold: int = 512 * MB  # LFS uploads above this size come in parts
    multipart_chunk: int = 64 * MB
    page_size: int = 1000  # entries of a tree page (a twentieth of it with expand, like the Hub)
    lfs_threshold: int = 10 * MB  # files above this size are LFS whatever .gitattributes says
    faults: tuple[Fault, ...] = ()  # failures on purpose from the first request on
    url_seconds: int = 3600  # life of signed urls and Xet tokens
    fsync: bool = True  # survive power loss, not only a killed process
    head_seconds: float = 20.0  # a connection that has not sent the whole head of a request by then is closed
    body_seconds: float = 60.0  # the same for a body that is held in memory
    max_json: int = 64 * MB
    max_anonymous_json: int = 2 * MB  # the same for callers without a token
    max_anonymous_memory: int = 64 * MB  # and for all of them together
    max_commit: int = 2048 * MB  # body of one commit call (regular files travel inside it)
    max_upload: int = 512 * 1024 * MB  # one LFS file
    max_xorb: int = 80 * MB
    max_shard: int = 256 * MB

    def __post_init__(self) -> None:
        secrets = [t.secret for t in self.tokens]
        if len(set(secrets)) != len(secrets):
            raise LocalHubError("two tokens are equal; every token must belong to one user")
        if min(self.page_size, self.multipart_threshold, self.multipart_chunk, self.url_seconds) < 1:
            raise LocalHubError("page_size, multipart_threshold, multipart_chunk and url_seconds must be at least 1")
