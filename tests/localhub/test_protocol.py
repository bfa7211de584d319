"""Behaviours the clients depend on and that a plain file server would get wrong (the protocol's small print)."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest


def lines(*items) -> bytes:
    return "\n".join(json.dumps(item) for item in items).encode()


def test_a_stale_parent_is_refused(raw):
    raw.create()
    first = raw.commit({"a": b"1"}).json["commitOid"]
    second = raw.commit({"a": b"2"}, parentCommit=first).json["commitOid"]
    stale = raw.commit({"a": b"3"}, parentCommit=first)
    assert stale.status == 412 and "The branch was updated since you opened this page" in stale.json["error"]
    assert raw.commit({"a": b"3"}, parentCommit=second[:10]).status == 200, "a short sha will do"


def test_commit_urls_follow_the_host_that_was_asked(raw):
    raw.create()
    got = raw(
        "POST",
        "/api/models/local/x/commit/main",
        lines({"key": "header", "value": {"summary": "s"}}),
        headers={"Host": "hub.lab:8000"},
    )
    assert got.json["commitUrl"].startswith("http://hub.lab:8000/local/x/commit/")


@pytest.mark.parametrize(
    "path", ["../x", "a/../x", "..\\x", "/x", "a//b", ".git/config", "a/.GIT/x", "", "a\x00b", "x" * 5000, "\ud800"]
)
def test_paths_that_mean_another_place_are_refused(raw, path):
    raw.create()
    value = {"path": path, "content": "eA==", "encoding": "base64"}
    got = raw(
        "POST",
        "/api/models/local/x/commit/main",
        lines({"key": "header", "value": {"summary": "s"}}, {"key": "file", "value": value}),
    )
    assert got.status in (400, 422)
    assert raw("POST", "/api/models/local/x/preupload/main", {"files": [{"path": path, "size": 1}]}).status in (
        400,
        422,
    )


def test_a_commit_that_cannot_be_whole_changes_nothing(raw):
    raw.create()
    before = raw("GET", "/api/models/local/x").json["sha"]
    header = {"key": "header", "value": {"summary": "s"}}
    good = {"key": "file", "value": {"path": "a", "content": "eA==", "encoding": "base64"}}
    bad = [
        {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "0" * 64}},
        {"key": "deletedFile", "value": {"path": "nothing"}},
        {"key": "deletedFolder", "value": {"path": "nothing"}},
        {"key": "file", "value": {"path": "b", "content": "%%%", "encoding": "base64"}},
        {
            "key": "file",
            "value": {"path": "README.md", "content": "---\nlicense: nonsense\n---\n", "encoding": "utf-8"},
        },
        {"key": "what", "value": {}},
    ]
    for item in bad:
        assert raw("POST", "/api/models/local/x/commit/main", lines(header, good, item)).status in (400, 404), item
    assert raw("POST", "/api/models/local/x/commit/main", lines(good)).status == 400
    assert raw("GET", "/api/models/local/x").json["sha"] == before


def test_preupload_knows_modes_ignores_and_ids(raw):
    raw.create()
    raw.commit({"a.txt": b"1", ".gitignore": b"*.log\n"})
    raw.commit_lfs("w.safetensors", b"w")
    sizes = {
        "a.txt": 1,
        "w.safetensors": 1,
        "new.safetensors": 1,
        "big.txt": 20_000_000,
        "x.log": 1,
        "sub/x.parquet": 1,
    }
    got = raw(
        "POST", "/api/models/local/x/preupload/main", {"files": [{"path": p, "size": s} for p, s in sizes.items()]}
    )
    by_path = {f["path"]: f for f in got.json["files"]}
    assert {p: f["uploadMode"] for p, f in by_path.items()} == {
        "a.txt": "regular",
        "w.safetensors": "lfs",
        "new.safetensors": "lfs",
        "big.txt": "lfs",
        "x.log": "regular",
        "sub/x.parquet": "lfs",
    }
    assert [p for p, f in by_path.items() if f["shouldIgnore"]] == ["x.log"]
    assert (
        len(by_path["a.txt"]["oid"]) == 40
        and len(by_path["w.safetensors"]["oid"]) == 64
        and "oid" not in by_path["big.txt"]
    )
    own = raw(
        "POST", "/api/models/local/x/preupload/main", {"files": [{"path": "a.txt", "size": 1}], "gitIgnore": "a.*"}
    )
    assert own.json["files"][0]["shouldIgnore"]


def test_an_lfs_file_no_rule_covers_gets_one(raw):
    raw.create()
    raw.commit_lfs("odd name.xyz", b"w")
    assert raw("GET", "/local/x/raw/main/.gitattributes").body.endswith(
        b"odd[[:space:]]name.xyz filter=lfs diff=lfs merge=lfs -text\n"
    )
    assert (
        raw("POST", "/api/models/local/x/preupload/main", {"files": [{"path": "odd name.xyz", "size": 1}]}).json[
            "files"
        ][0]["uploadMode"]
        == "lfs"
    )


@pytest.mark.parametrize("kind", ["file", "lfsFile"])
def test_a_name_is_a_file_or_a_folder_and_nothing_is_replaced_silently(raw, kind):
    """As in git: `a` and `a/b` cannot both be files, and what is in the way goes only when the commit deletes it."""
    raw.create()

    def change(*paths: str, deleted: tuple[str, ...] = ()) -> int:
        lines: list = [{"key": "header", "value": {"summary": "change"}}]
        lines += [{"key": "deletedFile", "value": {"path": path}} for path in deleted]
        for path in paths:
            value: dict = {"path": path, "content": path}
            if kind == "lfsFile":
                value = {"path": path, "algo": "sha256", "oid": raw.lfs(path.encode()), "size": len(path)}
            lines.append({"key": kind, "value": value})
        return raw("POST", "/api/models/local/x/commit/main", "\n".join(map(json.dumps, lines)).encode()).status

    assert change("a", "a/b") == change("a/b", "a") == 400
    assert change("d/one", "d/two", "f") == 200
    assert change("d") == change("f/deep/er") == 400
    files = {f["path"] for f in raw("GET", "/api/models/local/x/tree/main?recursive=1").json}
    assert files == {".gitattributes", "d", "d/one", "d/two", "f"}
    assert change("d", deleted=("d",)) == change("f/deep/er", deleted=("f",)) == 200
    files = {f["path"] for f in raw("GET", "/api/models/local/x/tree/main?recursive=1").json}
    assert files == {".gitattributes", "d", "f", "f/deep", "f/deep/er"}


def test_a_pull_request_goes_against_a_branch(raw):
    """Everything that announces a new PR refuses another base, also the calls that come before the commit."""
    raw.create()
    assert raw.commit({"a": b"1"}, query="?create_pr=1").status == 200
    head = raw("GET", "/api/models/local/x/revision/main").json["sha"]
    raw("POST", "/api/models/local/x/tag/main", {"tag": "v1"})
    files = {"files": [{"path": "b", "size": 1, "sample": "YQ=="}]}
    for base, fine in (("refs/pr/1", False), ("v1", False), (head, False), ("main", True)):
        name = quote(base, safe="")
        status = 200 if fine else 404
        assert raw("POST", f"/api/models/local/x/preupload/{name}?create_pr=1", files).status == status, base
        assert raw("GET", f"/api/models/local/x/xet-write-token/{name}?create_pr=1").status == status, base
        assert raw.commit({"b": b"1"}, revision=name, query="?create_pr=1").status == status, base
    assert raw("GET", "/api/models/local/x/discussions").json["count"] == 2, "no empty pull request stays behind"


def test_merging_turns_files_into_folders_and_names_what_is_in_the_way(raw):
    raw.create()
    raw.commit({"a": b"1", "d/e": b"1"})
    raw.commit({"a": None, "d/e": None}, query="?create_pr=1")
    assert raw.commit({"a/b": b"2", "d": b"2"}, revision="refs%2Fpr%2F1").status == 200
    raw.commit({"d/new": b"3"})
    assert raw("GET", "/api/models/local/x/discussions/1").json["filesWithConflicts"] == ["d"]
    raw.commit({"d/new": None})
    assert raw("POST", "/api/models/local/x/discussions/1/merge", {}).status == 200
    files = {f["path"] for f in raw("GET", "/api/models/local/x/tree/main?recursive=1").json}
    assert files == {".gitattributes", "a", "a/b", "d"}


def test_trees_come_in_pages_that_keep_the_query(local_hub_factory, raw_for):
    raw = raw_for(local_hub_factory(page_size=40))
    raw.create()
    raw.commit({f"d/{i:03d}.txt": b"x" for i in range(95)})
    found, path, pages = [], "/api/models/local/x/tree/main/d?recursive=true&expand=false", 0
    while path:
        got = raw("GET", path)
        found += [e["path"] for e in got.json]
        link = got.headers.get("link", "")
        assert not link or ("recursive=true" in link and 'rel="next"' in link)
        path = "/" + link.split(">")[0].split("/", 3)[3] if link else ""
        pages += 1
    assert found == [f"d/{i:03d}.txt" for i in range(95)] and pages == 3
    expanded = raw("GET", "/api/models/local/x/tree/main/d?expand=true").json
    assert len(expanded) == 2 and expanded[0]["lastCommit"]["title"] == "change" and "securityFileStatus" in expanded[0]


def test_tree_and_paths_of_odd_places(raw):
    raw.create()
    raw.commit({"a/b.txt": b"1", "a b/ü.txt": b"2"})
    listing = raw("GET", "/api/models/local/x/tree/main?recursive=1").json
    assert {(e["type"], e["path"]) for e in listing} >= {("directory", "a"), ("file", "a/b.txt"), ("file", "a b/ü.txt")}
    assert raw("GET", "/api/models/local/x/tree/main/nothing").headers["x-error-code"] == "EntryNotFound"
    assert raw("GET", "/local/x/resolve/main/a%20b/%C3%BC.txt").body == b"2"
    form = b"paths=a%2Fb.txt&paths=a&paths=nothing&expand=true"
    got = raw(
        "POST",
        "/api/models/local/x/paths-info/main",
        form,
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert [(e["type"], e["path"]) for e in got.json] == [("file", "a/b.txt"), ("directory", "a")]
    assert all("lastCommit" in e for e in got.json)


def test_revisions_are_one_piece_of_the_url(raw):
    raw.create()
    raw("POST", "/api/models/local/x/branch/feature%2Fone", {})
    raw.commit({"a.txt": b"1"}, revision="feature%2Fone")
    raw.commit({"b.txt": b"2"}, query="?create_pr=1")
    assert raw("GET", "/local/x/resolve/feature%2Fone/a.txt").body == b"1"
    assert raw("GET", "/local/x/resolve/refs%2Fpr%2F1/b.txt").body == b"2"
    sha = raw("GET", "/api/models/local/x/revision/feature%2Fone").json["sha"]
    assert raw("GET", f"/local/x/resolve/{sha[:8]}/a.txt").headers["x-repo-commit"] == sha


def test_branches_and_tags_say_why_not(raw):
    raw.create()
    assert raw("POST", "/api/models/local/x/branch/b", {}).status == 200
    again = raw("POST", "/api/models/local/x/branch/b", {})
    assert again.status == 409 and again.json["error"] == "Reference refs/heads/b already exists"
    assert "Cannot delete refs/heads/main" in raw("DELETE", "/api/models/local/x/branch/main").json["error"]
    assert (
        raw("POST", "/api/models/local/x/branch/c", {"startingPoint": "zzz"}).json["error"].startswith("Invalid rev id")
    )
    assert raw("POST", "/api/models/local/x/tag/main", {"tag": "bad name"}).status == 400
    assert raw("POST", "/api/models/local/x/tag/main", {"tag": "b"}).status == 200, "a tag may be called like a branch"
    assert raw("POST", "/api/models/local/x/tag/main", {"tag": "b"}).status == 409
    assert raw("DELETE", "/api/models/local/x/tag/b").status == 200
    assert raw("DELETE", "/api/models/local/x/branch/b").status == 200
    assert raw("DELETE", "/api/models/local/x/branch/b").headers["x-error-code"] == "RevisionNotFound"


def test_squash_works_on_any_ref_and_keeps_the_files(raw, git):
    raw.create()
    for i in range(5):
        raw.commit({f"{i}.txt": b"x"})
    raw.commit({"pr.txt": b"x"}, query="?create_pr=1")
    raw.commit({"pr2.txt": b"x"}, revision="refs%2Fpr%2F1")
    assert raw("POST", "/api/models/local/x/super-squash/main", {"message": "one"}).status == 200
    assert git("rev-list", "--count", "main").strip() == "1" and len(git("ls-tree", "--name-only", "main").split()) == 6
    assert raw("POST", "/api/models/local/x/super-squash/refs%2Fpr%2F1", {}).status == 200
    assert git("rev-list", "--count", "refs/pr/1").strip() == "1"


def test_pull_requests_merge_three_ways_and_name_conflicts(raw):
    raw.create()
    raw.commit({"a.txt": b"1\n2\n3\n4\n5\n6\n", "b.txt": b"b"})
    raw.commit({"a.txt": b"1\n2\n3\n4\n5\nSIX\n"}, query="?create_pr=1", summary="Last line")
    raw.commit({"b.txt": b"mine"}, query="?create_pr=1", summary="Clash")
    raw.commit({"a.txt": b"ONE\n2\n3\n4\n5\n6\n", "b.txt": b"other"})
    view = raw("GET", "/api/models/local/x/discussions/2?diff=1").json
    assert (
        view["filesWithConflicts"] == ["b.txt"]
        and "+mine" in view["diff"]
        and view["changes"]["base"] == "refs/heads/main"
    )
    clash = raw("POST", "/api/models/local/x/discussions/2/merge", {})
    assert clash.status == 409 and "b.txt" in clash.json["error"]
    assert raw("POST", "/api/models/local/x/discussions/1/merge", {"comment": "thanks"}).status == 200
    assert raw("GET", "/local/x/resolve/main/a.txt").body == b"ONE\n2\n3\n4\n5\nSIX\n"
    newest = raw("GET", "/api/models/local/x/commits/main").json[0]
    assert newest["title"] == "Last line (#1)"
    assert raw("POST", "/api/models/local/x/discussions/1/merge", {}).status == 400
    assert raw("POST", "/api/models/local/x/discussions/2/status", {"status": "closed"}).json["newStatus"]["data"] == {
        "status": "closed"
    }


def test_a_new_pull_request_is_a_draft_without_changes(raw):
    raw.create()
    made = raw(
        "POST", "/api/models/local/x/discussions", {"title": "Later", "description": "d", "pullRequest": True}
    ).json
    assert made["num"] == 1 and made["status"] == "draft"
    assert (
        raw("GET", "/api/models/local/x/revision/refs%2Fpr%2F1").json["sha"]
        == raw("GET", "/api/models/local/x").json["sha"]
    )
    talk = raw("POST", "/api/models/local/x/discussions", {"title": "Talk", "description": "d"}).json
    assert talk["num"] == 2 and not talk["isPullRequest"]
    event = raw("POST", "/api/models/local/x/discussions/2/comment", {"comment": "hi"}).json["newMessage"]
    path = f"/api/models/local/x/discussions/2/comment/{event['id']}"
    assert raw("POST", f"{path}/edit", {"content": "hello"}).json["updatedComment"]["data"]["latest"]["raw"] == "hello"
    assert raw("POST", f"{path}/edit", {"content": "x"}, token="hf_eve").status == 403
    assert raw("POST", f"{path}/hide", {}).json["updatedComment"]["data"]["hidden"] is True
    assert raw("POST", "/api/models/local/x/discussions/2/title", {"title": "Other"}).status == 200
    assert [
        d["num"] for d in raw("GET", "/api/models/local/x/discussions?type=discussion&status=open").json["discussions"]
    ] == [2]


def test_card_checks_speak_both_forms(raw):
    good, bad = "---\nlicense: mit\n---\n", "---\nmodel-index: foo\n---\n"
    assert raw("POST", "/api/validate-yaml", {"content": good, "repoType": "model"}).json == {
        "errors": [],
        "warnings": [],
    }
    got = raw("POST", "/api/validate-yaml", {"content": bad, "repoType": "model"})
    assert got.status == 400 and got.json["errors"] == [{"message": '"model-index" must be an array'}]
    text = raw("POST", "/api/validate-yaml", {"content": bad, "repoType": "model"}, headers={"Accept": "text/plain"})
    assert text.body.decode() == '- Error: "model-index" must be an array'
    empty = raw("POST", "/api/validate-yaml", {"content": "no front matter", "repoType": "dataset"})
    assert empty.status == 200 and empty.json["warnings"]


def test_lists_search_filter_and_page(raw):
    raw.create("local/sae-one")
    raw.create("local/sae-two")
    raw.create("local/data", "dataset")
    raw.commit({"README.md": b"---\nlibrary_name: hubsae\ntags: [saelens]\n---\n"}, "models/local/sae-one")
    assert {m["id"] for m in raw("GET", "/api/models?search=SAE").json} == {"local/sae-one", "local/sae-two"}
    assert [m["id"] for m in raw("GET", "/api/models?filter=saelens&filter=hubsae").json] == ["local/sae-one"]
    assert raw("GET", "/api/models?author=eve").json == []
    first = raw("GET", "/api/models?limit=1&sort=createdAt")
    assert len(first.json) == 1 and "cursor=1" in first.headers["link"] and "limit=1" in first.headers["link"]
    only = raw("GET", "/api/models/local/sae-one?expand=sha&expand=tags").json
    assert set(only) == {"_id", "id", "sha", "tags"}
    assert raw("GET", "/api/models/local/sae-one?expand=nonsense").status == 400
    assert raw("GET", "/api/datasets").json[0]["id"] == "local/data"


def test_a_request_for_config_json_counts_as_a_download(raw):
    raw.create()
    raw.commit({"config.json": b"{}", "sub/config.json": b"{}"})
    raw("HEAD", "/local/x/resolve/main/config.json")
    raw("GET", "/local/x/resolve/main/config.json")
    raw("GET", "/local/x/resolve/main/sub/config.json")
    assert raw("GET", "/api/models/local/x").json["downloads"] == 2


def test_collections_hide_what_the_reader_may_not_see(raw):
    raw.create("local/open")
    raw.create("local/secret", private=True)
    slug = raw("POST", "/api/collections", {"title": "My SAEs", "namespace": "local", "description": "d"}).json["slug"]
    for name in ("open", "secret"):
        assert (
            raw(
                "POST",
                f"/api/collections/{slug}/items",
                {"item": {"type": "model", "id": f"local/{name}"}, "note": "n"},
            ).status
            == 200
        )
    assert len(raw("GET", f"/api/collections/{slug}").json["items"]) == 2
    seen = raw("GET", f"/api/collections/{slug}", token="hf_eve").json["items"]
    assert [i["id"] for i in seen] == ["local/open"]
    assert raw("PATCH", f"/api/collections/{slug}", {"title": "x"}, token="hf_eve").status == 403
    assert raw("POST", "/api/collections", {"title": "My SAEs", "namespace": "local"}).status == 409
    assert raw("POST", "/api/collections", {"title": "t", "namespace": "local", "description": "d" * 151}).status == 400
    assert raw("PATCH", f"/api/collections/{slug}", {"private": True}).status == 200
    assert raw("GET", f"/api/collections/{slug}", token="hf_eve").status == 404
    assert raw("DELETE", f"/api/collections/{slug}").status == 200 and raw("GET", "/api/collections").json == []


def test_small_calls_are_answered(raw):
    raw.create()
    assert raw("POST", "/v1/telemetry", b"{}", token=False).status == 200
    assert raw("GET", "/api/agent-harnesses").status == 404
    assert raw("GET", "/api/models/local/x/auth-check").status == 200
    assert raw("PUT", "/api/models/local/x/settings", {"visibility": "private"}).json["private"] is True
    assert raw("POST", "/api/models/local/x/like", {}).status == 200
    assert raw("GET", "/api/models/local/x").json["likes"] == 1
    assert raw("PATCH", "/api/whoami-v2", {}).status == 405


def test_large_commits_with_files_inside_are_accepted(raw):
    raw.create()
    assert raw.commit({f"{i}.txt": bytes([65 + i]) * 9_000_000 for i in range(12)}).status == 200
    assert raw("GET", "/local/x/resolve/main/11.txt", headers={"Range": "bytes=8999999-"}).body == b"L"


def test_bodies_over_the_limit_are_refused(local_hub_factory, raw_for):
    raw = raw_for(local_hub_factory(max_json=1000, max_commit=1000))
    raw.create()
    assert raw("POST", "/api/validate-yaml", b"x" * 2000).status == 413
    assert raw.commit({"a": b"x" * 2000}).status == 413


def test_many_writers_and_a_rename_lose_nothing(hub, raw, git):
    """Four writers commit as fast as they can while the repo changes its name back and forth."""
    import threading

    raw.create()
    done: list[str] = []
    stop = threading.Event()

    def write(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            for name in ("x", "y"):
                got = raw.commit({f"{number}/{count}.txt": b"x" * 2000}, f"models/local/{name}")
                assert got.status in (200, 307, 404), got
                if got.status == 200:
                    done.append(f"{number}/{count}.txt")

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    for _ in range(15):
        assert (
            raw("POST", "/api/repos/move", {"fromRepo": "local/x", "toRepo": "local/y", "type": "model"}).status == 200
        )
        assert (
            raw("POST", "/api/repos/move", {"fromRepo": "local/y", "toRepo": "local/x", "type": "model"}).status == 200
        )
    stop.set()
    for writer in writers:
        writer.join()
    assert done and set(done) <= set(git("ls-tree", "-r", "--name-only", "main").split())
    assert git("fsck", "--strict", "--no-dangling").strip() == ""
    assert [p.name for p in (hub.root / "models" / "local").iterdir()] == ["x.git"]


def test_a_merge_whose_answer_was_lost_is_not_made_twice(hub, raw, git):
    raw.create()
    raw.commit({"a.txt": b"1"}, query="?create_pr=1", summary="Add a")
    hub.inject_fault("/merge", drop="after", lost_status=504)
    assert raw("POST", "/api/models/local/x/discussions/1/merge", {}).status == 504
    # as if the server had died after the commit and before it noted the merge
    note = hub.git_path("local/x") / "hub" / "discussions" / "1.json"
    item = json.loads(note.read_text())
    note.write_text(json.dumps({**item, "status": "open", "merge_commit": None}))
    again = raw("POST", "/api/models/local/x/discussions/1/merge", {})
    assert again.status == 200 and again.json["mergeCommitId"] == item["merge_commit"]
    assert git("rev-list", "--count", "main").strip() == "2"


def test_a_repo_is_deleted_once_and_completely(hub, raw):
    import threading

    raw.create()
    raw.commit_lfs("w.bin", b"weights")
    answers: list[int] = []
    body = {"name": "x", "organization": "local", "type": "model"}
    threads = [
        threading.Thread(target=lambda: answers.append(raw("DELETE", "/api/repos/delete", body).status))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, 404, 404, 404, 404, 404]
    assert not list((hub.root / "models" / "local").iterdir()) and not list((hub.root / "tmp").iterdir())
    assert raw.create().status == 200
    assert raw("GET", "/local/x/resolve/main/w.bin").headers["x-error-code"] == "EntryNotFound"
