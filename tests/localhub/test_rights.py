"""Who may see and change what: private, gated, organisations, read tokens, renamed repos, other people's repos."""

from __future__ import annotations

import base64

import pytest


def test_private_repos_do_not_exist_for_others(raw):
    assert raw.create("local/x", private=True).status == 200
    raw.commit({"secret.txt": b"s"})
    paths = [
        "/api/models/local/x",
        "/api/models/local/x/tree/main",
        "/local/x/resolve/main/secret.txt",
        "/local/x",
        "/local/x/tree/main",
        "/api/models/local/x/refs",
        "/api/models/local/x/commits/main",
        "/api/models/local/x/xet-read-token/main",
        "/api/models/local/x/discussions",
        "/local/x/raw/main/secret.txt",
        "/api/models/local/x/auth-check",
    ]
    for path in paths:
        missing = path.replace("local/x", "local/nothing")
        for token in ("hf_eve", False):
            got, other = raw("GET", path, token=token), raw("GET", missing, token=token)
            assert got.status == (404 if token else 401), path
            assert got.headers["x-error-code"] == "RepoNotFound"
            # not even the words tell a private repo from a missing one
            assert got.body == other.body and got.status == other.status
        assert raw("GET", path).status == 200, path
    assert raw("GET", "/api/models", token="hf_eve").json == []
    assert [m["id"] for m in raw("GET", "/api/models").json] == ["local/x"]
    assert b"local/x" not in raw("GET", "/", token=False).body


def test_others_may_propose_but_not_write(raw):
    raw.create()
    refused = raw.commit({"a.txt": b"1"}, token="hf_eve")
    assert refused.status == 403 and "create_pr" in refused.json["error"]
    assert raw.commit({"a.txt": b"1"}, token="hf_eve", query="?create_pr=1").status == 200
    assert raw.commit({"b.txt": b"1"}, token="hf_eve", revision="refs%2Fpr%2F1").status == 200
    assert raw("POST", "/api/models/local/x/discussions/1/merge", {}, token="hf_eve").status == 403
    assert raw("POST", "/api/models/local/x/discussions/1/merge", {}).status == 200
    files = {f["path"] for f in raw("GET", "/api/models/local/x/tree/main").json}
    assert {"a.txt", "b.txt"} <= files
    assert "Co-authored-by: eve" in raw("GET", "/api/models/local/x/commits/main").json[0]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/api/repos/delete", {"name": "x", "organization": "local", "type": "model"}),
        ("POST", "/api/repos/move", {"fromRepo": "local/x", "toRepo": "eve/x", "type": "model"}),
        ("PUT", "/api/models/local/x/settings", {"private": True}),
        ("POST", "/api/models/local/x/branch/b", {}),
        ("DELETE", "/api/models/local/x/branch/b", None),
        ("POST", "/api/models/local/x/tag/main", {"tag": "t"}),
        ("POST", "/api/models/local/x/super-squash/main", {}),
        ("POST", "/api/models/local/x/lfs-files/batch", {"deletions": {"sha": []}}),
        ("GET", "/api/models/local/x/xet-write-token/main", None),
        ("GET", "/api/models/local/x/auth-check/write", None),
    ],
)
def test_changes_need_write_access(raw, method, path, body):
    raw.create()
    assert raw(method, path, body, token="hf_eve").status == 403
    assert raw(method, path, body, token=False).status == 401


def test_a_read_token_cannot_write(local_hub_factory, raw_for):
    from hubsae.localhub import Token

    hub = local_hub_factory(tokens=(Token("local", "hf_w"), Token("local", "hf_r", "read")))
    raw = raw_for(hub)
    raw.create(private=True)
    assert raw("GET", "/api/models/local/x", token="hf_r").status == 200
    assert raw.commit({"a": b"1"}, token="hf_r").status == 403
    assert raw.commit({"a": b"1"}, token="hf_r", query="?create_pr=1").status == 403
    assert raw("POST", "/api/repos/create", {"name": "y"}, token="hf_r").status == 403
    assert raw("GET", "/api/whoami-v2", token="hf_r").json["auth"]["accessToken"]["role"] == "read"


def test_a_wrong_token_is_an_error_not_anonymity(raw):
    raw.create()
    got = raw("GET", "/api/models/local/x", token="hf_wrong")
    assert got.status == 401 and got.headers["x-error-message"] == "Invalid credentials in Authorization header"
    assert raw("GET", "/api/models/local/x", headers={"Authorization": "Digest x"}, token=False).status == 401


def test_gated_repos_ask_first(raw):
    raw.create()
    raw.commit({"a.txt": b"1"})
    assert raw("PUT", "/api/models/local/x/settings", {"gated": "manual"}).json["gated"] == "manual"
    for token, status in (("hf_eve", 403), (False, 401)):
        got = raw("GET", "/local/x/resolve/main/a.txt", token=token)
        assert (got.status, got.headers["x-error-code"]) == (status, "GatedRepo")
    assert raw("GET", "/api/models/local/x", token="hf_eve").json["gated"] == "manual"
    assert raw("GET", "/api/models/local/x/auth-check", token="hf_eve").headers["x-error-code"] == "GatedRepo"
    assert raw("POST", "/local/x/ask-access", {}, token="hf_eve").json == {"status": "pending"}
    waiting = raw("GET", "/api/models/local/x/user-access-request/pending").json
    assert [r["user"]["user"] for r in waiting] == ["eve"]
    answer = {"user": "eve", "status": "accepted"}
    assert raw("POST", "/api/models/local/x/user-access-request/handle", answer, token="hf_eve").status == 403
    assert raw("POST", "/api/models/local/x/user-access-request/handle", answer).status == 200
    assert raw("GET", "/local/x/resolve/main/a.txt", token="hf_eve").body == b"1"
    assert (
        raw("POST", "/api/models/local/x/user-access-request/handle", {"user": "eve", "status": "rejected"}).status
        == 200
    )
    assert raw("GET", "/local/x/resolve/main/a.txt", token="hf_eve").status == 403
    assert raw("POST", "/api/models/local/x/user-access-request/grant", {"user": "ann"}).status == 200
    assert raw("GET", "/local/x/resolve/main/a.txt", token="hf_ann").body == b"1"
    raw("PUT", "/api/models/local/x/settings", {"gated": "auto"})


def test_the_diff_of_a_pull_request_to_a_gated_repo_is_content(raw):
    raw.create()
    assert raw.commit({"a.txt": b"very secret"}, query="?create_pr=1").status == 200
    assert "very secret" in raw("GET", "/api/models/local/x/discussions/1?diff=1", token=False).json["diff"]
    raw("PUT", "/api/models/local/x/settings", {"gated": "manual"})
    for token, status in (("hf_eve", 403), (False, 401)):
        got = raw("GET", "/api/models/local/x/discussions/1?diff=1", token=token)
        assert (got.status, got.headers["x-error-code"]) == (status, "GatedRepo") and b"secret" not in got.body
    assert "very secret" in raw("GET", "/api/models/local/x/discussions/1?diff=1").json["diff"]


def test_organisations_give_their_members_rights(raw):
    assert raw.create("lab/x", private=True).status == 200
    assert raw("GET", "/api/models/lab/x", token="hf_ann").status == 200
    assert raw("GET", "/api/models/lab/x", token="hf_eve").status == 404
    assert raw.commit({"a": b"1"}, "models/lab/x", token="hf_ann").status == 403
    assert raw.commit({"a": b"1"}, "models/lab/x").status == 200
    assert raw.create("eve/x").status == 403
    assert raw.create("nobody/x").status == 403
    assert raw("GET", "/api/whoami-v2", token="hf_ann").json["orgs"][0]["roleInOrg"] == "read"


def test_organisations_can_be_private_by_default(local_hub_factory, raw_for):
    from hubsae.localhub import Org

    raw = raw_for(local_hub_factory(tokens={"local": "t", "eve": "e"}, orgs=(Org.parse("lab!private=local"),)))
    raw.create("lab/x")
    assert raw("GET", "/api/models/lab/x").json["private"] is True
    raw.create("lab/y", private=False)
    assert raw("GET", "/api/models/lab/y").json["private"] is False


def test_renamed_repos_redirect_api_and_files(raw):
    raw.create()
    raw.commit({"a.txt": b"1"})
    assert raw("POST", "/api/repos/move", {"fromRepo": "local/x", "toRepo": "lab/y", "type": "model"}).status == 200
    got = raw("GET", "/api/models/local/x/tree/main?recursive=1")
    assert got.status == 307 and got.headers["location"].endswith("/api/models/lab/y/tree/main?recursive=1")
    assert raw("HEAD", "/local/x/resolve/main/a.txt").headers["location"].endswith("/lab/y/resolve/main/a.txt")
    assert raw("GET", "/lab/y/resolve/main/a.txt").body == b"1"
    raw("PUT", "/api/models/lab/y/settings", {"private": True})
    assert raw("GET", "/api/models/local/x", token="hf_eve").status == 404, "a redirect would tell where it went"
    assert raw.create("local/x").status == 200, "the old name is free again"
    assert raw("GET", "/api/models/local/x").json["id"] == "local/x"


def test_names_are_case_insensitive_and_bare_names_are_ones_own(raw):
    raw.create("local/CaSe")
    assert raw("GET", "/api/models/LOCAL/case").json["id"] == "local/CaSe"
    assert raw("GET", "/api/models/case").json["id"] == "local/CaSe"
    again = raw.create("local/case")
    assert again.status == 409 and again.json["url"].endswith("/local/CaSe")


@pytest.mark.parametrize(
    "name", ["..", "a/../b", ".git", "a--b", "a..b", "x.git", "", "a b", "a" * 97, "-a", "a\u0000"]
)
def test_bad_names_are_refused(raw, name):
    assert raw("POST", "/api/repos/create", {"name": name}).status in (400, 403)


def test_other_web_pages_cannot_change_anything(raw):
    raw.create()
    got = raw("DELETE", "/api/models/local/x/like", headers={"Sec-Fetch-Site": "cross-site"})
    assert got.status == 403
    host = f"127.0.0.1:{raw.hub.port}"
    for origin, status in ((f"http://{host}", 200), (f"https://{host}", 200), ("http://evil.test", 403), ("null", 403)):
        assert raw("POST", "/api/models/local/x/like", {}, headers={"Origin": origin}).status == status, origin


def test_passwords_that_a_browser_remembers_write_only_json(raw):
    raw.create()
    basic = {"Authorization": "Basic " + base64.b64encode(b"local:hf_local").decode()}
    body = b'{"title": "from a form", "description": ""}'
    for kind in ("text/plain", "application/x-www-form-urlencoded; x=json", "multipart/form-data", ""):
        got = raw("POST", "/api/models/local/x/discussions", body, headers={**basic, "Content-Type": kind})
        assert got.status == 415, kind
    for kind in ("application/json", "application/json; charset=utf-8", "application/vnd.git-lfs+json"):
        got = raw("POST", "/api/models/local/x/discussions", body, headers={**basic, "Content-Type": kind})
        assert got.status == 200, kind


def test_a_contributor_writes_only_what_they_made(local_hub_factory, raw_for):
    raw = raw_for(
        local_hub_factory(tokens={"local": "t", "eve": "e"}, orgs={"lab": {"local": "admin", "eve": "contributor"}})
    )
    raw.create("lab/x")
    assert raw("POST", "/api/repos/create", {"name": "y", "organization": "lab"}, token="e").status == 200
    assert raw.commit({"a": b"1"}, "models/lab/y", token="e").status == 200
    assert raw.commit({"a": b"1"}, "models/lab/x", token="e").status == 403
