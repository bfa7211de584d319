"""Tables of SAEs: the few columns one chooses by, metrics in the scope each SAE is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubsae import HubSAE, SAEConfig, list_saes
from hubsae.core.metadata import Metric
from hubsae.formats import Release
from hubsae.formats.describe import describe

NAMES = ("mse", "fvu", "fve", "cosine", "l0", "l1", "dead_fraction", "frac_recovered_mean", "ce_sae", "kl")
SCOPES = ("all", "not position_0", "prompt", "response", "special", "assistant")


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release.create(tmp_path / "r", name="r", base_model="a/b")
    for layer in (2, 10):
        sae = HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=32, k=4), seed=layer)
        sae.metadata.hook.layer = layer
        sae.metadata.training.exclude = ["position_0"] if layer == 10 else []
        sae.metadata.metrics = [
            Metric(name=name, value=layer + i / 100 + j / 1000, scope=scope)
            for i, name in enumerate(NAMES)
            for j, scope in enumerate(SCOPES)
        ]
        made.add(sae, f"layer{layer}")
    return made


def test_few_columns_are_printed_and_all_are_there(release: Release):
    table = list_saes(release.path)
    lines = str(table).splitlines()
    assert lines[0].split() == [
        "id", "layer", "architecture", "d_sae", "k", "scope",
        "fvu", "l0", "dead_fraction", "frac_recovered_mean", "kl", "size",
    ]  # fmt: skip
    assert all(len(line) <= 120 for line in lines)
    assert len(table.columns(all=True)) > 60 and "ce_sae@response" in table.text(all=True)
    pandas = pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame.columns) > 60 and list(frame["layer"]) == [2, 10]


def test_the_headline_is_in_the_scope_that_each_sae_is_for(release: Release):
    everywhere, without_first = list_saes(release.path)
    assert everywhere["scope"] is None and without_first["scope"] == "not position_0"
    table = list_saes(release.path)
    assert table.cell(everywhere, "fvu") == "2.01"  # all tokens
    assert table.cell(without_first, "fvu") == f"{10 + 0.01 + 0.001:.4g}"  # not position_0


def test_an_sae_in_a_notebook(release: Release):
    sae = release.load("layer10")
    html = sae._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]
    assert "topk(k=4), then ReLU" in html and "not position_0" in html and "10.01" in html
    assert "<script>" not in html
    sae.metadata.base_model.id = "<script>alert(1)</script>"
    assert "<script>" not in sae._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]


def test_show_says_the_metrics_of_its_own_scope_and_counts_the_others(release: Release):
    facts = describe(release.folder("layer10")).facts
    assert list(facts["metrics"]) == list(NAMES) and facts["metrics"]["fvu"] == pytest.approx(10.011)
    assert len(facts["metrics in other scopes"]) == len(NAMES) * (len(SCOPES) - 1)
    assert describe(release.path).saes[0]["bytes"] > 0
