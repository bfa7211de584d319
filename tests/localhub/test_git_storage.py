"""The folder is plain git: the real git reads what the hub wrote, and the hub reads what git packed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hubsae.localhub.files import Disk
from hubsae.localhub.gitstore import Entry, GitStore, is_ref_name
from hubsae.localhub.history import PathTaken, TreeEditor, last_commits, merge_base, merge_text, merge_trees


def store(tmp_path: Path) -> GitStore:
    GitStore.init(tmp_path / "r.git")
    return GitStore(tmp_path / "r.git", Disk(tmp_path, fsync=False))


def tree_of(git_store: GitStore, files: dict[str, str], base: str | None = None) -> str:
    editor = TreeEditor(git_store, base)
    for path, text in files.items():
        editor.set(path, git_store.write_object("blob", text.encode()))
    return editor.write()


def test_git_accepts_and_shows_every_commit(git, raw):
    raw.create()
    raw.commit({"a.txt": b"1", "b/c.txt": b"2", "b.txt": b"3", "b-/x": b"4"})
    raw.commit({"a.txt": None, "b/d/e.txt": "ü".encode()})
    raw("POST", "/api/models/local/x/branch/dev", {})
    raw("POST", "/api/models/local/x/tag/main", {"tag": "v1", "message": "first"})
    raw.commit({"pr.txt": b"x"}, query="?create_pr=1")
    assert git("fsck", "--strict", "--full").strip() == ""
    assert git("log", "--format=%s", "main").split("\n")[:2] == ["change", "change"]
    assert git("ls-tree", "-r", "--name-only", "main").split() == [
        ".gitattributes",
        "b-/x",
        "b.txt",
        "b/c.txt",
        "b/d/e.txt",
    ]
    assert git("cat-file", "-t", "v1").strip() == "tag"
    assert git("show", "refs/pr/1:pr.txt") == "x"


def test_a_clone_of_the_folder_has_the_files(hub, raw, tmp_path):
    raw.create()
    raw.commit({"a.txt": b"hello"})
    raw.commit_lfs("w.bin", b"weights" * 100)
    path = hub.git_path("local/x")
    subprocess.run(
        ["git", "-c", "safe.directory=*", "clone", "-q", str(path), str(tmp_path / "clone")],
        check=True,
        env={"GIT_LFS_SKIP_SMUDGE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert (tmp_path / "clone" / "a.txt").read_text() == "hello"
    assert (tmp_path / "clone" / "w.bin").read_text().startswith("version https://git-lfs")
    # git-lfs keeps objects of a bare repo exactly here
    oid = (tmp_path / "clone" / "w.bin").read_text().split("sha256:")[1].split()[0]
    assert (path / "lfs" / "objects" / oid[:2] / oid[2:4] / oid).read_bytes() == b"weights" * 100


def test_a_repo_that_was_packed_by_git_still_serves_and_grows(hub, git, raw):
    raw.create()
    raw.commit({"a.txt": b"hello"})
    raw("POST", "/api/models/local/x/tag/main", {"tag": "v1"})
    git("gc", "-q", "--prune=now")
    git("pack-refs", "--all")
    assert not list(hub.git_path("local/x").glob("objects/[0-9a-f][0-9a-f]/*"))
    hub.hub.registry.find("models", "local/x", _owner()).git._commits.clear()
    assert raw("GET", "/local/x/resolve/v1/a.txt").body == b"hello"
    assert raw.commit({"b.txt": b"more"}).status == 200
    assert raw("DELETE", "/api/models/local/x/tag/v1").status == 200
    assert raw("GET", "/local/x/resolve/v1/a.txt").headers["x-error-code"] == "RevisionNotFound"
    assert git("fsck", "--full").strip() == ""


def _owner():
    from hubsae.localhub.auth import Caller

    return Caller("local", "write")


def test_refs_that_git_cannot_hold_are_refused(tmp_path):
    for name in (
        "",
        "/a",
        "a/",
        "a..b",
        "a b",
        "a~1",
        ".a",
        "a/.b",
        "a.lock",
        "x" * 300,
        "a\x00",
        "-a",
        "@",
        "a@{1}",
        "../../x",
    ):
        assert not is_ref_name(name), name
    git_store = store(tmp_path)
    sha = git_store.write_commit(tree_of(git_store, {"a": "1"}), [], "me", "m")
    git_store.set_ref("refs/heads/a/b", sha)
    try:
        git_store.set_ref("refs/heads/a", sha)
        raise AssertionError("a and a/b cannot both be refs")
    except Exception as why:
        assert "conflicts" in str(why)
    git_store.delete_ref("refs/heads/a/b")
    git_store.set_ref("refs/heads/a", sha)
    assert git_store.refs("heads") == {"a": sha}


def test_tree_editor_replaces_prunes_and_reports(tmp_path):
    git_store = store(tmp_path)
    base = tree_of(git_store, {"a/b/c": "1", "a/d": "2"})
    editor = TreeEditor(git_store, base)
    assert editor.delete("a/b") and not editor.delete("a/b/c") and not editor.delete("zzz")
    blob = git_store.write_object("blob", b"3")
    for path in ("a/d/e", "a"):
        with pytest.raises(PathTaken):
            editor.set(path, blob)
    assert editor.delete("a/d")
    editor.set("a/d/e", blob)
    with pytest.raises(PathTaken):
        editor.set("a/d", blob)
    assert list(git_store.files(editor.write())) == ["a/d/e"]
    assert editor.delete("a/d/e")
    assert editor.write() == git_store.write_tree({})


def test_three_way_merge_takes_both_sides_and_names_conflicts(tmp_path):
    git_store = store(tmp_path)
    text = "".join(f"line {i}\n" for i in range(20))
    base = tree_of(git_store, {"same": "s", "ours": "o", "theirs": "t", "gone": "g", "both": text, "clash": "c"})
    ours = tree_of(git_store, {"ours": "O", "both": text.replace("line 2\n", "LINE 2\n"), "clash": "x"}, base)
    theirs_editor = TreeEditor(
        git_store,
        tree_of(git_store, {"theirs": "T", "new": "n", "both": text.replace("line 15", "LINE 15"), "clash": "y"}, base),
    )
    theirs_editor.delete("gone")
    merged, conflicts = merge_trees(git_store, base, ours, theirs_editor.write())
    assert conflicts == ["clash"]
    found = {path: git_store.blob(entry.sha).decode() for path, entry in git_store.files(merged).items()}
    assert found == {
        "same": "s",
        "ours": "O",
        "theirs": "T",
        "new": "n",
        "clash": "x",
        "both": text.replace("line 2\n", "LINE 2\n").replace("line 15", "LINE 15"),
    }


def test_text_merge_agrees_with_git_merge_file(tmp_path):
    """Random edits of a text: where git merges without conflict and we do too, the results are equal."""
    import random

    rng = random.Random(0)
    agreed = 0
    for _ in range(60):
        base = [f"{rng.randrange(6)}\n" for _ in range(25)]
        sides = []
        for _ in range(2):
            side = list(base)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(side))
                side[at : at + rng.randrange(2)] = [f"new{rng.randrange(100)}\n"] * rng.randrange(3)
            sides.append(side)
        paths = []
        for name, lines in zip(("ours", "base", "theirs"), (sides[0], base, sides[1]), strict=True):
            (tmp_path / name).write_text("".join(lines))
            paths.append(str(tmp_path / name))
        theirs = subprocess.run(["git", "merge-file", "-p", *paths], capture_output=True)
        ours = merge_text(*("".join(x).encode() for x in (base, *sides)))
        if ours is not None and theirs.returncode == 0:
            agreed += ours == theirs.stdout
        elif ours is not None:
            raise AssertionError("merged what git calls a conflict")
    assert agreed >= 10


def test_merge_base_and_last_change(tmp_path):
    git_store = store(tmp_path)
    one = git_store.write_commit(tree_of(git_store, {"a": "1", "b": "1"}), [], "me", "one", when=1)
    two = git_store.write_commit(tree_of(git_store, {"a": "2", "b": "1"}), [one], "me", "two", when=2)
    side = git_store.write_commit(tree_of(git_store, {"a": "1", "b": "3"}), [one], "me", "side", when=3)
    three = git_store.write_commit(tree_of(git_store, {"a": "2", "b": "1", "c": "1"}), [two], "me", "three", when=4)
    assert merge_base(git_store, three, side) == one
    assert {p: c.title for p, c in last_commits(git_store, three, ["a", "b", "c"]).items()} == {
        "a": "two",
        "b": "one",
        "c": "three",
    }


def test_entries_with_odd_names_survive(tmp_path):
    git_store = store(tmp_path)
    sha = git_store.write_tree({"ü ☃": Entry("100644", git_store.write_object("blob", b"x"))})
    git_store._trees.clear()
    assert list(git_store.tree(sha)) == ["ü ☃"]
