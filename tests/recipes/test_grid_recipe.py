"""The grid-search recipe end to end: small in the ordinary tests, the whole tiny profile when asked for."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hubsae.cli.recipe import app
from hubsae.core.files import read_csv
from hubsae.core.settings import read_yaml
from hubsae.formats.release import Release
from hubsae.localhub import running
from hubsae.recipes import standard
from hubsae.recipes.registry import copy_recipe, find_recipe, prepare
from hubsae.recipes.tiny import TinyWorld

RECIPE = find_recipe("grid_search")
settings, table = (RECIPE.module("settings"), RECIPE.module("table"))
GridConfig = settings.GridConfig
read_results = table.read_results

SMALL = [
    "model.size=quick", "data.layer=1", "data.prompts=300", "data.texts=24", "data.validation_fraction=0.25",
    "sweep.expansions=[2, 4]", "sweep.ks=[4]", "sweep.thresholds=[0.3]", "train.epochs=3", "train.batch_size=256",
    "train.lr=0.003",
    "synthetic.tokens=12000", "synthetic.epochs=6", "synthetic.features=64", "synthetic.l0=4", "synthetic.ks=[4]",
    "synthetic.d_in=32", "synthetic.expansions=[0.5, 1, 2]",
]  # fmt: skip
IDS = [
    f"{kind}_exp{expansion}x_{number}"
    for kind, number in (("TopK", "k4"), ("BatchTopK", "k4"), ("JumpReLU", "t0.3"), ("JumpReLU-STE", "l4"))
    for expansion in (2, 4)
]

SAELENS = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hubsae":
            raise ImportError("hubsae is not installed here")
sys.meta_path.insert(0, Refuse())
import torch
from sae_lens import SAE


repo, ids, x = sys.argv[1], json.loads(sys.argv[2]), torch.load(sys.argv[3])
out = {}
for name in ids:
    sae = SAE.from_pretrained(repo, name)
    with torch.no_grad():
        out[name] = (sae.encode(x), sae(x))
torch.save(out, sys.argv[4])
"""


@pytest.fixture(scope="module")
def cache(world_cache: Path, quick_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of tiny worlds, as the environment names it."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "tiny").symlink_to(world_cache)
    before = os.environ.get("HUBSAE_CACHE")
    os.environ["HUBSAE_CACHE"] = str(folder)
    yield folder
    os.environ.pop("HUBSAE_CACHE") if before is None else os.environ.update(HUBSAE_CACHE=before)


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small grid search, run once."""
    folder = tmp_path_factory.mktemp("grid") / "run"
    prepare("grid_search", profile="tiny", overrides=SMALL, out=folder).execute()
    return folder


def test_both_profiles_are_valid_and_the_full_one_is_the_published_sweep() -> None:
    recipe = find_recipe("grid_search")
    full, tiny = (recipe.config(profile) for profile in ("full", "tiny"))
    assert isinstance(full, GridConfig) and isinstance(tiny, GridConfig)
    ids = [cell.id for cell in full.sweep.cells()]
    told = read_csv(recipe.folder / "published.csv")
    for row in told:
        if row["k"]:
            assert f"{row['architecture']}_exp{row['expansion']}x_k{row['k']}" in ids
        elif row["threshold"]:
            assert f"JumpReLU_exp{row['expansion']}x_t{row['threshold']}" in ids
    assert sum(name.startswith(("TopK", "BatchTopK")) for name in ids) == 24
    assert (full.train.epochs, full.train.batch_size, full.train.lr) == (10, 512, 1e-4)
    assert len(tiny.sweep.cells()) >= 12
    assert set(read_yaml(recipe.folder / "full.yaml")) == set(read_yaml(recipe.folder / "tiny.yaml"))


def test_a_small_run_ends_in_a_release_with_every_number(run: Path) -> None:
    release = Release.open(run / "release")
    assert sorted(release.ids) == sorted(IDS)
    release.verify()
    rows = {row.id: row for row in read_results(run / "measure" / "results_full.csv")}
    assert sorted(rows) == sorted(IDS)
    for name, row in rows.items():
        for metric in ("mse", "nmse_pooled", "fvu", "l0", "dead_fraction", "delta_ce", "frac_recovered_mean", "kl"):
            assert row.value(metric) is not None, (name, metric)
            assert row.numbers[metric].n_tokens
        for metric in ("mse", "fvu", "l0", "delta_ce", "frac_recovered_zero"):
            number = row.numbers[metric]
            assert number.low is not None and number.high is not None
            assert number.low <= number.value <= number.high or number.low == pytest.approx(number.high)
        record = release.metadata(name)
        told = {(m.name, m.scope): m.value for m in record.metrics}
        assert told["fvu", "all"] == row.value("fvu")
        assert told["fvu", "not position_0"] == row.value("fvu@no_position_0")
        assert record.hook.module_path == "model.layers.1" and record.training.split is not None
        assert (release.folder(name) / "sparsity.safetensors").is_file()
        if name.startswith("BatchTopK"):
            assert record.config.threshold is not None
    assert {p.name for p in release.results} == {
        "results.csv", "results_full.csv", "comparisons.csv", "recovered.csv"
    }  # fmt: skip
    assert len(release.plots) >= 6
    assert "**Findings**" in (release.manifest.description or "")


def test_numbers_of_the_release_are_those_of_the_saes(run: Path, quick_world: TinyWorld) -> None:
    """A metric of the table, computed once more by hand from the packaged SAE."""
    from hubsae.activations import ActivationDataset

    held = ActivationDataset.open(run / "harvest", "layers.1", "validation")
    x = held.read_all().float()
    rows = {row.id: row for row in read_results(run / "measure" / "results_full.csv")}
    for name, sae in ((name, Release.open(run / "release").load(name)) for name in IDS):
        error = (x - sae(x)).double().square()
        assert rows[name].value("mse") == pytest.approx(float(error.mean()), rel=1e-4)
        z = sae.encode(x)
        assert rows[name].value("l0") == pytest.approx(float((z != 0).double().sum(1).mean()), rel=1e-4)
        dead = float((z == 0).all(0).double().mean())
        assert rows[name].value("dead_fraction") == pytest.approx(dead, abs=1e-9)
    assert rows[IDS[0]].numbers["mse"].n_tokens == len(held)


def test_held_out_prompts_are_whole_and_unseen(run: Path) -> None:
    from hubsae.activations import ActivationDataset

    parts = [ActivationDataset.open(run / "harvest", "layers.1", s).columns(["sample_id"])["sample_id"]
             for s in ("train", "validation")]  # fmt: skip
    train, held = (set(part.tolist()) for part in parts)
    assert not train & held and len(held) > 50


def test_known_features_come_out_more_often_with_more_latents(run: Path) -> None:
    with (run / "synthetic" / "recovered.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for kind in ("TopK", "BatchTopK", "JumpReLU-STE"):
        mine = [r for r in rows if r["id"].partition("_")[0] == kind]
        fractions = [float(r["fraction"]) for r in sorted(mine, key=lambda r: int(r["d_sae"]))]
        assert len(fractions) == 3 and fractions == sorted(set(fractions)), (kind, fractions)
        assert fractions[-1] > 0.8
        assert all(float(r["fraction"]) <= float(r["at_most"]) for r in mine)


def test_nothing_runs_twice_and_a_new_cell_runs_only_what_follows(run: Path) -> None:
    prepared = prepare("grid_search", profile="tiny", overrides=SMALL, out=run)
    assert [o.ran for o in prepared.execute()] == [False] * 8
    states = prepare("grid_search", profile="tiny", overrides=[*SMALL, "sweep.ks=[4, 8]"], out=run)
    changed = {name for name, state in states.run.states(states.steps).items() if state.state == "changed"}
    assert changed == {"train", "measure", "analysis", "release", "report"}


def test_the_report_puts_the_published_grid_and_its_claims_beside_ours(run: Path) -> None:
    text = (run / "report" / "report.md").read_text()
    assert "TopK is ahead in 10 of 12 matched cells" in text and "contradicted" in text
    assert "BatchTopK_exp4x_k4" in text and "| TopK | 16 | 220 |" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (run / "report" / line.partition("](")[2].rstrip(")")).is_file(), line


def test_measuring_in_parts_changes_nothing_and_a_broken_sae_is_left_out(
    run: Path, quick_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubsae.activations import ActivationDataset
    from hubsae.hub.sae import HubSAE

    room = RECIPE.module("measure")

    held = ActivationDataset.open(run / "harvest", "layers.1", "validation")
    texts = [{"messages": [*quick_world.messages(p), {"role": "assistant", "content": p.answer}]}
             for p in quick_world.test_problems[:8]]  # fmt: skip
    release = Release.open(run / "release")
    loaders = {name: lambda name=name: release.load(name) for name in IDS[:3]}

    def broken() -> HubSAE:
        sae = release.load(IDS[3])
        tensors = {**sae.tensors(), "b_dec": torch.full_like(sae.b_dec, torch.nan)}
        return HubSAE(sae.config, tensors, metadata=sae.metadata)

    model, tokenizer = quick_world.model, quick_world.tokenizer
    whole = room.measure({**loaders, IDS[3]: broken}, held, model, tokenizer, texts, "layers.1")
    assert [(f.id, f.reason) for f in whole.failed] == [(IDS[3], "its weights are not finite")]
    monkeypatch.setattr(standard, "WEIGHTS_AT_ONCE", 1)
    apart = room.measure(loaders, held, model, tokenizer, texts, "layers.1")
    assert apart.rows == whole.rows and len(apart.rows) == 3
    for metric, units in whole.units.items():
        for cell, (amount, weight) in units.items():
            assert (apart.units[metric][cell].amount == amount).all()
            assert (apart.units[metric][cell].weight == weight).all()
    saved = room.save_units(run / "units-again.npz", whole.units)
    again = room.load_units(saved)
    assert {m: set(u) for m, u in again.items()} == {m: set(u) for m, u in whole.units.items()}
    saved.unlink()
    # the sums over units are the metric itself
    for row in whole.rows:
        assert whole.units["mse"][row.cell].value == pytest.approx(row.value("mse"))
        assert whole.units["delta_ce"][row.cell].value == pytest.approx(row.value("delta_ce"), abs=1e-9)


def _push_and_check(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, d: int) -> None:
    """Push to a hub of this machine and load every SAE with stock SAELens, hubsae out of reach."""
    from hubsae import HubSAE, push

    pytest.importorskip("sae_lens")
    with running(root=tmp_path / "hub") as hub:
        env = hub.env(tmp_path / "home")
        for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "HF_HUB_CACHE"):
            monkeypatch.setenv(name, env[name])
        repo = f"{hub.user}/grid"
        done = push(release, repo, bar=False)
        assert done.committed
        ids = Release.open(release).ids
        x = torch.randn(64, d, generator=torch.Generator().manual_seed(1))
        torch.save(x, tmp_path / "x.pt")
        script = [sys.executable, "-c", SAELENS, repo, json.dumps(ids), str(tmp_path / "x.pt")]
        ran = subprocess.run(
            [*script, str(tmp_path / "out.pt")], env={**os.environ, **env}, capture_output=True, text=True, timeout=600
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        theirs = torch.load(tmp_path / "out.pt")
        assert list(theirs) == ids
        for name, (z, x_hat) in theirs.items():
            sae = HubSAE.from_pretrained(repo, name)
            torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-4)
            assert ((sae.encode(x) != 0) == (z != 0)).all(-1).float().mean() > 0.98
        page = HubSAE.from_pretrained(repo, ids[0]).metadata
        assert page.metric("fvu", "all") is not None
        from huggingface_hub import hf_hub_download

        card = Path(hf_hub_download(repo, "README.md", endpoint=hub.url)).read_text()
        assert "**Findings**" in card and ids[0] in card and "pareto_l0_fvu.png" in card


def test_the_release_is_pushed_and_every_sae_loads_in_stock_saelens(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_world: TinyWorld
) -> None:
    _push_and_check(run / "release", tmp_path, monkeypatch, quick_world.config.hidden)


def test_under_torchrun_the_cells_spread_over_ranks(run: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "spread"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python",
        sys.executable, "-m", "hubsae.cli.main", "recipe", "run", "grid_search", *SMALL, "--out", str(out), "--json",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HUBSAE_CACHE": str(cache)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout)["run"] == str(out), "said once, by the first rank"
    plans = [json.loads((out / "train" / f"plan-{rank}-of-2.json").read_text()) for rank in (0, 1)]
    cells = [sorted(name for group in plan for name in group) for plan in plans]
    assert all(cells) and sorted(cells[0] + cells[1]) == sorted(IDS)
    alone, spread = Release.open(run / "release"), Release.open(out / "release")
    assert sorted(spread.ids) == sorted(alone.ids)
    for name in IDS:
        for key, tensor in alone.load(name).tensors().items():
            torch.testing.assert_close(spread.load(name).tensors()[key], tensor, rtol=1e-3, atol=1e-4)


def test_an_edit_in_a_copy_of_the_recipe_shows_in_its_run(run: Path, tmp_path: Path) -> None:
    mine = copy_recipe("grid_search", tmp_path / "grid_search")
    edits = {
        "recipe.py": (
            "        drawn = [",
            '        drawn = [plots.pareto(folder / "error.png", found.rows, "mse", "error"),',
        ),
        "table.py": ('"frac_recovered_zero", "kl",', '"frac_recovered_zero", "kl", "l1",'),
    }
    for name, (before, after) in edits.items():
        text = (mine / name).read_text()
        assert text.count(before) == 1
        (mine / name).write_text(text.replace(before, after))
    out = tmp_path / "run"
    shutil.copytree(run, out)
    done = CliRunner().invoke(app, ["run", str(mine), *SMALL, "--out", str(out), "--redo", "measure"])
    assert done.exit_code == 0, done.output
    release = Release.open(out / "release")
    assert "error.png" in {plot.name for plot in release.plots}
    assert {"l1", "l1_low"} <= set(read_csv(release.path / "results" / "results_full.csv")[0])
    assert "![error](../analysis/plots/error.png)" in (out / "report" / "report.md").read_text()
    # what was not edited was not run again
    assert (out / "harvest").stat().st_mtime == (run / "harvest").stat().st_mtime


@pytest.mark.slow
def test_the_tiny_profile_ends_in_a_pushed_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    prepare("grid_search", profile="tiny", out=run).execute()
    assert len(Release.open(run / "release").ids) >= 12
    _push_and_check(run / "release", tmp_path, monkeypatch, 64)
