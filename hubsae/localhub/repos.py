"""All repos of a hub: one bare git folder each, their settings beside it, and an index of both in memory.

`<root>/<kind>/<owner>/<name>.git` is the repo; `hub/` inside it holds what git has no place for (`repo.json`,
discussions, access requests, Xet links). Create, move and delete are each one rename of that folder.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .auth import Accounts, Caller
from .cards import card_data, card_tags
from .errors import HubError, RepoMoved, bad_request, repo_not_found
from .files import Disk, read_json
from .gitstore import Entry, GitStore
from .lfs import LfsStore, Pointer, default_gitattributes, parse_pointer
from .xet.cas import CasStore

KINDS = ("models", "datasets", "spaces", "kernels")
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}$")


class BlobInfo(NamedTuple):
    """Size of a file as a reader sees it, and its LFS pointer if it is one."""

    size: int
    lfs: Pointer | None
    pointer_size: int


class Repo:
    """One repo: git store, LFS store and settings."""

    def __init__(self, kind: str, repo_id: str, path: Path, meta: dict[str, Any], disk: Disk, cas: CasStore) -> None:
        self.kind = kind
        self.id = repo_id
        self.path = path
        self.meta = meta
        self.disk = disk
        self.git = GitStore(path, disk)
        self.lfs = LfsStore(path, disk, cas)
        self._blobs: OrderedDict[str, BlobInfo] = OrderedDict()
        self._card: tuple[str, dict[str, Any], str] | None = None
        self._unsaved = 0.0  # when the first count was made that is not on disk yet

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def private(self) -> bool:
        return bool(self.meta.get("private"))

    @property
    def gated(self) -> str | bool:
        return self.meta.get("gated") or False

    @property
    def lock(self) -> threading.RLock:
        return self.git.lock

    @property
    def url_path(self) -> str:
        """Where the repo's page is, without a leading slash."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def relocate(self, repo_id: str, path: Path) -> None:
        """Follow a rename; requests that hold this repo go on under the new name."""
        self.id, self.path = repo_id, path
        self.git.path = self.lfs.repo_path = path

    def save(self) -> None:
        """Write the settings."""
        self._unsaved = 0.0
        self.disk.write_json(self.path / "hub" / "repo.json", self.meta)

    def count_download(self) -> None:
        """One more download. Counts are written at most every few seconds; a crash may lose the last of them."""
        with self.lock:
            self.meta["downloads"] = self.meta.get("downloads", 0) + 1
            self._unsaved = self._unsaved or time.monotonic()
            if time.monotonic() - self._unsaved > 3:
                self.save()

    def flush(self) -> None:
        """Write counts that are only in memory."""
        with self.lock:
            if self._unsaved:
                self.save()

    def head(self) -> str:
        """The newest commit of main."""
        return self.git.resolve("main")

    def last_modified(self) -> int:
        try:
            return self.git.commit(self.head()).when
        except HubError:
            return int(self.meta["created"])

    def blob_info(self, entry: Entry) -> BlobInfo:
        """What kind of file a blob is."""
        if (known := self._blobs.get(entry.sha)) is not None:
            return known
        size = self.git.blob_size(entry.sha)
        pointer = parse_pointer(self.git.blob(entry.sha)) if 100 < size < 1024 else None
        info = BlobInfo(pointer.size if pointer else size, pointer, size)
        self._blobs[entry.sha] = info
        if len(self._blobs) > 50_000:
            self._blobs.popitem(last=False)
        return info

    def text(self, commit: str, path: str) -> str | None:
        """A small text file of a commit, or None."""
        entry = self.git.lookup(self.git.commit(commit).tree, path)
        if entry is None or entry.is_tree:
            return None
        return self.git.blob(entry.sha).decode("utf-8", "replace")

    def card(self, commit: str) -> tuple[dict[str, Any], str]:
        """Metadata and text of the README at a commit."""
        entry = self.git.lookup(self.git.commit(commit).tree, "README.md")
        if entry is None or entry.is_tree:
            return {}, ""
        if self._card is None or self._card[0] != entry.sha:
            text = self.git.blob(entry.sha).decode("utf-8", "replace")
            self._card = (entry.sha, card_data(text), text)
        return self._card[1], self._card[2]

    def tags(self, commit: str) -> list[str]:
        """The tags shown for a repo at a commit."""
        data, text = self.card(commit)
        return card_tags(self.kind, data, text, list(self.git.files(self.git.commit(commit).tree)))


class Registry:
    """Finds, makes, moves and deletes repos. The index is read from disk at start."""

    def __init__(self, root: Path, disk: Disk, cas: CasStore, accounts: Accounts) -> None:
        self.root = root
        self.disk = disk
        self.cas = cas
        self.accounts = accounts
        self.lock = threading.RLock()
        self._by_name: dict[tuple[str, str], Repo] = {}
        self._by_uid: dict[str, Repo] = {}
        self._moved: dict[str, str] = read_json(root / "moved.json") or {}
        for kind in KINDS:
            for path in sorted((root / kind).glob("*/*.git")):
                meta = read_json(path / "hub" / "repo.json")
                if meta is not None:
                    self._enter(Repo(kind, f"{path.parent.name}/{path.name[:-4]}", path, meta, disk, cas))

    def _enter(self, repo: Repo) -> None:
        self._by_name[repo.kind, repo.id.lower()] = repo
        self._by_uid[repo.meta["uid"]] = repo

    def _path(self, kind: str, repo_id: str) -> Path:
        owner, name = repo_id.split("/")
        return self.root / kind / owner / f"{name}.git"

    # -- finding ------------------------------------------------------------------------------------------

    def full_id(self, name: str, caller: Caller) -> str:
        """`name` alone means the caller's own repo."""
        return name if "/" in name or caller.name is None else f"{caller.name}/{name}"

    def find(self, kind: str, name: str, caller: Caller) -> Repo:
        """A repo the caller may see; RepoMoved if it has another name now; RepoNotFound otherwise."""
        repo_id = self.full_id(name, caller)
        repo = self._by_name.get((kind, repo_id.lower()))
        if repo is None:
            target = self._moved.get(f"{kind}/{repo_id}".lower())
            if target and (moved := self._by_uid.get(target)) and self.may_see(moved, caller):
                raise RepoMoved(moved.id)
        if repo is None or not self.may_see(repo, caller):
            raise repo_not_found(caller.known)
        return repo

    def by_uid(self, uid: str) -> Repo:
        """A repo by its inner id (signed urls name it so; the id survives a rename)."""
        repo = self._by_uid.get(uid)
        if repo is None:
            raise HubError(404, "The repository of this url is gone", code="RepoNotFound")
        return repo

    def all(self, kind: str, caller: Caller) -> list[Repo]:
        """All repos of a kind the caller may see."""
        with self.lock:
            repos = [r for (k, _), r in self._by_name.items() if k == kind]
        return [r for r in repos if self.may_see(r, caller)]

    def flush(self) -> None:
        """Write everything that is only in memory."""
        for repo in list(self._by_uid.values()):
            repo.flush()

    # -- rights -------------------------------------------------------------------------------------------

    def may_see(self, repo: Repo, caller: Caller) -> bool:
        return not repo.private or self.accounts.may_read_all(caller, repo.owner)

    def may_write(self, repo: Repo, caller: Caller) -> bool:
        """Members with the role write or admin; a contributor for the repos they made."""
        if self.accounts.may_write(caller, repo.owner):
            return True
        own = caller.role == "write" and repo.meta.get("creator") == caller.name
        return own and self.accounts.role_in(caller, repo.owner) == "contributor"

    def require_write(self, repo: Repo, caller: Caller) -> None:
        """403 unless the caller may change the repo."""
        if not caller.known:
            raise HubError(401, "Invalid username or password.")
        if not self.may_write(repo, caller):
            kind = repo.kind[:-1]
            raise HubError(
                403,
                f"Forbidden: you don't have write access to {kind} {repo.id} with this token. Use a token with write "
                "access, or pass `create_pr=1` as a query parameter to create a Pull Request",
            )

    def require_content(self, repo: Repo, caller: Caller) -> None:
        """401/403 GatedRepo unless the caller may read the files of a gated repo."""
        if not repo.gated or self.accounts.may_read_all(caller, repo.owner):
            return
        granted = (read_json(repo.path / "hub" / "access.json") or {}).get(caller.name or "", {})
        if granted.get("status") == "accepted":
            return
        if not caller.known:
            why = "is restricted. You must have access to it and be authenticated to access it. Please log in."
            raise HubError(401, f"Access to {repo.kind[:-1]} {repo.id} {why}", code="GatedRepo")
        if granted.get("status") == "pending":
            message = f"Your request to access {repo.kind[:-1]} {repo.id} is awaiting a review from the repo authors."
        else:
            message = (
                f"Access to {repo.kind[:-1]} {repo.id} is restricted and you are not in the authorized list. "
                "Visit its page to ask for access."
            )
        raise HubError(403, message, code="GatedRepo")

    def require_namespace(self, caller: Caller, namespace: str) -> str:
        """The canonical namespace if the caller may create repos in it."""
        if not caller.known:
            raise HubError(401, "Invalid username or password.")
        canonical = self.accounts.canonical(namespace)
        role = self.accounts.role_in(caller, namespace)
        if canonical is None or caller.role != "write" or role not in ("admin", "write", "contributor"):
            raise HubError(403, f'You don\'t have the rights to create a repo under the namespace "{namespace}"')
        return canonical

    # -- changing -----------------------------------------------------------------------------------------

    def create(
        self, kind: str, namespace: str, name: str, creator: str, private: bool, extra: dict[str, Any] | None = None
    ) -> Repo:
        """Make a repo with its first commit."""
        check_name(name)
        repo_id = f"{namespace}/{name}"
        with self.lock:
            if (known := self._by_name.get((kind, repo_id.lower()))) is not None:
                raise RepoExists(known)
            building = self.disk.temp_path("new")
            GitStore.init(building)
            meta = {
                "uid": uuid.uuid4().hex[:24],
                "private": private,
                "gated": False,
                "created": time.time(),
                "creator": creator,
                "downloads": 0,
                "likes": [],
                **(extra or {}),
            }
            (building / "hub").mkdir()
            (building / "hub" / "repo.json").write_text(json.dumps(meta))
            git = GitStore(building, self.disk)
            files = {".gitattributes": default_gitattributes(kind)}
            if kind == "spaces":
                files["README.md"] = _space_readme(name, str(meta.get("sdk") or "static"))
            tree = git.write_tree({n: Entry("100644", git.write_object("blob", t.encode())) for n, t in files.items()})
            git.set_ref("refs/heads/main", git.write_commit(tree, [], creator, "initial commit"))
            target = self._path(kind, repo_id)
            target.parent.mkdir(parents=True, exist_ok=True)
            building.rename(target)
            repo = Repo(kind, repo_id, target, meta, self.disk, self.cas)
            self._enter(repo)
            if self._moved.pop(f"{kind}/{repo_id}".lower(), None):
                self.disk.write_json(self.root / "moved.json", self._moved)
            return repo

    def _require_here(self, repo: Repo) -> None:
        """404 where another request deleted the repo while this one waited for the lock."""
        if self._by_uid.get(repo.meta["uid"]) is not repo:
            raise repo_not_found(True)

    def delete(self, repo: Repo) -> None:
        """Remove a repo and everything in it."""
        with self.lock, repo.lock:
            self._require_here(repo)
            self._by_name.pop((repo.kind, repo.id.lower()), None)
            self._by_uid.pop(repo.meta["uid"], None)
            self.disk.remove_tree(repo.path)

    def move(self, repo: Repo, new_id: str) -> Repo:
        """Rename a repo; the old name keeps answering with a redirect."""
        with self.lock, repo.lock:
            self._require_here(repo)
            taken = self._by_name.get((repo.kind, new_id.lower()))
            if taken is not None and taken is not repo:
                raise HubError(409, f"A {repo.kind[:-1]} repository called {new_id} already exists")
            target = self._path(repo.kind, new_id)
            target.parent.mkdir(parents=True, exist_ok=True)
            old_id = repo.id
            self._moved[f"{repo.kind}/{old_id}".lower()] = repo.meta["uid"]
            self._moved.pop(f"{repo.kind}/{new_id}".lower(), None)
            self.disk.write_json(self.root / "moved.json", self._moved)
            repo.path.rename(target)
            del self._by_name[repo.kind, old_id.lower()]
            repo.relocate(new_id, target)
            self._enter(repo)
            return repo


class RepoExists(Exception):
    """create() found the name taken."""

    def __init__(self, repo: Repo) -> None:
        super().__init__(repo.id)
        self.repo = repo


def check_name(name: str) -> None:
    """400 for names the Hub refuses (and any that could leave the folder)."""
    if not _NAME.match(name) or ".." in name or "--" in name or name.endswith((".git", ".ipynb", ".", "-")):
        raise bad_request(
            f"Invalid repo name: {name!r}. Use 1 to 96 letters, digits, '-', '_' or '.'; no '--' or '..', not ending "
            "in '.', '-', '.git' or '.ipynb'"
        )


def iso(seconds: float) -> str:
    """A time as the Hub writes it.

    >>> iso(0)
    '1970-01-01T00:00:00.000Z'
    """
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{int(seconds % 1 * 1000):03d}Z"


def _space_readme(name: str, sdk: str) -> str:
    return (
        f"---\ntitle: {name}\nemoji: 🏃\ncolorFrom: gray\ncolorTo: blue\nsdk: {sdk}\npinned: false\n---\n\n# {name}\n"
    )
