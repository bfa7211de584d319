"""Feature pages of a repo on the hub: at a signed address, in a sandbox, for those who may read the repo."""

from __future__ import annotations

import json

import pytest

PAGE = b"<!doctype html><script>document.title='mine'</script>"


@pytest.fixture
def place(raw) -> str:
    """A private repo with pages; the address its reader is led to."""
    raw.create(private=True)
    assert raw.commit({"index.html": PAGE, "secret.txt": b"s"}).status == 200
    assert raw("GET", "/local/x/features").status == 404, "a page without tables is no feature page"
    raw.commit_lfs("reverse-index/layer0/features.parquet", b"PAR1" * 1000)
    got = raw("GET", "/local/x/features")
    assert got.status == 303 and got.headers["cache-control"] == "no-store"
    return "/" + got.headers["location"].split("/", 3)[3]


def test_the_page_runs_in_a_sandbox_and_reads_its_tables_by_ranges(raw, place):
    page = raw("GET", place, token=False)
    policy = page.headers["content-security-policy"]
    assert page.body == PAGE and page.headers["content-type"].startswith("text/html")
    assert policy.startswith("sandbox allow-scripts;") and "allow-same-origin" not in policy
    assert f"connect-src http://127.0.0.1:{raw.hub.port};" in policy and "default-src 'none'" in policy
    table = place.removesuffix("index.html") + "reverse-index/layer0/features.parquet"
    got = raw("GET", table, token=False, headers={"Range": "bytes=4-7", "Origin": "null"})
    assert (got.status, got.body, got.headers["access-control-allow-origin"]) == (206, b"PAR1", "*")
    asked = raw("OPTIONS", table, token=False, headers={"Origin": "null"})
    assert asked.status == 204 and asked.headers["access-control-allow-headers"] == "Range"
    assert raw("GET", place.replace("index.html", "secret.txt"), token=False).status == 404


def test_everything_else_stays_closed_to_pages_of_other_origins(raw, place):
    for path in ("/local/x/resolve/main/index.html", "/api/models/local/x", "/api/whoami-v2", "/local/x/features"):
        got = raw("GET", path, headers={"Origin": "null"})
        assert got.status < 400 and "access-control-allow-origin" not in got.headers, path
    raw_page = raw("GET", "/local/x/resolve/main/index.html")
    assert raw_page.headers["content-type"].startswith("text/plain")
    body = json.dumps({"title": "from the page", "description": ""}).encode()
    got = raw("POST", "/api/models/local/x/discussions", body, headers={"Origin": "null"})
    assert got.status == 403


def test_the_address_is_for_one_repo_and_cannot_be_made_up(raw, place):
    raw.create("local/y")
    raw.commit({"index.html": PAGE, "reverse-index/a/summary.json": b"{}"}, "models/local/y")
    word = place.split("/")[3]
    assert raw("GET", place.replace(word, word[:-1] + ("0" if word[-1] != "0" else "1")), token=False).status == 403
    other = place.replace("/local/x/", "/local/y/")
    assert raw("GET", other, token=False).body == PAGE, "the repo is the signed one, whatever the path says"
    raw("DELETE", "/api/repos/delete", {"name": "x", "organization": "local", "type": "model"})
    assert raw("GET", other, token=False).status == 404


def test_the_repo_page_links_to_its_features(raw, place):
    assert b'href="/local/x/features"' in raw("GET", "/local/x").body
    raw.create("local/z")
    assert b"/features" not in raw("GET", "/local/z").body
