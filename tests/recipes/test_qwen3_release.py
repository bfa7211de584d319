"""The Qwen3-8B release: its card reproduced in the settings, halted runs rescued, exports equal, numbers that hold."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from typer.testing import CliRunner

from hubsae import HubSAE, localhub, push
from hubsae.cli.recipe import app
from hubsae.core.files import read_csv, read_json, sha256_file
from hubsae.evals import reconstruction
from hubsae.formats import Release, write
from hubsae.index import labels
from hubsae.index.features import FeatureIndex
from hubsae.localhub.settings import Token
from hubsae.recipes.registry import find_recipe, prepare
from hubsae.recipes.standard import Activations
from hubsae.recipes.tour import STOCK_SAELENS
from tests.index.rule_model import RuleModel, served

QUICK = [
    "model.size=quick", "data.max_tokens=8000", "sae.tokens=16384", "sae.save_every=10", "sae.batch_size=256",
    "dead.tokens=4096", "steering.features=2", "steering.prompts=4", "steering.new_tokens=6", "measure.texts=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "release"
    prepare("qwen3_release", overrides=QUICK, out=folder).execute()
    return folder


# ---- the card ----------------------------------------------------------------------------------------------------


def test_the_full_profile_is_the_card_line_by_line():
    c = find_recipe("qwen3_release").config("full")
    t = c.training()
    assert (c.model.id, c.model.revision, c.data.attention) == ("Qwen/Qwen3-8B", "b968826", "sdpa")
    assert (c.data.layer, c.data.id) == (35, "lmsys/lmsys-chat-1m")
    assert (c.model.d_model, t.width(4096), t.k, t.architecture) == (4096, 65_536, 64, "topk")
    assert (t.normalize, t.lr, t.betas, t.batch_size, t.precision) == ("mean_std", 3e-4, (0.9, 0.999), 32_768, "bf16")
    assert t.aux is not None and (t.aux.coefficient, t.aux.k) == (0.03125, 512)
    assert (t.schedule.warmup_tokens, t.checkpoint_every, t.keep_best, t.metric) == (1_000_000, 5_000, 3, "train_loss")
    assert t.exclude == () and {"pt", "onnx", "raw", "bundle"} == set(c.exports)
    assert (c.index.top, c.index.window) == (5, 8)
    assert t.steps(280_280_758)[1] == 70_000 and t.tokens == 2_293_760_000
    assert (c.data.max_tokens, c.data.samples) == (280_280_758, 978_471)
    assert round(2_293_760_000 / c.data.max_tokens, 2) == 8.18
    assert c.name == "qwen3-8b-sae-l36-topk64"
    # where the card's scores rest on 106 tokens
    assert c.measure.texts * c.measure.text_length > 100_000 < c.data.max_tokens * c.data.validation_fraction


def test_the_full_plan_agrees_with_the_cards_figures():
    plan = {step.name: step.estimate for step in prepare("qwen3_release", profile="full").steps}
    assert plan["train"].what.startswith("536,940,544 parameters, 70,000 steps")
    assert plan["activations"].disk == 280_280_758 * 4096 * 2
    # eight passes over 2.3 TB, and the states
    assert 18.5e12 < plan["train"].moved < 19.5e12
    assert all(plan[name].seconds > 0 for name in ("activations", "train", "index", "steering", "measure", "dead"))
    # 12 bytes a weight in training: weights and two moments, and room for a step
    assert plan["train"].memory >= 12 * 536_940_544
    # four checkpoints, each five times (the release and four exports)
    assert plan["checkpoints"].disk == 4 * 5 * 4 * 536_940_544


def test_what_the_recipe_says_was_published_is_what_the_card_says():
    with open(find_recipe("qwen3_release").folder / "published.csv", newline="") as file:
        found = {(row["step"], row["quantity"]): float(row["value"]) for row in csv.DictReader(file)}
    assert (found["5000", "fve"], found["10000", "fve"], found["74670", "fve"]) == (0.694073, 0.701040, 0.7188)
    # the card's mse is in the normalised space, of which the variance is 1.0574 at both snapshots
    for step in ("5000", "10000"):
        assert found[step, "mse_normalised"] / (1 - found[step, "fve"]) == pytest.approx(1.0574, abs=1e-4)
    assert 1 - found["70000", "active"] / 65_536 == pytest.approx(0.549, abs=5e-4)


def test_small_is_the_real_model_with_enough_records_and_tokens():
    c = find_recipe("qwen3_release").config("small")
    assert (c.model.id, c.sae.expansion, c.sae.k) == ("small", 16, 64)
    assert c.sae.tokens >= 300_000 and c.data.max_tokens * (1 - c.data.validation_fraction) >= 510_000
    assert len(c.dead.seeds) == 2 and set(c.dead.variants) >= {"centred", "auxk", "resampled", "batch_topk"}


# ---- a finished run ----------------------------------------------------------------------------------------------


def test_the_best_three_and_the_last_are_releases_that_say_which_step_they_are(run):
    result = read_json(run / ".steps/checkpoints.json")["result"]
    steps = [one["step"] for one in result["kept"]]
    assert steps[-1] == 64 == result["published"] and result["kept"][-1]["last"]
    assert {one["rank"] for one in result["kept"]} >= {1, 2, 3} and all(step % 10 == 0 for step in steps[:-1])
    for step in steps:
        release = Release.open(run / f"checkpoints/step-{step:06d}")
        release.verify()
        record = release.metadata("layer2")
        assert record.training.selection.startswith(f"step {step} of 64: ")
        # the tokens at position 0 are read and not trained on
        assert record.training.steps == step and 0.9 * step * 256 < record.training.tokens < step * 256
        assert release.load("layer2").fingerprint is not None


def test_the_release_says_whether_a_model_fits(run, quick_world):
    sae = HubSAE.from_pretrained(run / "release")
    assert sae.check(quick_world.model, quick_world.tokenizer)
    assert "wrong layer" in str(sae.check(quick_world.model, quick_world.tokenizer, hook=1))


def test_every_export_gives_the_same_codes_by_its_own_reader_and_by_hand(run):
    folder = run / "release/layer2"
    held = Activations(run / "activations").open(2, "validation")
    x, labels = held.rows(0, 400, columns=["position"])
    x = x.float()[torch.from_numpy(labels["position"] > 0)]
    sae = HubSAE.from_pretrained(folder)
    z, rebuilt = sae.encode(x), sae(x)
    rows = {row["export"]: row for row in read_csv(run / "release/results/exports.csv")}
    assert set(rows) == {"bundle", "pt", "onnx", "raw"}
    for row in rows.values():
        assert float(row["codes"]) <= 1e-6 and float(row["reconstruction"]) <= 1e-6 and int(row["other_support"]) == 0
    # the bundle, with nothing of hubsae: the normaliser from the JSON, the tensors from the file
    meta, t = read_json(folder / "model.metadata.json"), load_file(folder / "model.safetensors")
    mean, std = (torch.tensor(meta[name]) for name in ("input_mean", "input_std"))
    pre = ((x - mean) / std - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    top = pre.topk(meta["k"])
    codes = torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())
    by_hand = (codes @ t["W_dec"] + t["b_dec"]) * std + mean
    assert torch.equal(codes != 0, z != 0)
    assert float((by_hand - rebuilt).norm() / rebuilt.norm()) < 1e-6
    # raw tensors, with numpy
    shapes = {n: e["shape"] for n, e in read_json(folder / "raw/tensors.json")["tensors"].items()}
    raw = {n: torch.from_numpy(np.fromfile(folder / "raw" / n, "<f4").reshape(s)) for n, s in shapes.items()}
    pre = (x - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"]
    assert float((pre.topk(meta["k"]).values.relu() - z.topk(meta["k"]).values).norm() / z.norm()) < 1e-6


def test_the_inventory_lists_every_file_with_its_hash_and_where_the_weights_come_from(run):
    inventory = read_json(run / "release/release_manifest.json")
    for entry in inventory["files"]:
        file = run / "release" / entry["path"]
        assert file.stat().st_size == entry["size"] and sha256_file(file) == entry["sha256"], entry["path"]
    there = {p.relative_to(run / "release").as_posix() for p in (run / "release").rglob("*") if p.is_file()}
    assert {entry["path"] for entry in inventory["files"]} == there - {
        "config.json",
        "README.md",
        "release_manifest.json",
    }
    lineage = inventory["lineage"]
    assert lineage["checkpoint"]["step"] == 64 and lineage["training"]["d_sae"] == 1024
    assert lineage["hook_point"] == "layers.2" and lineage["texts"]["id"] == "quick-chats"


def test_the_errors_in_normalised_space_are_those_of_a_plain_computation(run):
    release = Release.open(run / "release")
    sae, record = release.load("layer2"), release.metadata("layer2")
    held = Activations(run / "activations").open(2, "validation")
    x, labels = held.rows(0, len(held), columns=["position"])
    x = x.double()[torch.from_numpy(labels["position"] > 0)]
    mean, std = sae.normalizer.mean.double(), sae.normalizer.std.double()
    away, spread = (x - sae(x.float()).double()) / std, (x - mean) / std
    scope = record.own_scope
    assert scope == "not position_0"
    assert record.metric("mse_normalised", scope) == pytest.approx(float(away.square().mean()), rel=1e-5)
    fve = 1 - float(away.square().sum() / spread.square().sum())
    assert record.metric("fve_normalised", scope) == pytest.approx(fve, rel=1e-5)
    again = reconstruction({"a": sae}, held)["a"]
    assert record.metric("fve", scope) == again.value("fve", scope)
    # the normaliser is that of the harvest
    stats = Activations(run / "activations").open(2, "train").stats
    assert torch.allclose(sae.normalizer.mean.double(), stats.mean_without_first, rtol=1e-6)


def test_every_checkpoint_stands_in_the_evaluation_with_intervals_and_the_cards_scores(run):
    rows = read_csv(run / "release/results/evaluation.csv")
    kept = read_json(run / ".steps/checkpoints.json")["result"]["kept"]
    assert {row["checkpoint"] for row in rows} == {f"step-{one['step']:06d}" for one in kept}
    for row in rows:
        assert row["metric"] == "dead_fraction" or float(row["low"]) <= float(row["value"]) <= float(row["high"])
    assert {"kl_score", "frac_recovered_zero", "fve_normalised"} <= {row["metric"] for row in rows}
    every = read_csv(run / "release/results/all_metrics.csv")
    mine = {
        r["metric"]: float(r["value"]) for r in every
        if r["sae"] == "step-000064" and r["scope"] == "not position_0" and r["value"]
    }  # fmt: skip
    assert mine["kl_score"] == pytest.approx(1 - mine["kl"] / mine["kl_zero"], rel=1e-9)


def test_the_index_has_the_seeds_files_and_counts(run):
    folder = run / "release/reverse-index/layer2"
    names = {"summary.json", "feature_metrics.parquet", "feature_prompts.parquet", "report.md"}
    assert names <= {p.name for p in folder.iterdir()}
    index, found = FeatureIndex.open(folder), read_json(run / ".steps/index.json")["result"]
    counts = index.metrics["count"].to_numpy()
    assert found["n_active"] == int((counts > 0).sum()) and found["n_active"] + found["n_dead"] == 1024
    # at most five conversations each, as many as there are
    table = pq.read_table(folder / "feature_prompts.parquet", columns=["feature", "kind"]).to_pylist()
    kept = Counter(row["feature"] for row in table if row["kind"] == "prompt")
    assert found["prompt_rows"] == kept.total() and max(kept.values()) == 5
    assert set(kept) == set(np.flatnonzero(counts).tolist())


def test_a_judge_names_features_and_its_names_are_scored(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "judged")
    with served(RuleModel()) as chat:
        judge = ["judge.model=rules", f"judge.server={chat.url}", "judge.features=4"]
        prepared = prepare("qwen3_release", overrides=[*QUICK, *judge], out=folder)
        names = [step.name for step in prepared.steps]
        outcomes = prepared.run.execute(prepared.steps[: names.index("index") + 1])
    assert [one.name for one in outcomes if one.ran] == ["index"]
    index = folder / "index" / outcomes[-1].result["folder"]
    named = {one.feature: one for one in labels.read(index)}
    assert len(named) == 4 and {one.author for one in named.values()} == {"rules"}
    tops = {row["feature"]: row for row in pq.read_table(index / "feature_metrics.parquet").to_pylist()}
    for feature, label in named.items():
        assert label.text.startswith("says ") and tops[feature]["count"] > 0
        assert label.score is not None and label.low <= label.score <= label.high and label.n > 0


def test_the_card_says_which_features_steer_and_which_checkpoint_this_is(run):
    card = (run / "release/README.md").read_text()
    verdicts = read_csv(run / "release/results/steering.csv")
    assert len(verdicts) == 2
    assert "Checkpoint of step 64 of 64" in card and "Steering, measured on 4 prompts" in card
    for row in verdicts:
        assert row["verdict"] in card and row["feature"].removeprefix("feature ") in card
    kinds = {row["kind"] for row in read_csv(run / "release/results/dose_response.csv")}
    assert kinds == {"feature", "random feature", "random direction"}
    written = read_csv(run / "release/results/steered_texts.csv")
    assert {row["word"] for row in written} == {row["word"] for row in verdicts}


def test_the_table_of_dead_features_has_every_variant_over_both_seeds(run):
    rows = {row["variant"]: row for row in read_csv(run / "release/results/dead_features.csv")}
    assert list(rows) == ["plain", "centred", "normalised", "auxk", "resampled", "batch_topk", "release"]
    cells = read_csv(run / "release/results/dead_cells.csv")
    for name, row in rows.items():
        mine = [float(cell["dead"]) for cell in cells if cell["variant"] == name]
        assert row["seeds"] == "2" and float(row["dead"]) == pytest.approx(np.mean(mine))
    stats = Activations(run / "activations").open(2, "train").stats
    gamma = float(stats.mean_without_first.norm() / stats.std_without_first.norm())
    for name, row in rows.items():
        raw = name in ("plain", "auxk", "resampled", "batch_topk")
        assert float(row["gamma"]) == pytest.approx(gamma if raw else 0)


def harvested(run: Path, folder: Path) -> Path:
    """A run folder that begins where the harvest of another has ended."""
    (folder / ".steps").mkdir(parents=True)
    for step in ("subject", "activations"):
        shutil.copytree(run / step, folder / step)
        shutil.copy(run / ".steps" / f"{step}.json", folder / ".steps")
    return folder


def test_live_training_reads_conversations_behind_those_of_the_harvest(run, tmp_path):
    overrides = [*QUICK, "live.on=true", "live.buffer_rows=2000", "sae.tokens=5120"]
    prepared = prepare("qwen3_release", overrides=overrides, out=harvested(run, tmp_path / "live"))
    outcomes = {one.name: one for one in prepared.run.execute(prepared.steps[:4])}
    assert [one.ran for one in outcomes.values()] == [False, False, True, True]
    assert outcomes["train"].result["steps"] == 20
    record = Release.open(tmp_path / "live/checkpoints/step-000020").metadata("layer2")
    assert record.own_scope == "not position_0" and record.activations.text_dataset == "quick-chats"
    # its normaliser is that of the harvest all the same
    stats = Activations(run / "activations").open(2, "train").stats
    made = HubSAE.from_pretrained(tmp_path / "live/checkpoints/step-000020/layer2")
    assert torch.allclose(made.normalizer.mean.double(), stats.mean_without_first, rtol=1e-6)


# ---- halted and killed -------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from hubsae.recipes.registry import prepare
prepare("qwen3_release", overrides=json.loads(sys.argv[2]), out=sys.argv[1]).execute()
"""


def start(folder: Path, overrides: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(overrides)], env=env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def halt(folder: Path, overrides: list[str], step: int, sig: int) -> None:
    """Start a run and stop it behind the state of a training step."""
    process = start(folder, overrides)
    while max((int(path.name[5:]) for path in (folder / "train/state").glob("step_*")), default=0) < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.02)
    process.send_signal(sig)
    process.wait()


LONG = [*QUICK, "sae.tokens=2560000"]
"""Ten thousand steps: there is time to stop it."""


def test_a_halted_run_is_rescued_published_and_goes_on_afterwards(run, tmp_path):
    folder = harvested(run, tmp_path / "halted")
    halt(folder, LONG, 30, signal.SIGKILL)
    state = max(int(p.name[5:]) for p in (folder / "train/state").glob("step_*"))
    begun = (folder / ".steps/train.begun").read_text()
    with localhub.running(root=tmp_path / "hub", tokens=[Token.parse("me=hf_me")]) as hub:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder),
             json.dumps([*LONG, "from_checkpoint=best", "publish.release=me/rescued"])],
            env={**os.environ, **hub.env(home=tmp_path / "home"), "HF_TOKEN": "hf_me"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        sae = HubSAE.from_pretrained("me/rescued", endpoint=hub.url, token="hf_me", cache_dir=tmp_path / "cache")
        why = read_json(folder / ".steps/checkpoints.json")["result"]["why"]
        assert why.endswith(f"training was halted at step {state:,}") and "number 1 of the kept ones" in why
        assert sae.metadata.training.selection == why
        assert f"training was halted at step {state:,}" in (folder / "release/README.md").read_text()
    kept = read_json(folder / ".steps/checkpoints.json")["result"]["kept"]
    best = min((one for one in kept if one["rank"]), key=lambda one: one["rank"])
    assert sae.metadata.training.steps == best["step"]
    weights = load_file(folder / f"train/best/sae/step_{best['step']:08d}.safetensors")
    # the published weights are the kept ones, folded
    std = sae.normalizer.std
    assert torch.allclose(sae.W_dec, weights["W_dec"] * std, rtol=1e-5, atol=1e-7)
    # training was not touched: it would go on from where it stood
    assert (folder / ".steps/train.begun").read_text() == begun
    assert (
        prepare("qwen3_release", overrides=LONG, out=folder)
        .run.states(prepare("qwen3_release", overrides=LONG, out=folder).steps)["train"]
        .state
        == "incomplete"
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", ["activations", "train", "checkpoints", "measure", "index", "steering", "dead"])
def test_a_run_killed_in_any_step_ends_as_if_nothing_had_happened(run, step, tmp_path):
    folder = tmp_path / "killed"
    process = start(folder, QUICK)
    begun = folder / ".steps" / f"{step}.begun"
    while not begun.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.wait()
    prepare("qwen3_release", overrides=QUICK, out=folder).execute()
    for name in ("layer2/sae_weights.safetensors", "results/dead_features.csv", "results/steering.csv"):
        assert (folder / "release" / name).read_bytes() == (run / "release" / name).read_bytes(), name


@pytest.mark.slow
def test_hubsae_stock_saelens_onnxruntime_and_raw_tensors_give_the_same_codes_of_a_release_on_a_hub(run, tmp_path):
    pytest.importorskip("sae_lens")
    onnxruntime = pytest.importorskip("onnxruntime")
    x, labels = Activations(run / "activations").open(2, "validation").rows(0, 300, columns=["position"])
    x = x.float()[torch.from_numpy(labels["position"] > 0)]
    torch.save(x, tmp_path / "x.pt")
    with localhub.running(root=tmp_path / "hub", tokens=[Token.parse("me=hf_me")]) as hub:
        where: Any = {"endpoint": hub.url, "token": "hf_me"}
        push(run / "release", "me/release", bar=False, **where)
        sae = HubSAE.from_pretrained("me/release", cache_dir=tmp_path / "cache", **where)
        folder = Path(HfApi(**where).snapshot_download("me/release", cache_dir=tmp_path / "plain"))
        env = {**os.environ, **hub.env(home=tmp_path / "home"), "HF_TOKEN": "hf_me"}
        arguments = ["me/release", "layer2", str(tmp_path / "x.pt"), str(tmp_path / "theirs.pt")]
        subprocess.run([sys.executable, "-c", STOCK_SAELENS, *arguments], env=env, check=True)
    mine, theirs = sae.encode(x), torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert not theirs["hubsae"]
    session = onnxruntime.InferenceSession(str(folder / "layer2/model.onnx"), providers=["CPUExecutionProvider"])
    (by_onnx,) = session.run(["latents"], {"x": x.numpy()})
    shapes = {n: e["shape"] for n, e in read_json(folder / "layer2/raw/tensors.json")["tensors"].items()}
    raw = {n: torch.from_numpy(np.fromfile(folder / "layer2/raw" / n, "<f4").reshape(s)) for n, s in shapes.items()}
    top = ((x - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"]).topk(sae.config.k or 0)
    by_hand = torch.zeros_like(mine).scatter_(1, top.indices, top.values.relu())
    for codes in (theirs["z"], torch.from_numpy(by_onnx), by_hand):
        assert torch.equal(codes != 0, mine != 0)
        assert float((codes - mine).norm() / mine.norm()) < 1e-6


# ---- the seed's own repo -----------------------------------------------------------------------------------------


def seed_layout(folder: Path, source: HubSAE) -> None:
    """A repo as the card lists it: one SAE five times at the root, and its index."""
    write(source, folder, "bundle")
    write(source, folder / "model.pt", "pt")
    write(source, folder / "model.onnx", "onnx")
    for name, tensor in source.tensors().items():
        tensor.numpy().astype("<f4").tofile(folder / name)
    (folder / "release_manifest.json").write_text('{"step": 70000}')
    index = folder / "reverse-index/l36-complete-merged"
    index.mkdir(parents=True)
    (index / "summary.json").write_text("{}")
    (index / "report.md").write_text("# l36\n")


def test_the_seeds_own_layout_is_read_and_upgraded_by_a_push(run, tmp_path):
    source = HubSAE.from_pretrained(run / "release/layer2")
    seed_layout(tmp_path / "seed", source)
    x = Activations(run / "activations").open(2, "validation").rows(1, 200).x.float()
    with localhub.running(root=tmp_path / "hub", tokens=[Token.parse("me=hf_me")]) as hub:
        api = HfApi(endpoint=hub.url, token="hf_me")
        api.create_repo("me/seed")
        api.upload_folder(repo_id="me/seed", folder_path=tmp_path / "seed")
        where: Any = {"endpoint": hub.url, "token": "hf_me"}
        sae = HubSAE.from_pretrained("me/seed", cache_dir=tmp_path / "cache", **where)
        assert torch.equal(sae.encode(x) != 0, source.encode(x) != 0)
        assert float((sae(x) - source(x)).norm() / source(x).norm()) < 1e-6
        assert sae.metadata.base_model.id == source.metadata.base_model.id
        result = push("me/seed", "me/upgraded", bar=False, check_saelens=False, **where)
        assert result.committed
        again = HubSAE.from_pretrained("me/upgraded", cache_dir=tmp_path / "cache", **where)
        assert again.metadata.hook.module_path == "model.layers.2" and again.normalizer is not None
        assert torch.equal(again.encode(x), sae.encode(x))
        assert "config.json" in api.list_repo_files("me/upgraded")


def test_the_command_line_leaves_out_training_where_a_checkpoint_is_named(tmp_path):
    def shown(*more: str):
        command = ["run", "qwen3_release", "--dry-run", "--json", "--out", str(tmp_path), *more]
        return CliRunner().invoke(app, command)

    names = [step["step"] for step in json.loads(shown().output)["steps"]]
    rescued = [step["step"] for step in json.loads(shown("--from-checkpoint", "30").output)["steps"]]
    assert [name for name in names if name not in rescued] == ["train", "dead"] and not list(tmp_path.iterdir())
    wrong = shown("--from-checkpoint", "newest")
    assert wrong.exit_code != 0 and "best, last or a step" in str(wrong.exception)
