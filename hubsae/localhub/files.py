"""Atomic writes for the hub's folder: a reader sees the old content or the new, never a half.

Temporary files all live in `<root>/tmp` (same file system, so a rename is atomic) and are swept at start; that
keeps every git repo free of stray files after a crash.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import HubError

_GONE = "The repository was moved or deleted meanwhile; try again"


class Disk:
    """The hub's way to its disk: temporary names, atomic replace, and fsync where the settings ask for it."""

    def __init__(self, root: Path, fsync: bool) -> None:
        self.root = root
        self.fsync = fsync
        self.tmp = root / "tmp"
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(parents=True, exist_ok=True)

    def temp_path(self, stem: str = "t") -> Path:
        """A fresh name under `tmp`, nothing created yet."""
        return self.tmp / f"{stem}-{uuid.uuid4().hex}"

    @contextmanager
    def temp_file(self, stem: str = "t") -> Iterator[tuple[Path, IO[bytes]]]:
        """An open temporary file, removed at the end unless it was moved away."""
        path = self.temp_path(stem)
        with open(path, "w+b") as handle:
            try:
                yield path, handle
            finally:
                path.unlink(missing_ok=True)

    def publish(self, temp: Path, target: Path, handle: IO[bytes] | None = None) -> None:
        """Move a finished temporary file to its place."""
        if handle is not None:
            handle.flush()
            if self.fsync:
                os.fsync(handle.fileno())
        try:
            os.replace(temp, target)
        except FileNotFoundError:
            self._make_parents(target.parent)
            try:
                os.replace(temp, target)
            except FileNotFoundError:
                raise HubError(404, _GONE, code="RepoNotFound") from None
        if self.fsync:
            sync_folder(target.parent)

    def _make_parents(self, folder: Path) -> None:
        """The folders above a new file. A repo's own folder is never made here: if it is gone, the repo was moved or
        deleted while this request was at work, and must not come back as an empty shell."""
        parts = folder.relative_to(self.root).parts
        if len(parts) < 3 or not parts[2].endswith(".git"):
            folder.mkdir(parents=True, exist_ok=True)
            return
        here = self.root.joinpath(*parts[:3])
        for name in parts[3:]:
            here = here / name
            try:
                here.mkdir(exist_ok=True)
            except FileNotFoundError:
                raise HubError(404, _GONE, code="RepoNotFound") from None

    def write(self, target: Path, data: bytes) -> None:
        """Write a whole file atomically."""
        with self.temp_file() as (path, handle):
            handle.write(data)
            self.publish(path, target, handle)

    def write_json(self, target: Path, value: Any) -> None:
        """Write JSON atomically."""
        self.write(target, json.dumps(value, indent=1, sort_keys=True).encode())

    def remove_tree(self, folder: Path) -> None:
        """Take a folder out of sight in one rename, then delete it at leisure."""
        gone = self.temp_path("trash")
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive power loss."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path) -> Any:
    """Read a JSON file; None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
