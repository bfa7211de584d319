"""LFS content of one repo: objects by sha256 in git-lfs' own folder layout, pointers, and .gitattributes rules.

`<repo>.git/lfs/objects/ab/cd/<sha256>` is where git-lfs looks in a bare repo, so `git clone` of the folder finds the
content. Files that came by Xet are not there but in the Xet store; `<repo>.git/hub/xet/<sha256>` says which file it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pathspec

from .errors import bad_request
from .files import Disk
from .xet.cas import CasStore, XetFile

_POINTER = re.compile(
    rb"^version https://git-lfs\.github\.com/spec/v1\n(?:ext-.*\n)*oid sha256:([0-9a-f]{64})\nsize (\d+)\n$"
)
_OID = re.compile(r"^[0-9a-f]{64}$")

# what the Hub gives a new repo, by and large: binary formats of machine learning, archives, media
_LFS_ENDINGS = (
    "7z arrow bin bin.* bz2 ckpt ftz gz h5 joblib lfs.* mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt "
    "pth rar safetensors tar tar.* tflite tgz wasm xz zip zst"
)
_MEDIA_ENDINGS = "bmp gif png tiff jpg jpeg webp mp4 webm aac flac mp3 ogg wav pcm sam raw"


def default_gitattributes(kind: str) -> str:
    """The first `.gitattributes` of a repo."""
    endings = _LFS_ENDINGS.split() + (_MEDIA_ENDINGS.split() if kind == "datasets" else [])
    patterns = [f"*.{e}" for e in endings] + ["saved_model/**/*", "*tfevents*"]
    return "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in patterns)


class Pointer(NamedTuple):
    """What a pointer file says."""

    oid: str
    size: int


def pointer_text(oid: str, size: int) -> bytes:
    """A git-lfs pointer file.

    >>> parse_pointer(pointer_text("0" * 64, 5)).size
    5
    """
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def parse_pointer(data: bytes) -> Pointer | None:
    """Read a pointer file; None for any other content."""
    found = _POINTER.match(data) if len(data) < 1024 else None
    return Pointer(found[1].decode(), int(found[2])) if found else None


def is_oid(text: object) -> bool:
    """Whether a word is a sha256 in hex."""
    return isinstance(text, str) and bool(_OID.match(text))


class AttributeRules:
    """Which paths a `.gitattributes` sends to LFS. Later lines win, as in git."""

    def __init__(self, text: str) -> None:
        self.rules: list[tuple[pathspec.PathSpec, bool]] = []
        for line in text.splitlines():
            words = line.split()
            if len(words) < 2 or line.startswith("#"):
                continue
            flags = set(words[1:])
            if "filter=lfs" in flags:
                lfs = True
            elif flags & {"-filter", "!filter"}:
                lfs = False
            else:
                continue
            try:
                # attribute patterns are gitignore patterns without negation and folders
                spec = pathspec.PathSpec.from_lines("gitwildmatch", [words[0].strip('"').replace("[[:space:]]", " ")])
            except ValueError:
                continue
            self.rules.append((spec, lfs))

    def is_lfs(self, path: str) -> bool:
        answer = False
        for spec, lfs in self.rules:
            if spec.match_file(path):
                answer = lfs
        return answer


class LfsStore:
    """LFS objects of one repo, wherever their bytes are."""

    def __init__(self, repo_path: Path, disk: Disk, cas: CasStore) -> None:
        self.repo_path = repo_path
        self.disk = disk
        self.cas = cas

    def object_path(self, oid: str) -> Path:
        return self.repo_path / "lfs" / "objects" / oid[:2] / oid[2:4] / oid

    def _xet_link(self, oid: str) -> Path:
        return self.repo_path / "hub" / "xet" / oid

    def size(self, oid: str) -> int | None:
        """Size of an object, None where this repo does not have it."""
        try:
            return self.object_path(oid).stat().st_size
        except FileNotFoundError:
            file = self.xet_file(oid)
            return file.size if file else None

    def xet_file(self, oid: str) -> XetFile | None:
        """The Xet file with this content, if it came that way."""
        name = self.xet_hash(oid)
        return self.cas.file(name) if name else None

    def xet_hash(self, oid: str) -> str | None:
        try:
            return self._xet_link(oid).read_text()
        except FileNotFoundError:
            return None

    def link_xet(self, file: XetFile) -> None:
        """Let this repo have a file of the Xet store."""
        self.disk.write(self._xet_link(file.sha256), file.hash.encode())

    def accept(self, oid: str, size: int, temp: Path, handle: IO[bytes], digest: str, length: int) -> None:
        """Keep an upload that was written to `temp` if its hash and size are what was announced."""
        if length != size:
            raise bad_request(f"LFS object {oid}: expected {size} bytes, got {length}")
        if digest != oid:
            raise bad_request(f"LFS object {oid}: content has sha256 {digest}")
        self.disk.publish(temp, self.object_path(oid), handle)

    def copy_from(self, other: LfsStore, oid: str) -> bool:
        """Take an object of another repo over; False where it has none."""
        if self.size(oid) is not None:
            return True
        source = other.object_path(oid)
        if source.exists():
            with self.disk.temp_file() as (path, handle):
                path.unlink()
                path.hardlink_to(source)  # content never changes, so one copy serves both
                self.disk.publish(path, self.object_path(oid), None)
                handle.close()
            return True
        if (file := other.xet_file(oid)) is not None:
            self.link_xet(file)
            return True
        return False

    def source(self, oid: str) -> Path | Callable[[int, int], Iterator[bytes]]:
        """Where the bytes of an object are: its file, or a function that yields `[start, end)` of it."""
        file = None if (path := self.object_path(oid)).exists() else self.xet_file(oid)
        return path if file is None else lambda start, end: self.cas.read(file, start, end)

    def read(self, oid: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes `[start, end)` of an object."""
        source = self.source(oid)
        return read_range(source, start, end) if isinstance(source, Path) else source(start, end)

    def all_oids(self) -> dict[str, int]:
        """Every object this repo has, with its size."""
        found: dict[str, int] = {}
        for path in (self.repo_path / "lfs" / "objects").glob("*/*/*"):
            found[path.name] = path.stat().st_size
        for path in (self.repo_path / "hub" / "xet").glob("*"):
            if (file := self.cas.file(path.read_text())) is not None:
                found[path.name] = file.size
        return found

    def forget(self, oid: str) -> None:
        """Drop an object from this repo."""
        self.object_path(oid).unlink(missing_ok=True)
        self._xet_link(oid).unlink(missing_ok=True)


def read_range(path: Path, start: int, end: int, block: int = 1 << 20) -> Iterator[bytes]:
    """Bytes `[start, end)` of a file on disk."""
    with open(path, "rb") as handle:
        handle.seek(start)
        left = end - start
        while left > 0 and (data := handle.read(min(block, left))):
            left -= len(data)
            yield data
