"""What a branch should hold, and how that differs from what it holds: files of a folder or made on the spot."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hubsae.core.files import sha256_file
from hubsae.formats.planning import belongs
from hubsae.hub.client import RemoteFile


@dataclass
class LocalFile:
    """A file to publish: a path on disk, or bytes made on the spot."""

    path: str
    source: Path | bytes
    known_sha256: str | None = field(default=None, repr=False)

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """Hash of the content, as large objects are compared."""
        if self.known_sha256:
            return self.known_sha256
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        return sha256_file(self.source)

    @cached_property
    def git_oid(self) -> str:
        """Hash of the content as a git blob, as small files are compared."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        if isinstance(self.source, bytes):
            digest.update(self.source)
        else:
            with open(self.source, "rb") as file:
                hashlib.file_digest(file, lambda: digest)
        return digest.hexdigest()

    def same_as(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub already has exactly this content at this path."""
        if remote is None or remote.size != self.size:
            return False
        return remote.sha256 == self.sha256 if remote.sha256 else remote.git_oid == self.git_oid


@dataclass(frozen=True)
class Diff:
    """What a push would change on a branch."""

    new: list[LocalFile]
    changed: list[LocalFile]
    unchanged: list[LocalFile]
    deleted: list[str]

    @property
    def empty(self) -> bool:
        """Nothing to do."""
        return not (self.new or self.changed or self.deleted)

    @property
    def sent(self) -> list[LocalFile]:
        """Files that have to reach the Hub."""
        return self.new + self.changed

    @property
    def bytes_to_send(self) -> int:
        """Their size."""
        return sum(file.size for file in self.sent)


@dataclass(frozen=True)
class State:
    """A branch as it was when we looked."""

    head: str
    tree: dict[str, RemoteFile]


@dataclass(frozen=True)
class Contents:
    """What the branch should hold afterwards: these files, and none of those."""

    files: list[LocalFile]
    delete: frozenset[str] = frozenset()


def compare(contents: Contents, tree: dict[str, RemoteFile]) -> Diff:
    """Sort the files into new, changed, unchanged and deleted."""
    new, changed, unchanged = [], [], []
    for file in contents.files:
        _ = file.size  # a plan is still shown when its staging folder is gone
        remote = tree.get(file.path)
        (new if remote is None else unchanged if file.same_as(remote) else changed).append(file)
    kept = {file.path for file in contents.files}
    deleted = sorted(path for path in contents.delete if path in tree and path not in kept)
    return Diff(new, changed, unchanged, deleted)


def fingerprint(files: Iterable[LocalFile]) -> str:
    """A hash over paths and contents of a release."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.path):
        digest.update(f"{file.path}\0{file.sha256}\n".encode())
    return digest.hexdigest()[:16]


def files_under(root: str | os.PathLike[str]) -> list[LocalFile]:
    """Every file below a folder, hidden ones and links that lead out of it excepted, with repo paths."""
    base = Path(root)
    found = []
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and (not path.is_symlink() or belongs(path, base)):
            found.append(LocalFile(relative.as_posix(), path))
    return found
