"""One SAE with its features in the open: the release of the recipe holds what it says, and says what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubsae.core.files import read_csv, read_json
from hubsae.evals import reconstruction
from hubsae.formats import Release
from hubsae.hub.listing import describe
from hubsae.index.features import FeatureIndex
from hubsae.recipes.registry import find_recipe, prepare
from hubsae.recipes.standard import Activations


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "look"
    prepare("first_look", overrides=["model.size=quick", "data.max_tokens=8000", "sae.epochs=2"], out=folder).execute()
    return folder


def test_every_place_shows_the_same_numbers_in_the_saes_own_scope(run):
    release = Release.open(run / "release")
    release.verify()
    record = release.metadata("layer2")
    assert record.own_scope == "not position_0"
    held = Activations(run / "activations").open(2, "validation")
    again = reconstruction({"layer2": release.load("layer2")}, held)["layer2"]
    fvu = again.value("fvu", record.own_scope)
    assert record.metric("fvu", record.own_scope) == pytest.approx(fvu, abs=0)
    assert read_json(run / ".steps" / "measure.json")["result"]["fvu"] == fvu
    card = (run / "release" / "README.md").read_text()
    assert f"{fvu:.4g}" in card and "`not position_0`" in card
    assert f"{fvu:.4g}" in (run / "report" / "report.md").read_text()


def test_the_release_says_whether_a_model_fits(run, quick_world):
    sae = Release.open(run / "release").load("layer2")
    assert sae.check(quick_world.model, quick_world.tokenizer).ok
    assert "wrong layer" in str(sae.check(quick_world.model, hook=1))


def test_the_release_carries_index_and_pages_and_its_card_shows_features(run):
    index = FeatureIndex.open(run / "release", "layer2")
    assert len(index) == 256 and index.summary["scope"] == "not position_0"
    assert sum(index[f].count for f in range(256)) == 8 * index.summary["n_tokens"]
    assert (run / "release" / "index.html").is_file()
    card = (run / "release" / "README.md").read_text()
    block = card.partition("## Features")[2].partition("<!-- hubsae:end features")[0]
    rows = [line.split("|") for line in block.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 5
    for row in rows:
        assert f"{100 * index[int(row[1])].density:.4g} %" == row[2].strip()


def test_the_error_by_group_adds_up_to_all_tokens(run):
    rows = read_csv(run / "measure" / "error_by_group.csv")
    held = Activations(run / "activations").open(2, "validation")
    assert sum(int(row["n_tokens"]) for row in rows) == len(held)
    assert sum(float(row["share_of_error"]) for row in rows) == pytest.approx(1, abs=1e-6)


def test_the_small_profile_is_the_real_model():
    config = find_recipe("first_look").config("small")
    assert (config.model.id, config.data.layer, config.sae.exclude) == ("small", 15, ("position_0",))


def test_show_describes_a_release_that_carries_an_index_as_a_release(run):
    found = describe(run / "release")
    assert (found.kind, found.activations) == ("release", {})
    assert "layer2" in str(found.to_dict())
