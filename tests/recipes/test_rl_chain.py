"""The rl_chain recipe, end to end on the quick tiny world: what it leaves, what it skips, kills, other stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hubsae.core.errors import ConfigError, NotFoundError
from hubsae.core.files import read_csv, read_json, sha256_file
from hubsae.formats import Release
from hubsae.hub.sae import HubSAE
from hubsae.recipes.registry import find_recipe, prepare
from hubsae.rl.stages import Checkpoint

RECIPE = find_recipe("rl_chain")
settings = RECIPE.module("settings")
ChainConfig = settings.ChainConfig

STAGES = ["instruct_base", "ppo_step2", "ppo_step4"]


def test_the_release_holds_every_stage_and_layer_and_loads_by_them(strict_run):
    release = Release.open(strict_run / "release")
    release.verify()
    assert sorted(release.ids) == sorted(f"saes_k8/{stage}/layer{layer}" for stage in STAGES for layer in (1, 3))
    sae = HubSAE.from_pretrained(strict_run / "release", layer=3, stage="ppo_step4")
    assert sae.config.k == 8 and sae.config.d_sae == 512
    info = sae.metadata.base_model
    assert (info.id, info.stage, info.step, info.merge_dtype) == ("tiny-world", "ppo_step4", 4, "float32")
    for metric in ("nmse_pooled", "fvu", "n_dead", "ce_sae", "frac_recovered_mean", "kl"):
        assert sae.metadata.metric(metric) is not None, metric


def test_each_sae_knows_the_model_of_its_stage(strict_run, quick_world):
    base, kept = str(strict_run / "source/model"), {}
    for stage in STAGES:
        where = Checkpoint(stage, base) if stage == STAGES[0] else Checkpoint(
            stage, str(strict_run / "rl/stages" / stage), base=base
        )  # fmt: skip
        model = where.load()
        for layer in (1, 3):
            sae = HubSAE.from_pretrained(strict_run / "release", layer=layer, stage=stage)
            found = sae.check(model, quick_world.tokenizer)
            assert found and found.difference < 1e-3, (stage, layer, str(found))
            wrong = sae.check(model, quick_world.tokenizer, hook=4 - layer)
            assert not wrong and "wrong layer" in str(wrong)
            kept[stage, layer] = sae.fingerprint.activations
    # reinforcement moves little in four steps, but what is kept is that of each stage
    assert all(not torch.equal(kept[STAGES[0], 3], kept[stage, 3]) for stage in STAGES[1:])


def test_stock_saelens_computes_the_same(strict_run):
    sae_lens = pytest.importorskip("sae_lens")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 3
    for stage in STAGES:
        folder = strict_run / "release" / "saes_k8" / stage / "layer1"
        theirs = sae_lens.SAE.load_from_disk(folder)
        ours = HubSAE.from_pretrained(folder)
        with torch.no_grad():
            assert torch.allclose(theirs.encode(x), ours.encode(x), atol=1e-4)
            assert torch.allclose(theirs(x), ours(x), atol=1e-4)


def test_each_stage_starts_from_the_one_before(strict_run):
    for layer in (1, 3):
        rows = read_csv(strict_run / f"chains/saes_k8/layer{layer}/chain.csv")
        assert [row["stage"] for row in rows] == STAGES
        # little changes between stages this close, so what a stage starts from is near what the last one ended with
        for before, now in pairwise(rows):
            assert float(now["val_mse_before"]) < 0.9 * float(rows[0]["val_mse_before"])
            assert float(now["val_mse_before"]) == pytest.approx(float(before["val_mse_after"]), rel=0.25)


def test_the_control_is_trained_as_long_on_base_activations_and_subtracted(strict_run):
    control = strict_run / "chains/saes_k8/layer3/control"
    assert sorted(path.name for path in control.iterdir()) == STAGES
    rows = read_csv(strict_run / "drift/drift_control.csv")
    assert rows
    assert "Change since the base" in (strict_run / "report/report.md").read_text()


def test_the_report_is_about_the_tokens_that_the_saes_are_for():
    config = RECIPE.config("small", "strict")
    row = {"chain": "saes_k32", "layer": "15", "k": "32", "texts": "prompt+response", "n_tokens": "99"}
    rows = [
        {**row, "metric": "fvu", "scope": "all", "value": "0.9"},
        {**row, "metric": "fvu", "scope": "not position_0", "value": "0.2"},
    ]
    assert config.sae.exclude == ("position_0",)
    (found,) = RECIPE.module("report").headline_rows(config, {"instruct_base": rows})
    assert found["fvu"] == 0.2


def test_the_report_says_whether_anything_moved_from_the_numbers_alone():
    config = RECIPE.config("small", "strict")  # 16 responses a step
    say = RECIPE.module("conclusions").conclusions

    def grades(*shares):
        return {f"stage{i}": {"strict": share, "problems": 64} for i, share in enumerate(shares)}

    nothing = say(config, grades(0.0, 0.0), [{"reward": "0.0"}] * 10, [], [])
    assert "0 of 160 responses were rewarded: there was nothing to learn from" in nothing[0]
    assert "from 0.000 to 0.000 on 64 problems" in nothing[1] and "not to be told from none" in nothing[1]
    steps = [{"reward": str(reward)} for reward in [0.0] * 5 + [0.5] * 5]
    net = {"layer": "15", "k": "32", "metric": "fvu", "delta_net": "-0.01"}
    control = [
        {**net, "scope": "not position_0", "step": "5.0", "low": "-0.02", "high": "-0.005"},
        {**net, "scope": "not position_0", "step": "10.0", "low": "-0.02", "high": "0.001"},
        {**net, "scope": "all", "step": "10.0", "low": "-0.02", "high": "-0.01"},
    ]
    learned = say(config, grades(0.1, 0.5), steps, [{"stage": "ppo_step10", "update": "0.0123"}], control)
    assert "40 of 160" in learned[0] and "so it moved" in learned[0] and "so it moved" in learned[1]
    assert "`ppo_step10` differ from the base's by 0.012 of their norm" in learned[2]
    assert "layer 15 k 32 -0.01 [-0.02, +0.001]; 0 of 1 intervals leave out zero" in learned[3]
    assert "not to be told from none" in say(config, grades(0.10, 0.15), [], [], [])[0]


def test_the_card_and_the_report_show_drift(strict_run):
    card = (strict_run / "release/README.md").read_text()
    plots = [path.name for path in (strict_run / "release/plots").glob("*.png")]
    assert plots and all(f"plots/{name}" in card for name in plots)
    report = (strict_run / "report/report.md").read_text()
    for figure in ("learning.png", "../drift/"):
        assert figure in report
    assert "no verdict is given" in report.replace("\n", " ")
    accuracy = read_csv(strict_run / "report/accuracy.csv")
    assert [row["stage"] for row in accuracy] == STAGES and {"strict", "flexible", "lm_eval_strict"} <= accuracy[
        0
    ].keys()


def test_the_loss_of_a_bfloat16_merge_is_measured(strict_run):
    rows = {(row["stage"], row["stored_in"]): row for row in read_csv(strict_run / "merge/merge_loss.csv")}
    early, late = rows["ppo_step2", "bfloat16"], rows["ppo_step4", "bfloat16"]
    assert 0 < float(early["update"]) < float(late["update"])
    assert 0 < float(rows["ppo_step2", "float16"]["unchanged"]) < float(early["unchanged"]) < 1
    # the smaller the update, the larger the share of it that rounding swallows
    assert float(early["unchanged"]) > float(late["unchanged"])


def test_nothing_is_repeated_when_nothing_changed(small_chain, strict_run):
    assert not any(outcome.ran for outcome in small_chain(strict_run).execute())


def test_a_change_of_the_saes_leaves_the_policy_alone(small_chain, strict_run):
    changed = small_chain(strict_run, "strict", "sae.epochs=3")
    states = changed.run.states(changed.steps)
    finished = {name for name, state in states.items() if state.state == "finished"}
    assert {"source", "rl", "merge", "activations/own", "activations/prompt-response"} <= finished
    assert "sae" in states["chains/saes_k8/layer1"].why
    assert not finished & {"drift", "release", "report"}


def hashes(run: Path) -> dict[str, str]:
    """What a run leaves, without its journal and what says when and where it was made."""
    skipped = {"run.json", ".lock", "state.pt", "metadata.json", "config.json", "README.md"}
    return {
        path.relative_to(run).as_posix(): sha256_file(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and ".steps" not in path.parts and path.name not in skipped
    }


RUN = """
import json, sys
from hubsae.recipes.registry import prepare
from hubsae.recipes.registry import find_recipe


prepare("rl_chain", variant="strict", overrides=json.loads(sys.argv[2]), out=sys.argv[1]).execute()
"""


# what must exist when the process is killed: in the middle of each of the long steps
MOMENTS = [
    ["rl/stages/ppo_step2", "chains/saes_k8/layer1/training/*/*"],
    pytest.param(["activations/own/ppo_step2.layers.1", "drift/*.csv", "release/config.json"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("moments", MOMENTS, ids=["learning", "data and release"])
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(strict_run, small_overrides, tmp_path, moments):
    out = tmp_path / "run"
    argv = [sys.executable, "-c", RUN, str(out), json.dumps(small_overrides)]
    for moment in moments:
        running = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
        while not list(out.glob(moment)):
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.wait()
    before = {path.name: path.stat().st_mtime_ns for path in (out / ".steps").glob("*.json")}
    assert before
    subprocess.run(argv, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name, written in before.items():
        assert (out / ".steps" / name).stat().st_mtime_ns == written, f"{name} was finished and done again"
    assert hashes(out) == hashes(strict_run)


def test_the_control_config_follows_the_base_model_only(small_chain, tmp_path):
    prompts_only = ["harvest.modes=[prompt]", "harvest.train_on=prompt"]
    run = small_chain(tmp_path, "control", "control_steps=[2, 4]", *prompts_only)
    assert "rl" not in [step.name for step in run.steps]
    run.execute()
    harvested = [path.name for path in (tmp_path / "activations/prompt").glob("*.layers.1")]
    assert harvested == ["instruct_base.layers.1"]
    release = Release.open(tmp_path / "release")
    assert release.load(layer=1, stage="control_step4").metadata.base_model.step == 4
    saes = [release.load(layer=1, stage=stage) for stage in ("instruct_base", "control_step2", "control_step4")]
    assert not torch.equal(saes[1].W_dec, saes[2].W_dec)


def test_stages_may_be_checkpoints_that_exist_already(small_chain, strict_run, quick_world, tmp_path):
    rl = strict_run / "rl/stages"
    base = str(strict_run / "source/model")
    merged = tmp_path / "merged"
    Checkpoint("x", str(rl / "ppo_step4"), base=base).load().save_pretrained(merged)
    quick_world.tokenizer.save_pretrained(merged)
    stages = f"stages={{ppo_step2: {rl / 'ppo_step2'}, ppo_step4: {merged}}}"
    run = small_chain(tmp_path / "run", "strict", stages, "harvest.modes=[prompt+response]")
    assert "rl" not in [step.name for step in run.steps]
    run.execute()
    # an adapter and its merged checkpoint are the same stage, so the SAEs are those of the run that made them
    for stage in STAGES:
        ours = HubSAE.from_pretrained(tmp_path / "run/release", layer=1, stage=stage)
        theirs = HubSAE.from_pretrained(strict_run / "release", layer=1, stage=stage)
        assert torch.allclose(ours.W_dec, theirs.W_dec, atol=2e-3), stage


def test_two_chains_are_set_side_by_side(small_chain, strict_run, tmp_path):
    run = small_chain(tmp_path, "flexible", f"compare=['{strict_run}']", "rl.kl_coef=0.01")
    run.execute()
    rows = read_csv(tmp_path / "drift/comparison.csv")
    assert {(row["chain_a"], row["chain_b"]) for row in rows} == {("flexible", "strict")}
    assert "Beside other chains" in (tmp_path / "report/report.md").read_text()


def test_comparing_with_what_is_no_run_says_so(small_chain, tmp_path):
    with pytest.raises(NotFoundError, match="no finished run"):
        small_chain(tmp_path, "strict", f"compare=['{tmp_path}']")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["harvest.train_on=question"], "not among harvest.modes"),
        (["harvest.layers=[1]"], r"sae\.chains use layers \[3\]"),
        (["rl=null"], "stages come from one of"),
        (["rl.algorithm=reinforce"], "rl.algorithm"),
        (["rl.scorer=loose"], "no such scorer; there are strict"),
        (["control_steps=[1]"], "given: rl, control_steps"),
        (["stages={ppo_step2: /nowhere/at/all}"], None),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_runs(tmp_path, overrides, text):
    if text is None:
        run = prepare("rl_chain", variant="strict", overrides=["model.size=quick", *overrides], out=tmp_path)
        with pytest.raises(NotFoundError, match="neither a folder nor a repo id"):
            run.execute()
        return
    with pytest.raises(ConfigError, match=text):
        prepare("rl_chain", variant="strict", overrides=overrides, out=tmp_path)


def test_the_full_profiles_are_the_published_runs(tmp_path):
    chains = {}
    for variant in ("strict", "flexible", "kl0p025", "shuffled", "control"):
        config = prepare("rl_chain", profile="full", variant=variant, out=tmp_path).config
        assert isinstance(config, ChainConfig)
        chains[variant] = config
    published = {
        "strict": (10, 30, 50, 80, 116),
        "flexible": (10, 30, 60, 100, 140, 180, 200),
        "kl0p025": (10, 30),
        "shuffled": (10, 30),
    }
    for variant, steps in published.items():
        rl = chains[variant].rl
        assert rl is not None and rl.save_steps == steps
        assert (rl.prompts, rl.responses, rl.minibatches, rl.lr, rl.critic_lr) == (256, 8, 4, 1e-6, 1e-5)
        assert (rl.gamma, rl.lam, rl.clip, rl.value_clip, rl.entropy_coef) == (1.0, 1.0, 0.2, 0.5, 0.001)
        assert rl.kl_coef == (0.025 if variant == "kl0p025" else 0.005)
        assert rl.shuffled_gold == (variant == "shuffled")
        assert rl.scorer == ("strict" if variant == "strict" else "flexible")
    assert chains["control"].stage_names() == ["instruct_base", *(f"control_step{s}" for s in published["strict"])]
    members = [(member.chain.k, member.layer) for member in chains["strict"].members()]
    assert members == [(64, 6), (64, 12), (64, 18), (64, 23), (256, 23)]


def test_a_dry_run_of_the_full_profile_names_every_step_with_sizes_and_writes_nothing(tmp_path):
    out = tmp_path / "run"
    argv = ["recipe", "run", "rl_chain", "-c", "strict", "--profile", "full", "--dry-run", "--json", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "hubsae.cli.main", *argv], capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    names = [step["step"] for step in plan["steps"]]
    assert names[:2] == ["source", "rl"] and names[-1] == "report"
    assert {"activations/question", "activations/own", "chains/saes_l23_k256/layer23", "drift", "release"} <= set(names)
    by_name = {step["step"]: step for step in plan["steps"]}
    # 6 stages x 4 layers x 445,744 tokens x 896 x 2 bytes
    assert by_name["activations/question"]["disk_bytes"] == pytest.approx(6 * 4 * 445_744 * 896 * 2, rel=0.01)
    assert by_name["rl"]["memory_bytes"] > 10e9
    assert all(step["what"] for step in plan["steps"])
    assert not out.exists()


def test_run_json_says_what_was_run(strict_run):
    about = read_json(strict_run / "run.json")
    assert about["recipe"] == "rl_chain" and about["profile"] == "tiny"
    assert ChainConfig.model_validate(about["config"]).name == "strict"
    assert {"hubsae", "torch", "transformers", "peft"} <= about["versions"].keys()
