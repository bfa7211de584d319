"""The feature pages in a real browser, over real files and a real server that notes every request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest

from hubsae.core.errors import HubSAEError
from hubsae.index.page import build, indexes, render
from hubsae.index.serve import serve

from . import chromium, synthetic

needs_chromium = pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    synthetic.write(folder, d_sae=1500, active=700, examples=2500)
    build(folder, title="me/<b>saes</b>")
    return folder


class Site(NamedTuple):
    url: str
    release: Path
    requests: list[tuple[str, str | None]]  # path, Range

    def look(self, place: str = "") -> chromium.Seen:
        self.requests.clear()
        # any name but this server's leads nowhere, and a page that tries one says so on its console
        return chromium.look(f"{self.url}/{place}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


@pytest.fixture(scope="module")
def site(release) -> Iterator[Site]:
    requests: list[tuple[str, str | None]] = []
    with serve(release, notify=lambda path, wanted: requests.append((path, wanted))) as url:
        yield Site(url, release, requests)


def feature(number: int, sae: str = "saes_k64/layer18") -> str:
    return f"#/sae/{quote(sae, safe='')}/feature/{number}"


@needs_chromium
def test_the_table_shows_every_active_feature_and_says_nothing_on_the_console(site):
    seen = site.look()
    assert 'data-ready="table"' in seen.dom and seen.console == []
    active = json.loads((site.release / "reverse-index/layer18/summary.json").read_text())["n_active"]
    assert f"{active} of 1,500" in seen.text
    assert {path for path, _ in site.requests} == {
        "/",
        "/reverse-index/layer18/summary.parquet",
        "/reverse-index/layer18/features.parquet",  # the footer, read ahead
    }
    assert seen.dom.count('class="row cells') < 60, "only the rows in sight are made"


@needs_chromium
@pytest.mark.parametrize("number", range(len(synthetic.HOSTILE)))
def test_what_a_token_says_is_text_and_nothing_else(site, number):
    seen = site.look(feature(number))
    assert f'data-ready="feature {number}"' in seen.dom, seen.text
    assert seen.console == [], "a script or an image from a token would have been refused there, or asked for a host"
    assert {path for path, _ in site.requests} == {
        "/",
        *(f"/reverse-index/layer18/{n}.parquet" for n in ("summary", "features")),
    }
    token = synthetic.HOSTILE[number]
    shown = token.replace("\u202e", "‹202e›").replace("\u202c", "‹202c›").replace("\0", "␀").replace("\x1b", "␛")
    assert shown in seen.text
    body = seen.dom.split("<body", 1)[1]
    assert "<img" not in body and "\u202e" not in body and "\x1b" not in body
    assert f"Feature {number} · saes_k64/layer18" in seen.dom.split("</title>")[0]


@needs_chromium
def test_a_feature_is_one_piece_of_a_file(site):
    """Besides the page, the table and the footer, which come once: one range, holding the feature's row group."""
    seen = site.look(feature(3))
    assert "Strongest tokens" in seen.text and "What it makes likelier" in seen.text
    ranges = [wanted for path, wanted in site.requests if path.endswith("features.parquet")]
    assert len(ranges) == 2 and None not in ranges
    sizes = [int(end) - int(start) + 1 for start, end in (r.removeprefix("bytes=").split("-") for r in ranges if r)]
    assert min(sizes) < 400_000


@needs_chromium
def test_searches_and_rules_stand_in_the_address(site):
    import pyarrow.parquet as pq

    seen = site.look(f"#/sae/{quote('saes_k64/layer18', safe='')}?q=purity%3E0.9&sort=-max&show=all")
    table = pq.read_table(site.release / "reverse-index/layer18/summary.parquet").to_pandas()
    found = table[table.purity > 0.9].sort_values(["max", "feature"], ascending=[False, True])
    assert f"{len(found)} of 1,500" in seen.text
    first = seen.dom.split('class="row cells', 2)[1]
    assert f"/feature/{found.feature.iloc[0]}" in first


@needs_chromium
def test_what_is_wrong_is_said(site, tmp_path):
    assert "there is no 99,999" in site.look(feature(99_999)).text
    folder = tmp_path / "r"
    synthetic.write(folder, d_sae=300, active=200, examples=400)
    build(folder)
    table = folder / "reverse-index/layer18/summary.parquet"
    table.write_bytes(table.read_bytes()[:1000])
    with serve(folder) as url:
        seen = chromium.look(url)
    assert "This cannot be shown" in seen.text and "parquet file invalid" in seen.text


def test_the_server_of_the_pages_gives_out_nothing_else(release):
    import http.client

    def status(path: str, host: str = "") -> int:
        line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
        line.putrequest("GET", path, skip_host=bool(host))
        if host:
            line.putheader("Host", host)
        line.endheaders()
        return line.getresponse().status

    (release / "summary.parquet").write_bytes(b"elsewhere")
    with serve(release) as url:
        assert status("/") == status("/reverse-index/layer18/summary.parquet") == 200
        for path in ("/summary.parquet", "/reverse-index/../summary.parquet", "/reverse-index/%2e%2e/summary.parquet"):
            assert status(path) == 404, path
        assert status("/reverse-index/layer18/summary.json") == status("/config.json") == 404
        assert status("/", host="evil.test") == 400, "a name that was made to mean this machine"
    (release / "summary.parquet").unlink()


def test_a_release_without_an_index_has_no_page(tmp_path):
    with pytest.raises(HubSAEError, match="no reverse index"):
        build(tmp_path)


def test_building_again_changes_nothing_until_the_tables_change(release):
    page = release / "index.html"
    before = page.stat().st_mtime_ns
    build(release, title="me/<b>saes</b>")
    assert page.stat().st_mtime_ns == before
    assert [line["name"] for line in indexes(release)] == ["layer18"]
    assert "https://" not in page.read_text() and "http://" not in page.read_text().replace(
        "http://www.w3.org/2000/svg", ""
    )


def test_names_from_a_release_cannot_leave_the_data_of_the_page():
    text = render([], title="</script><script>alert(1)</script>&<!--", repo='"><b>')
    assert "alert(1)</script>" not in text and "<!--" not in text.split('id="site">')[1].split("</script>")[0]


def test_a_row_group_stays_small_however_many_examples_a_feature_has(tmp_path):
    import pyarrow.parquet as pq

    from hubsae.index import site

    folder = synthetic.write(tmp_path, d_sae=1024, active=900, examples=30_000)
    table = pq.read_table(folder / "features.parquet")
    rows = site._group(table)
    pq.write_table(table, tmp_path / "again.parquet", row_group_size=rows, **site.OPTIONS)
    kept = pq.read_metadata(tmp_path / "again.parquet")
    sizes = [
        sum(kept.row_group(i).column(j).total_compressed_size for j in range(kept.num_columns))
        for i in range(kept.num_row_groups)
    ]
    assert rows < 256 and sum(sizes) / len(sizes) > 75_000 and max(sizes) < 200_000
