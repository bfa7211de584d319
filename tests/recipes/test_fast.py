"""The recipe FAST run to its end on the quick world: its numbers are what its words say, and its release loads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hubsae.core.files import read_csv, read_json
from hubsae.formats import Release
from hubsae.hub.card import card_of_release, render_card
from hubsae.index.features import FeatureIndex
from hubsae.recipes.registry import find_recipe, prepare
from hubsae.recipes.standard import Activations
from hubsae.recipes.subject import open_subject

SMALLEST = [
    "model.size=quick", "data.most_chats=200", "data.most_texts=200", "data.test_chats=24", "data.max_length=64",
    "data.block=96", "train.kinds=[standard, topk]", "train.standard=[0.05, 0.5]", "train.topk=[2, 4]",
    "train.published={standard: 0.05}", "train.expansions=[2]", "train.tokens=2560", "train.batch_size=64",
    "train.buffer_rows=1024", "train.init_rows=512", "train.states=2", "measure.tokens=900", "measure.texts=4",
    "measure.gsnr_batches=4", "interpret.kinds=[topk]", "interpret.features=4", "interpret.shown=3",
    "interpret.scored=2", "steer.kind=topk", "steer.strengths=[2]", "steer.questions=2", "steer.new_tokens=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fast"
    prepare("fast", overrides=SMALLEST, out=folder).execute()
    return folder


def test_every_sae_says_how_it_was_trained_and_is_in_the_table_with_its_l0(run):
    release = Release.open(run / "release")
    release.verify()
    cells = {row["id"]: row for row in read_csv(run / "measure" / "cells.csv")}
    assert sorted(release.ids) == sorted(cells) and len(cells) == 3 * 2 * 2 * 2
    for name, row in cells.items():
        record = release.metadata(name)
        method = {"fast": "FAST", "bt-f": "BT(F)", "bt-p": "BT(P)"}[row["method"]]
        assert record.training.model_extra == {"method": method, "kind": row["kind"]}
        assert (release.folder(name) / "fingerprint.safetensors").is_file()
        assert record.activations.mode.startswith(f"{method}:") and record.training.tokens == 2560
        assert record.activations.text_dataset == ("quick-texts" if row["method"] == "bt-p" else "quick-chats")
        assert record.metric("l0", "not position_0") == pytest.approx(float(row["l0"]), rel=1e-9)
        assert record.metric("mse_per_sequence", "all") == pytest.approx(float(row["mse_all"]), rel=1e-9)
        if row["kind"] == "topk":
            assert float(row["l0"]) <= float(row["number"])


def test_mse_st_is_the_mean_over_chats_of_the_mean_over_their_special_tokens(run):
    held = Activations(run / "heldout").open(2, "train")
    labels, x = held.columns(), held.read_all(dtype=torch.float32)
    config = find_recipe("fast").config("tiny", overrides=SMALLEST)
    tokenizer = open_subject(
        run / "corpus", read_json(run / ".steps" / "corpus.json")["result"]
    ).tokenizer()  # fmt: skip
    st = np.isin(labels["token_id"], tokenizer.convert_tokens_to_ids(list(config.data.special)))
    assert 0 < st.sum() < len(st)
    release = Release.open(run / "release")
    for row in read_csv(run / "measure" / "cells.csv")[::5]:
        error = (release.load(row["id"])(x) - x).detach().double().square().mean(1).numpy()
        for mask, name in ((st, "mse_st"), (st & (labels["position"] > 0), "mse_st_no0")):
            chats = [error[mask & (labels["sample_id"] == s)].mean() for s in np.unique(labels["sample_id"][mask])]
            assert float(row[name]) == pytest.approx(np.mean(chats), rel=1e-5), (row["id"], name)
        assert float(row["log2_mse_st"]) == pytest.approx(np.log2(float(row["mse_st"])))


def test_the_one_table_is_of_the_cells_and_stands_in_report_card_and_release(run):
    cells = read_csv(run / "measure" / "cells.csv")
    table = read_csv(run / "measure" / "advantage.csv")
    assert len(table) == 2 * 2 * 4
    row = next(r for r in table if r["kind"] == "topk" and r["tokens"] == "special tokens, without position 0")
    by = {(c["method"], float(c["number"]), c["seed"]): float(c["mse_st_no0"]) for c in cells if c["kind"] == "topk"}
    ratios = [by["fast", n, s] / by["bt-f", n, s] for n in (2, 4) for s in "01"]
    assert float(row["error ratio, equal L0"]) == pytest.approx(np.exp(np.mean(np.log(ratios))), rel=1e-6)
    report, card = (run / "report" / "report.md").read_text(), (run / "release" / "README.md").read_text()
    assert "survive equal L0, and leaving out position 0?" in report and "no, as worded" in report
    assert "Does the way the data is cut matter at equal sparsity?" in card
    # a push renders the card anew: the same blocks, since the release names its template
    again = render_card(card_of_release(run / "release", "you/sae-fast-tiny"), card).text
    assert again == card


def test_features_are_indexed_and_rated_beside_a_control_and_steering_beside_two(run):
    ratings = read_csv(run / "report" / "ratings.csv")
    assert [row["contexts"] for row in ratings[:2]] == ["of one feature", "of different features (control)"]
    assert len(ratings) == 6 and all(row["low"] and row["high"] for row in ratings)
    chosen = read_json(run / ".steps" / "measure.json")["result"]["chosen"]
    assert {name.partition("/")[0] for name in chosen} == {"fast", "bt-f", "bt-p"}
    index = FeatureIndex.open(run / "release", next(name for name in chosen if "topk" in name))
    assert len(index) == 128 and (run / "release" / "index.html").is_file()
    rows = read_csv(run / "report" / "steering.csv")
    assert {row["kind"] for row in rows} == {"feature", "random feature", "random direction"}
    assert len({round(float(row["norm"]), 4) for row in rows if float(row["strength"]) == 2}) == 1


def test_a_finished_run_does_nothing_again_and_a_changed_setting_repeats_what_depends_on_it(run):
    again = prepare("fast", overrides=SMALLEST, out=run)
    assert {state.state for state in again.run.states(again.steps).values()} == {"finished"}
    other = prepare("fast", overrides=[*SMALLEST, "steer.strengths=[3]"], out=run)
    states = other.run.states(other.steps)
    assert [name for name, s in states.items() if s.state != "finished"] == ["steer", "release", "report"]


def test_gradient_ratios_are_there_for_every_method_with_position_0_and_without(run):
    rows = read_csv(run / "measure" / "gsnr.csv")
    own = [row for row in rows if row["weights"] == "its own"]
    assert len(own) == 3 * 2 * 2 * 2 and len(rows) == len(own) + 3 * 2 * 2 and {row["batches"] for row in rows} == {"4"}
    assert all(np.isfinite(float(row["gsnr"])) for row in rows)


@pytest.mark.slow
def test_a_run_killed_in_training_ends_with_the_same_saes(run, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "hubsae.cli.main", "recipe", "run", "fast", *SMALLEST, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 400
    while not list(out.glob("train/bt-f/groups/*/state/step_*")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / ".steps" / "train--bt-f.json").exists()
    prepare("fast", overrides=SMALLEST, out=out).execute()
    for name in Release.open(run / "release").ids:
        file = f"release/{name}/sae_weights.safetensors"
        assert (out / file).read_bytes() == (run / file).read_bytes(), name


@pytest.mark.slow
def test_stock_saelens_loads_every_sae_of_the_release_with_the_same_numbers(run):
    lens = pytest.importorskip("sae_lens")
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    release = Release.open(run / "release")
    for name in release.ids:
        theirs = lens.SAE.load_from_disk(run / "release" / name)
        with torch.no_grad():
            assert torch.allclose(theirs(x), release.load(name)(x), atol=1e-4), name
