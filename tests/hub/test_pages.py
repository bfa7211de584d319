"""Feature pages travel: pushed with a release, fetched to look at, published as a static Space."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hubsae.core.errors import HubSAEError
from hubsae.hub.client import HubClient
from hubsae.hub.pages import fetch, publish_space
from hubsae.index import labels
from hubsae.index.page import build, indexes

TOKEN = "hf_" + "k" * 20 + "v" * 14


def synthetic(release: Path, **sizes) -> Path:
    """The made-up index of the page tests."""
    path = Path(__file__).parents[1] / "index" / "synthetic.py"
    spec = importlib.util.spec_from_file_location("synthetic_index", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write(release, **sizes)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    for name in ("layer01", "layer02"):
        synthetic(folder, d_sae=300, active=120, examples=300, name=name)
    build(folder, repo="me/saes")
    return folder


def test_a_space_holds_the_page_and_its_tables_and_nothing_stale(hub, release):
    done = publish_space(release, "me/features", repo="me/saes")
    client = HubClient()
    files = set(client.tree("me/features", repo_type="space"))
    tables = {f"reverse-index/layer0{n}/{name}.parquet" for n in (1, 2) for name in ("summary", "features")}
    assert done.committed and files == {".gitattributes", "README.md", "index.html", *tables}
    page = client.download("me/features", "index.html", repo_type="space").read_text()
    assert '"repo": "me/saes"' in page
    assert not publish_space(release, "me/features", repo="me/saes").committed, "the same again is no commit"
    for path in (release / "reverse-index/layer02").iterdir():
        path.unlink()
    publish_space(release, "me/features", repo="me/saes")
    assert not any("layer02" in path for path in client.tree("me/features", repo_type="space"))


@pytest.mark.parametrize("where", ["a label", "the tokens of a context"])
def test_pages_that_show_a_token_are_refused_before_there_is_a_space(hub, release, where):
    index, space = release / "reverse-index/layer02", f"me/{where.replace(' ', '-')}"
    if where == "a label":
        labels.write(index, [labels.Label(7, f"says {TOKEN}", "me")])
    else:
        table = pq.read_table(index / "features.parquet")
        rows = table["examples"].to_pylist()
        shown = next(row for row in rows if row)[0]
        shown["tokens"][:6] = [" key", ":", "hf", "_", "k" * 20, "v" * 14]
        column = pa.chunked_array([pa.array(rows, table["examples"].type)])
        table = table.set_column(table.column_names.index("examples"), table.field("examples"), column)
        pq.write_table(table, index / "features.parquet", compression="zstd")
        assert TOKEN.encode() not in (index / "features.parquet").read_bytes()
    with pytest.raises(HubSAEError, match="looks like a secret") as caught:
        publish_space(release, space, repo="me/saes")
    assert "reverse-index/layer02/features.parquet (a Hugging Face token)" in str(caught.value)
    assert TOKEN not in str(caught.value) and not [r for r in hub.requests if space in r[1] and r[0] != "GET"]
    assert publish_space(release, space, repo="me/saes", allow_secrets=True).committed


def test_what_the_pages_read_is_fetched_from_a_repo_and_nothing_else(hub, release):
    client = HubClient()
    (release / "large.bin").write_bytes(b"0" * 1000)
    client.ensure_repo("me/saes")
    client.api.upload_folder(repo_id="me/saes", folder_path=release)
    folder = fetch("me/saes")
    assert [line["name"] for line in indexes(folder)] == ["layer01", "layer02"]
    assert not (folder / "large.bin").exists()
    with pytest.raises(HubSAEError, match="no reverse index"):
        client.ensure_repo("me/empty")
        fetch("me/empty")
