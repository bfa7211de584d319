"""One bare git repo on disk: loose objects, trees, commits, tags and refs, readable by git itself.

Objects are written loose, each by an atomic rename, and a ref moves only after everything it reaches is on disk, so
a kill at any moment leaves a repo that `git fsck` accepts. If a person runs `git gc` in the folder, packed objects are
read through the `git` program; the server itself never needs it.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import HubError, revision_not_found
from .files import Disk

TREE_MODE = "40000"
FILE_MODE = "100644"

_SHA = re.compile(r"^[0-9a-f]{40}$")
_SHORT_SHA = re.compile(r"^[0-9a-f]{4,40}$")


class Entry(NamedTuple):
    """One line of a tree: git file mode and object id."""

    mode: str
    sha: str

    @property
    def is_tree(self) -> bool:
        return self.mode == TREE_MODE


class Commit(NamedTuple):
    """A parsed commit."""

    sha: str
    tree: str
    parents: tuple[str, ...]
    author: str
    when: int
    message: str

    @property
    def title(self) -> str:
        return self.message.partition("\n")[0]

    @property
    def body(self) -> str:
        return self.message.partition("\n")[2].strip("\n")


class GitStore:
    """A bare repo. Reading needs no lock; whoever moves a ref holds `lock`."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.disk = disk
        self.lock = threading.RLock()
        self._trees: OrderedDict[str, dict[str, Entry]] = OrderedDict()
        self._commits: OrderedDict[str, Commit] = OrderedDict()

    @staticmethod
    def init(path: Path) -> None:
        """Lay out an empty bare repo whose HEAD is `main`."""
        for folder in ("objects/info", "objects/pack", "refs/heads", "refs/tags", "info"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        (path / "HEAD").write_text("ref: refs/heads/main\n")
        (path / "config").write_text(
            "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n"
            "[gc]\n\tauto = 0\n[lfs]\n\tlocksverify = false\n"
        )
        (path / "description").write_text("A repository of the hubsae local hub\n")

    # -- objects ------------------------------------------------------------------------------------------

    def _object_path(self, sha: str) -> Path:
        return self.path / "objects" / sha[:2] / sha[2:]

    def write_object(self, kind: str, data: bytes) -> str:
        """Store an object and return its id."""
        header = f"{kind} {len(data)}".encode() + b"\0"
        digest = hashlib.sha1(header)
        digest.update(data)
        sha = digest.hexdigest()
        target = self._object_path(sha)
        if not target.exists():
            packer = zlib.compressobj(1)
            body = packer.compress(header) + packer.compress(data) + packer.flush()
            self.disk.write(target, body)
        return sha

    def read_object(self, sha: str) -> tuple[str, bytes]:
        """Kind and content of an object."""
        try:
            raw = zlib.decompress(self._object_path(sha).read_bytes())
        except FileNotFoundError:
            return self._read_packed(sha)
        header, _, data = raw.partition(b"\0")
        return header.split(b" ")[0].decode(), data

    def _read_packed(self, sha: str) -> tuple[str, bytes]:
        if _SHA.match(sha) and any((self.path / "objects" / "pack").glob("*.pack")):
            done = subprocess.run(
                ["git", "cat-file", "--batch"], cwd=self.path, input=f"{sha}\n".encode(), capture_output=True
            )
            header, _, rest = done.stdout.partition(b"\n")
            words = header.split()
            if done.returncode == 0 and len(words) == 3:
                return words[1].decode(), rest[: int(words[2])]
        raise HubError(404, f"Object {sha} is not in this repository")

    def blob_size(self, sha: str) -> int:
        """Size of a blob, from its header where it is loose."""
        try:
            with open(self._object_path(sha), "rb") as handle:
                # a compressed block may need hundreds of bytes before its first one comes out
                head = zlib.decompressobj().decompress(handle.read(4096), 32)
            return int(head.split(b"\0")[0].split(b" ")[1])
        except FileNotFoundError:
            return len(self._read_packed(sha)[1])

    def blob(self, sha: str) -> bytes:
        """Content of a blob."""
        return self.read_object(sha)[1]

    # -- trees --------------------------------------------------------------------------------------------

    def tree(self, sha: str) -> dict[str, Entry]:
        """The entries of a tree by name. The result is shared: do not change it."""
        if (known := self._trees.get(sha)) is not None:
            return known
        data = self.read_object(sha)[1]
        entries: dict[str, Entry] = {}
        at = 0
        while at < len(data):
            space = data.index(b" ", at)
            end = data.index(b"\0", space)
            name = data[space + 1 : end].decode("utf-8", "surrogateescape")
            entries[name] = Entry(data[at:space].decode(), data[end + 1 : end + 21].hex())
            at = end + 21
        _remember(self._trees, sha, entries, 4096)
        return entries

    def write_tree(self, entries: dict[str, Entry]) -> str:
        """Store a tree; names are sorted as git does (folders as if they ended in a slash)."""

        def order(item: tuple[str, Entry]) -> bytes:
            return item[0].encode() + (b"/" if item[1].is_tree else b"")

        body = b"".join(
            f"{entry.mode} {name}".encode() + b"\0" + bytes.fromhex(entry.sha)
            for name, entry in sorted(entries.items(), key=order)
        )
        return self.write_object("tree", body)

    def lookup(self, tree_sha: str, path: str) -> Entry | None:
        """The entry at `path`, or None. The empty path is the tree itself."""
        entry = Entry(TREE_MODE, tree_sha)
        for name in filter(None, path.split("/")):
            if not entry.is_tree:
                return None
            found = self.tree(entry.sha).get(name)
            if found is None:
                return None
            entry = found
        return entry

    def walk(self, tree_sha: str, prefix: str = "", recursive: bool = True) -> Iterator[tuple[str, Entry]]:
        """Every entry below a tree with its path; folders come before what is in them."""
        for name, entry in self.tree(tree_sha).items():
            path = f"{prefix}/{name}" if prefix else name
            yield path, entry
            if recursive and entry.is_tree:
                yield from self.walk(entry.sha, path)

    def files(self, tree_sha: str) -> dict[str, Entry]:
        """All files (no folders) below a tree."""
        return {path: entry for path, entry in self.walk(tree_sha) if not entry.is_tree}

    # -- commits ------------------------------------------------------------------------------------------

    def write_commit(self, tree: str, parents: list[str], author: str, message: str, when: int | None = None) -> str:
        """Store a commit by `author` (a user name) and return its id."""
        stamp = int(time.time()) if when is None else when
        safe = re.sub(r"[<>\n\0]", "", author) or "unknown"
        who = f"{safe} <{safe}@users.noreply.local-hub> {stamp} +0000"
        lines = [f"tree {tree}", *(f"parent {p}" for p in parents), f"author {who}", f"committer {who}", "", message]
        body = "\n".join(lines).replace("\0", "").encode("utf-8", "replace")
        return self.write_object("commit", body if body.endswith(b"\n") else body + b"\n")

    def commit(self, sha: str) -> Commit:
        """Parse a commit."""
        if (known := self._commits.get(sha)) is not None:
            return known
        kind, data = self.read_object(sha)
        if kind != "commit":
            raise revision_not_found(sha)
        head, _, message = data.decode("utf-8", "replace").partition("\n\n")
        tree, parents, author, when = "", [], "unknown", 0
        for line in head.split("\n"):
            key, _, value = line.partition(" ")
            if key == "tree":
                tree = value
            elif key == "parent":
                parents.append(value)
            elif key == "author":
                author = value.partition(" <")[0]
                when = int(value.rsplit(" ", 2)[1])
        result = Commit(sha, tree, tuple(parents), author, when, message.rstrip("\n"))
        _remember(self._commits, sha, result, 16384)
        return result

    def write_tag(self, name: str, commit: str, author: str, message: str) -> str:
        """Store an annotated tag object."""
        safe = re.sub(r"[<>\n\0]", "", author) or "unknown"
        who = f"{safe} <{safe}@users.noreply.local-hub> {int(time.time())} +0000"
        head = f"object {commit}\ntype commit\ntag {name}\ntagger {who}"
        return self.write_object("tag", f"{head}\n\n{message}\n".replace("\0", "").encode("utf-8", "replace"))

    def peel(self, sha: str) -> str:
        """The commit an annotated tag stands for; a commit is itself."""
        kind, data = self.read_object(sha)
        while kind == "tag":
            sha = data.split(b"\n", 1)[0].split(b" ")[1].decode()
            kind, data = self.read_object(sha)
        if kind != "commit":
            raise revision_not_found(sha)
        return sha

    # -- refs ---------------------------------------------------------------------------------------------

    def _packed_refs(self) -> dict[str, str]:
        try:
            lines = (self.path / "packed-refs").read_text().splitlines()
        except FileNotFoundError:
            return {}
        pairs = (line.split(" ") for line in lines if line and line[0] not in "#^")
        return {name: sha for sha, name in pairs}

    def ref(self, name: str) -> str | None:
        """What a full ref name (`refs/heads/main`) points to."""
        try:
            return (self.path / name).read_text().strip()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return self._packed_refs().get(name)

    def refs(self, prefix: str) -> dict[str, str]:
        """All refs below `refs/<prefix>/`, by their name without it."""
        base = f"refs/{prefix}/"
        found = {name[len(base) :]: sha for name, sha in self._packed_refs().items() if name.startswith(base)}
        folder = self.path / "refs" / prefix
        for here, _, names in os.walk(folder):
            for name in names:
                path = Path(here) / name
                try:
                    found[path.relative_to(folder).as_posix()] = path.read_text().strip()
                except FileNotFoundError:  # deleted between the two calls
                    continue
        return dict(sorted(found.items()))

    def set_ref(self, name: str, sha: str) -> None:
        """Move or make a ref. The caller holds `lock`."""
        target = self.path / name
        # git cannot hold both `a` and `a/b`, on disk or packed
        taken = [
            known for known in self._all_ref_names() if known.startswith(f"{name}/") or name.startswith(f"{known}/")
        ]
        if taken:
            raise HubError(409, f"Reference {name} conflicts with {taken[0]}")
        if target.is_dir():  # an empty folder left by a deleted `a/b`
            _prune(target)
        self.disk.write(target, f"{sha}\n".encode())

    def _all_ref_names(self) -> list[str]:
        return [f"refs/{kind}/{name}" for kind in ("heads", "tags", "pr") for name in self.refs(kind)]

    def delete_ref(self, name: str) -> None:
        """Remove a ref. The caller holds `lock`."""
        packed = self._packed_refs()
        if name in packed:
            del packed[name]
            text = "".join(f"{sha} {ref}\n" for ref, sha in packed.items())
            self.disk.write(self.path / "packed-refs", text.encode())
        (self.path / name).unlink(missing_ok=True)

    def resolve(self, revision: str) -> str:
        """The commit of a branch, tag, `refs/...` name, or (short) sha; 404 otherwise."""
        names = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        if revision.startswith("refs/"):
            names.insert(0, revision)
        if revision == "HEAD":
            names = ["refs/heads/main"]
        if is_ref_name(revision):
            for name in names:
                if (sha := self.ref(name)) is not None:
                    return self.peel(sha)
        if _SHORT_SHA.match(revision):
            try:
                return self.commit(self._full_sha(revision)).sha
            except HubError:
                pass
        raise revision_not_found(revision)

    def _full_sha(self, short: str) -> str:
        if len(short) == 40:
            return short
        folder = self.path / "objects" / short[:2]
        found = [
            short[:2] + name
            for name in (os.listdir(folder) if folder.is_dir() else [])
            if name.startswith(short[2:]) and self.read_object(short[:2] + name)[0] == "commit"
        ]
        if len(found) != 1:
            raise revision_not_found(short)
        return found[0]


def is_ref_name(name: str) -> bool:
    """Whether git accepts `name` as (the tail of) a ref; also what keeps ref files inside the repo.

    >>> is_ref_name("v1.0"), is_ref_name("a/b"), is_ref_name("../x"), is_ref_name("a b")
    (True, True, False, False)
    """
    if not name or len(name) > 200 or name.startswith(("-", "/")) or name.endswith(("/", ".")) or name == "@":
        return False
    if re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//", name):
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    parts = name.split("/")
    return not any(p.startswith(".") or p.endswith(".lock") or len(p.encode()) > 200 for p in parts)


def _remember(cache: OrderedDict, key: str, value: object, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        try:
            cache.popitem(last=False)
        except KeyError:  # another thread emptied it
            break


def _prune(folder: Path) -> None:
    """Remove empty folders below and including `folder`."""
    for here, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(here)
        except OSError:
            pass
