"""Making commits: the ndjson of a commit call read line by line, applied to a tree, checked, and only then published.

Everything a commit reaches is on disk before its ref moves, and the ref moves by one rename: a reader sees the old
head or the new, and a killed server leaves at worst objects nobody points to.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cards import check_card
from .errors import HubError, bad_request, revision_not_found
from .gitstore import GitStore, is_ref_name
from .history import TreeEditor
from .http import check_path, clean, parse_json
from .lfs import AttributeRules, is_oid, pointer_text
from .repos import Repo

STALE_PARENT = "The branch was updated since you opened this page. Please refresh and try again."


@dataclass
class CommitPlan:
    """What a commit call asks for. Contents of regular files are in the object store already."""

    summary: str = ""
    description: str = ""
    parent: str | None = None
    files: list[tuple[str, str]] = field(default_factory=list)  # path, blob sha
    lfs: list[tuple[str, str, int | None]] = field(default_factory=list)  # path, oid, size
    deleted: list[tuple[str, bool]] = field(default_factory=list)  # path, is folder
    readme: str | None = None

    @property
    def message(self) -> str:
        return f"{self.summary}\n\n{self.description}".rstrip() if self.description else self.summary


def read_plan(repo: Repo, body: Path, max_line: int = 128 * 1024 * 1024) -> CommitPlan:
    """Read the lines of a commit call from disk; regular files go straight to the object store."""
    plan = CommitPlan()
    seen_header = False
    with open(body, "rb") as handle:
        while line := handle.readline(max_line + 1):
            if len(line) > max_line:
                raise HubError(413, "One file of this commit is too large to travel inside it; it must go by LFS")
            if not line.strip():
                continue
            item = parse_json(line)
            if not isinstance(item, dict) or not isinstance(item.get("value"), dict):
                raise bad_request("Each line of a commit must be an object with 'key' and 'value'")
            if item.get("key") == "header":
                seen_header = True
            _apply_line(repo, plan, str(item.get("key")), item["value"])
    if not seen_header:
        raise bad_request("The commit has no header line")
    return plan


def _apply_line(repo: Repo, plan: CommitPlan, key: str, value: dict[str, Any]) -> None:
    if key == "header":
        plan.summary = _text(value, "summary")
        plan.description = _text(value, "description")
        parent = value.get("parentCommit")
        if parent is not None and not isinstance(parent, str):
            raise bad_request('"parentCommit" must be a string')
        plan.parent = parent
        if not plan.summary.strip():
            raise bad_request('"summary" must not be empty')
    elif key == "file":
        path = check_path(value.get("path"))
        content = _content(value)
        if path == "README.md":
            plan.readme = content.decode("utf-8", "replace")
        plan.files.append((path, repo.git.write_object("blob", content)))
    elif key == "lfsFile":
        path = check_path(value.get("path"))
        oid, size = value.get("oid"), value.get("size")
        if value.get("algo", "sha256") != "sha256" or not is_oid(oid):
            raise bad_request(f"lfsFile {path!r}: 'oid' must be a sha256")
        if size is not None and (not isinstance(size, int) or size < 0):
            raise bad_request(f"lfsFile {path!r}: 'size' must be a number of bytes")
        plan.lfs.append((path, str(oid), size))
    elif key in ("deletedFile", "deletedFolder"):
        raw = value.get("path")
        path = check_path(raw.rstrip("/") if isinstance(raw, str) else raw)
        plan.deleted.append((path, key == "deletedFolder"))
    else:
        raise bad_request(f"Unknown operation {key[:40]!r}")


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name) or ""
    if not isinstance(found, str):
        raise bad_request(f'"{name}" must be a string')
    return clean(found, name)


def _content(value: dict[str, Any]) -> bytes:
    content = value.get("content")
    if not isinstance(content, str):
        raise bad_request('"content" must be a string')
    encoding = value.get("encoding", "utf-8")
    if encoding == "base64":
        try:
            return base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            raise bad_request('"content" is not base64') from None
    if encoding != "utf-8":
        raise bad_request('"encoding" must be "base64" or "utf-8"')
    return clean(content, "content").encode()


def build_tree(repo: Repo, base_tree: str | None, plan: CommitPlan) -> str:
    """Apply a plan to a tree; 400/404 where it does not fit."""
    editor = TreeEditor(repo.git, base_tree)
    for path, is_folder in plan.deleted:
        if not editor.delete(path):
            what = "folder" if is_folder else "file"
            raise HubError(404, f"A {what} with this name doesn't exist: {path}", code="EntryNotFound")
    for path, sha in plan.files:
        editor.set(path, sha)
    if plan.readme is not None:
        problems = check_card(plan.readme, repo.kind[:-1]).errors
        if problems:
            text = " ".join(p["message"] for p in problems)
            raise HubError(400, f"Invalid metadata in README.md. {text}", extra={"errors": problems})
    sizes: dict[str, int] = {}
    for path, oid, size in plan.lfs:
        have = repo.lfs.size(oid)
        if have is None:
            raise bad_request(f"LFS pointer pointed to a file that does not exist: {path} (sha256 {oid})")
        if size is not None and size != have:
            raise bad_request(f"lfsFile {path!r}: announced {size} bytes, stored {have}")
        sizes[oid] = have
        editor.set(path, repo.git.write_object("blob", pointer_text(oid, have)))
    _cover_by_attributes(repo, editor, [path for path, _, _ in plan.lfs])
    return editor.write()


def _cover_by_attributes(repo: Repo, editor: TreeEditor, paths: list[str]) -> None:
    """An LFS file that no rule of `.gitattributes` covers gets a line there, so that git-lfs knows it."""
    if not paths:
        return
    entry = editor.get(".gitattributes")
    text = repo.git.blob(entry.sha).decode("utf-8", "replace") if entry and not entry.is_tree else ""
    rules = AttributeRules(text)
    missing = [path for path in dict.fromkeys(paths) if not rules.is_lfs(path)]
    if missing:
        lines = "".join(f"{p.replace(' ', '[[:space:]]')} filter=lfs diff=lfs merge=lfs -text\n" for p in missing)
        joined = text if not text or text.endswith("\n") else text + "\n"
        editor.set(".gitattributes", repo.git.write_object("blob", (joined + lines).encode()))


def commit_on(repo: Repo, ref: str, plan: CommitPlan, author: str) -> str:
    """Commit a plan on top of a ref; 412 where `parentCommit` is not its newest commit."""
    with repo.lock:
        head = repo.git.ref(ref)
        if head is None:
            raise revision_not_found(ref)
        check_parent(repo.git, plan, head)
        tree = build_tree(repo, repo.git.commit(head).tree, plan)
        sha = repo.git.write_commit(tree, [head], author, plan.message)
        repo.git.set_ref(ref, sha)
        return sha


def check_parent(git: GitStore, plan: CommitPlan, head: str) -> None:
    """412 where the caller built on another commit than the newest."""
    if plan.parent is not None and git.resolve(plan.parent) != head:
        raise HubError(412, STALE_PARENT)


def base_branch(repo: Repo, revision: str) -> str:
    """The branch a new PR goes against; 404 for anything else, another PR's ref too."""
    name = revision.removeprefix("refs/heads/")
    if not is_ref_name(name) or name.startswith("refs/") or repo.git.ref(f"refs/heads/{name}") is None:
        raise revision_not_found(revision)
    return name


def branch_ref(repo: Repo, revision: str) -> str:
    """The full ref a commit to `revision` moves: a branch, or a PR ref. 404 for anything else."""
    if is_ref_name(revision):
        for name in (revision if revision.startswith("refs/") else f"refs/heads/{revision}",):
            if name.startswith(("refs/heads/", "refs/pr/")) and repo.git.ref(name) is not None:
                return name
    raise revision_not_found(revision)
