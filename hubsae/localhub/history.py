"""Work on trees and history: edit a tree, find merge bases, merge three ways, list commits, last change of a path."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from difflib import SequenceMatcher

from .errors import HubError
from .gitstore import FILE_MODE, TREE_MODE, Commit, Entry, GitStore


class PathTaken(HubError):
    """A name cannot be a file and a folder at once; nothing is replaced silently."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


class TreeEditor:
    """An editable copy of a tree; folders are loaded when touched and vanish when empty."""

    def __init__(self, store: GitStore, tree_sha: str | None = None) -> None:
        self.store = store
        self.children: dict[str, Entry | TreeEditor] = dict(store.tree(tree_sha)) if tree_sha else {}

    def _folder(self, parts: list[str], create: bool) -> TreeEditor | None:
        here = self
        for name in parts:
            child = here.children.get(name)
            if isinstance(child, Entry):
                child = TreeEditor(self.store, child.sha) if child.is_tree else child
            if not isinstance(child, TreeEditor):
                if not create:
                    return None
                if child is not None:
                    raise PathTaken(f"{name!r} is a file here; delete it in the same commit to make a folder of it")
                child = TreeEditor(self.store)
            here.children[name] = child
            here = child
        return here

    def set(self, path: str, sha: str, mode: str = FILE_MODE) -> None:
        """Put a file; PathTaken where a folder has the name, or a file the name of one of its folders."""
        *folders, name = path.split("/")
        folder = self._folder(folders, create=True)
        assert folder is not None
        there = folder.children.get(name)
        if (isinstance(there, Entry) and there.is_tree) or (isinstance(there, TreeEditor) and there._has_files()):
            raise PathTaken(f"{path!r} is a folder here; delete it in the same commit to put a file in its place")
        folder.children[name] = Entry(mode, sha)

    def delete(self, path: str) -> bool:
        """Remove a file or a whole folder; False where there is none."""
        *folders, name = path.split("/")
        folder = self._folder(folders, create=False)
        return folder is not None and folder.children.pop(name, None) is not None

    def get(self, path: str) -> Entry | None:
        """The file at `path`, if there is one."""
        *folders, name = path.split("/")
        folder = self._folder(folders, create=False)
        child = folder.children.get(name) if folder else None
        return child if isinstance(child, Entry) else None

    def write(self) -> str:
        """Store the tree and return its id."""
        entries: dict[str, Entry] = {}
        for name, child in self.children.items():
            if isinstance(child, TreeEditor):
                if not child._has_files():
                    continue
                child = Entry(TREE_MODE, child.write())
            entries[name] = child
        return self.store.write_tree(entries)

    def _has_files(self) -> bool:
        return any(isinstance(c, Entry) or c._has_files() for c in self.children.values())


def log(store: GitStore, start: str) -> Iterator[Commit]:
    """Commits reachable from `start`, newest first."""
    heap = [(-store.commit(start).when, 0, start)]
    seen = {start}
    count = 0
    while heap:
        commit = store.commit(heapq.heappop(heap)[2])
        yield commit
        for parent in commit.parents:
            if parent not in seen:
                seen.add(parent)
                count += 1
                heapq.heappush(heap, (-store.commit(parent).when, count, parent))


def merge_base(store: GitStore, ours: str, theirs: str) -> str | None:
    """The newest commit both sides have; None for unrelated histories."""
    mine = {commit.sha for commit in log(store, ours)}
    return next((commit.sha for commit in log(store, theirs) if commit.sha in mine), None)


def merge_trees(store: GitStore, base: str | None, ours: str, theirs: str) -> tuple[str, list[str]]:
    """Three-way merge of trees; returns the new tree and the paths in conflict (then the tree is ours there).

    A path changed on one side only is taken from it; text changed on both sides is merged by lines.
    """
    in_base = store.files(base) if base else {}
    in_ours = store.files(ours)
    in_theirs = store.files(theirs)
    editor = TreeEditor(store, ours)
    conflicts = []
    # what they deleted first: a file may have become a folder, or a folder a file
    for path in sorted(in_base.keys() | in_theirs.keys(), key=lambda path: (path in in_theirs, path)):
        old, mine, new = in_base.get(path), in_ours.get(path), in_theirs.get(path)
        if new in (old, mine):
            continue
        if mine == old:
            if new is None:
                editor.delete(path)
                continue
            try:
                editor.set(path, new.sha, new.mode)
            except PathTaken:
                conflicts.append(path)
            continue
        merged = None
        if old and mine and new:
            merged = merge_text(store.blob(old.sha), store.blob(mine.sha), store.blob(new.sha))
        if merged is None:
            conflicts.append(path)
        else:
            editor.set(path, store.write_object("blob", merged))
    return editor.write(), sorted(conflicts)


def merge_text(base: bytes, ours: bytes, theirs: bytes) -> bytes | None:
    """Merge two edits of a text by lines, or None where both changed the same place (or it is not text).

    >>> merge_text(b"a\\nb\\nc\\n", b"A\\nb\\nc\\n", b"a\\nb\\nC\\n")
    b'A\\nb\\nC\\n'
    """
    if any(b"\0" in side for side in (base, ours, theirs)) or max(map(len, (base, ours, theirs))) > 2_000_000:
        return None
    if ours.startswith(b"version https://git-lfs"):
        return None
    old, mine, new = (side.splitlines(keepends=True) for side in (base, ours, theirs))
    edits = sorted(_edits(old, mine) + _edits(old, new), key=lambda e: (e[0], e[1]))
    out: list[bytes] = []
    at = 0
    last: tuple[int, int, list[bytes]] | None = None
    for edit in edits:
        start, end, lines = edit
        if edit == last:
            continue  # both made the same change
        if last is not None and start <= last[1]:
            return None  # overlapping or touching changes: a person decides, as git does
        out += old[at:start] + lines
        at = end
        last = edit
    return b"".join(out + old[at:])


def _edits(old: list[bytes], new: list[bytes]) -> list[tuple[int, int, list[bytes]]]:
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    return [(i1, i2, new[j1:j2]) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"]


def last_commits(store: GitStore, start: str, paths: list[str]) -> dict[str, Commit]:
    """For each path the newest commit (along first parents) that changed it."""
    found: dict[str, Commit] = {}
    open_paths = set(paths)
    commit: Commit | None = store.commit(start)
    while commit is not None and open_paths:
        parent = store.commit(commit.parents[0]) if commit.parents else None
        for path in list(open_paths):
            before = store.lookup(parent.tree, path) if parent else None
            if before != store.lookup(commit.tree, path):
                found[path] = commit
                open_paths.discard(path)
        commit = parent
    return found


def unified_diff(store: GitStore, base: str | None, theirs: str) -> str:
    """What `theirs` changed since `base`, as a git-like unified diff (text files in full, others named)."""
    import difflib

    before = store.files(base) if base else {}
    after = store.files(theirs)
    out: list[str] = []
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        out.append(f"diff --git a/{path} b/{path}\n")
        one = store.blob(old.sha) if old else b""
        two = store.blob(new.sha) if new else b""
        if b"\0" in one or b"\0" in two or len(one) + len(two) > 400_000:
            out.append(f"Binary files a/{path} and b/{path} differ\n")
            continue
        left, right = (side.decode("utf-8", "replace").splitlines(keepends=True) for side in (one, two))
        names = f"a/{path}" if old else "/dev/null", f"b/{path}" if new else "/dev/null"
        out += (line if line.endswith("\n") else line + "\n" for line in difflib.unified_diff(left, right, *names))
    return "".join(out)
