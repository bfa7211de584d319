"""LFS: one piece and many, signed urls, and nothing stored that does not hash to its name."""

from __future__ import annotations

import hashlib
import time

import pytest


def batch(raw, content: bytes, transfers=("basic", "multipart"), repo="local/x", **more):
    oid = hashlib.sha256(content).hexdigest()
    body = {
        "operation": "upload",
        "transfers": list(transfers),
        "objects": [{"oid": oid, "size": len(content), **more}],
    }
    return oid, raw("POST", f"/{repo}.git/info/lfs/objects/batch", body)


def path_of(href: str) -> str:
    return "/" + href.split("/", 3)[3]


def stored(hub, oid: str):
    return list(hub.root.rglob(oid))


def test_a_wrong_upload_is_refused_and_leaves_nothing(hub, raw):
    raw.create()
    oid, got = batch(raw, b"content")
    put = path_of(got.json["objects"][0]["actions"]["upload"]["href"])
    assert raw("PUT", put, b"CONTENT", token=False).status == 400
    assert raw("PUT", put, b"conte", token=False).status == 400
    assert raw("PUT", put, b"content and more", token=False).status == 413
    assert raw("PUT", put, b"content").status == 400, "a token beside a signed url is refused, as S3 does"
    assert not stored(hub, oid)
    assert raw("PUT", put, b"content", token=False).status == 200
    assert len(stored(hub, oid)) == 1
    assert not list((hub.root / "tmp").iterdir())
    assert "actions" not in batch(raw, b"content")[1].json["objects"][0], "known objects are not sent twice"


def test_signed_urls_serve_one_object_and_expire(local_hub_factory, raw_for):
    raw = raw_for(local_hub_factory(url_seconds=1))
    raw.create()
    _, got = batch(raw, b"content")
    put = path_of(got.json["objects"][0]["actions"]["upload"]["href"])
    word = put.rsplit("/", 1)[1]
    assert raw("GET", f"/storage/get/{word}", token=False).status == 403, "an upload url does not read"
    assert raw("PUT", put[:-1] + ("0" if put[-1] != "0" else "1"), b"content", token=False).status == 403
    time.sleep(2.1)
    assert raw("PUT", put, b"content", token=False).status == 403


def test_parts_are_put_together_and_checked(local_hub_factory, raw_for):
    hub = local_hub_factory(multipart_threshold=10, multipart_chunk=4)
    raw = raw_for(hub)
    raw.create()
    content = b"0123456789abcde"
    oid, got = batch(raw, content)
    assert got.json["transfer"] == "multipart"
    action = got.json["objects"][0]["actions"]["upload"]
    assert action["header"]["chunk_size"] == "4" and sorted(action["header"])[:4] == [
        "00001",
        "00002",
        "00003",
        "00004",
    ]
    etags = []
    for number in range(1, 5):
        part = content[4 * number - 4 : 4 * number]
        url = path_of(action["header"][f"{number:05d}"])
        assert raw("PUT", url, part[:-1], token=False).status == 400
        etags.append(raw("PUT", url, part, token=False).headers["etag"])
    done = {"oid": oid, "parts": [{"partNumber": n, "etag": e} for n, e in enumerate(etags, 1)]}
    complete = path_of(action["href"])
    assert raw("POST", complete, {**done, "parts": done["parts"][:3]}, token=False).status == 400
    swapped = [{"partNumber": n, "etag": e} for n, e in enumerate(etags[::-1], 1)]
    assert raw("POST", complete, {**done, "parts": swapped}, token=False).status == 400
    assert raw("POST", complete, done, token=False).status == 200
    assert raw("POST", complete, done, token=False).status == 200, "a repeated completion is no error"
    assert stored(hub, oid)[0].read_bytes() == content
    assert raw("POST", "/local/x.git/info/lfs/verify", {"oid": oid, "size": 15}).status == 200
    assert raw("POST", "/local/x.git/info/lfs/verify", {"oid": oid, "size": 14}).status == 400
    assert raw("POST", "/local/x.git/info/lfs/verify", {"oid": "0" * 64, "size": 14}).status == 404


def test_a_client_that_cannot_do_parts_gets_one(local_hub_factory, raw_for):
    raw = raw_for(local_hub_factory(multipart_threshold=1))
    raw.create()
    assert batch(raw, b"content", ["basic"])[1].json["transfer"] == "basic"


def test_objects_belong_to_their_repo(hub, raw):
    raw.create("local/x", private=True)
    raw("POST", "/api/repos/create", {"name": "y"}, token="hf_eve")
    raw.commit_lfs("w.bin", b"secret weights")
    oid = hashlib.sha256(b"secret weights").hexdigest()
    lines = (
        '{"key":"header","value":{"summary":"steal"}}\n'
        f'{{"key":"lfsFile","value":{{"path":"w.bin","algo":"sha256","oid":"{oid}"}}}}'
    )
    got = raw("POST", "/api/models/eve/y/commit/main", lines.encode(), token="hf_eve")
    assert got.status == 400 and "does not exist" in got.json["error"], "knowing a hash is not having the content"
    body = {
        "target": {"type": "model", "name": "eve/y"},
        "files": [{"sha256": oid, "xetHash": "", "filename": "w.bin"}],
    }
    assert raw("POST", "/api/models/local/x/lfs-files/duplicate", body, token="hf_eve").status == 404


@pytest.mark.parametrize("end", ["0-3", "5-", "-4", "0-99999", "3-3"])
def test_ranges_are_what_they_say(raw, end):
    raw.create()
    raw.commit_lfs("w.bin", b"0123456789")
    raw.commit({"a.txt": b"0123456789"})
    first, last = end.split("-")
    expected = b"0123456789"[int(first) : int(last) + 1 if last else None] if first else b"0123456789"[-int(last) :]
    for path in ("/local/x/resolve/main/w.bin", "/local/x/resolve/main/a.txt"):
        got = raw("GET", path, headers={"Range": f"bytes={end}"})
        assert (got.status, got.body) == (206, expected)
        head = raw("HEAD", path, headers={"Range": f"bytes={end}"})
        assert head.headers["content-length"] == str(len(expected)) and head.body == b""
        assert raw("GET", path, headers={"Range": "bytes=10-"}).status == 416
        assert raw("GET", path, headers={"Range": "bytes=zz"}).body == b"0123456789"


def test_headers_a_download_depends_on(hub, raw):
    raw.create()
    commit = raw.commit_lfs("w.bin", b"0123456789")
    oid = hashlib.sha256(b"0123456789").hexdigest()
    head = raw("HEAD", "/local/x/resolve/main/w.bin", headers={"X-Amzn-Trace-Id": "trace-me"})
    assert head.headers["x-repo-commit"] == commit
    assert head.headers["etag"] == head.headers["x-linked-etag"] == f'"{oid}"'
    assert head.headers["content-length"] == head.headers["x-linked-size"] == "10"
    assert head.headers["x-request-id"] == "trace-me"
    missing = raw("HEAD", "/local/x/resolve/main/nothing.bin")
    assert (missing.status, missing.headers["x-error-code"], missing.headers["x-repo-commit"]) == (
        404,
        "EntryNotFound",
        commit,
    )
    assert raw("HEAD", "/local/x/resolve/nope/w.bin").headers["x-error-code"] == "RevisionNotFound"
    html = raw.commit({"page.html": b"<script>alert(1)</script>"})
    assert html.status == 200
    page = raw("GET", "/local/x/resolve/main/page.html")
    assert (
        page.headers["content-type"].startswith("text/plain") and "sandbox" in page.headers["content-security-policy"]
    )


def test_cdn_redirects_large_files_to_another_origin(local_hub_factory, raw_for):
    hub = local_hub_factory(cdn=True, xet=False)
    raw = raw_for(hub)
    raw.create(private=True)
    raw.commit_lfs("w.bin", b"0123456789")
    head = raw("HEAD", "/local/x/resolve/main/w.bin")
    assert head.status == 302 and head.headers["x-linked-size"] == "10"
    location = head.headers["location"]
    assert f":{hub.hub.cdn_port}/storage/get/" in location and hub.hub.cdn_port != hub.port
    got = raw("GET", path_of(location), token=False, port=hub.hub.cdn_port, headers={"Range": "bytes=2-4"})
    assert got.body == b"234"


def test_git_lfs_can_fetch_by_the_batch_call(raw):
    raw.create()
    raw.commit_lfs("w.bin", b"0123456789")
    oid = hashlib.sha256(b"0123456789").hexdigest()
    body = {"operation": "download", "objects": [{"oid": oid, "size": 10}, {"oid": "0" * 64, "size": 1}]}
    found, missing = raw("POST", "/local/x.git/info/lfs/objects/batch", body).json["objects"]
    assert raw("GET", path_of(found["actions"]["download"]["href"]), token=False).body == b"0123456789"
    assert missing["error"]["code"] == 404


def test_deleted_lfs_files_are_gone_from_all_history(hub, raw, git):
    raw.create()
    raw.commit_lfs("keep.bin", b"keep")
    raw.commit_lfs("gone.bin", b"gone")
    raw.commit({"after.txt": b"1"})
    raw("POST", "/api/models/local/x/tag/main", {"tag": "v1"})
    oid = hashlib.sha256(b"gone").hexdigest()
    assert {f["filename"] for f in raw("GET", "/api/models/local/x/lfs-files").json} == {"keep.bin", "gone.bin"}
    assert (
        raw("POST", "/api/models/local/x/lfs-files/batch", {"deletions": {"sha": [oid], "rewriteHistory": True}}).status
        == 200
    )
    assert [f["filename"] for f in raw("GET", "/api/models/local/x/lfs-files").json] == ["keep.bin"]
    assert "gone.bin" not in git("log", "--all", "--name-only", "--format=")
    assert raw("GET", "/local/x/resolve/v1/after.txt").body == b"1"
    assert not stored(hub, oid) and git("fsck", "--strict", "--no-dangling").strip() == ""
