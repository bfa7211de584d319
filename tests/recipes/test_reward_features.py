"""Reward features: errors made by rule, no leak between problems, the release with its probes, the verdicts."""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hubsae import load_probe
from hubsae.activations.models import load_model
from hubsae.core.errors import DataError
from hubsae.core.files import read_csv, read_json
from hubsae.formats import Release
from hubsae.index.features import FeatureIndex
from hubsae.recipes.registry import find_recipe, prepare
from hubsae.recipes.standard import Activations
from hubsae.rl.reward_models import load_reward_model
from hubsae.rl.steps import split_steps

SMALLEST = [
    "model.size=quick", "data.prm=400", "data.train=300", "data.test=60", "prm.versions=2", "prm.batch=32",
    "sae.width=128", "sae.epochs=1", "layers=[1, 2]", "base_layers=[2]", "untrained_layers=[1]", "probe.shuffles=8",
    "probe.top=8", "truncation=20", "steer.prompts=3", "steer.tokens=8", "rl.steps=2", "rl.prompts=8",
    "rl.responses=2", "rl.minibatches=2", "rl.test_problems=16", "rl.test_every=2", "rl_layer=2",
]  # fmt: skip


scores = find_recipe("reward_features").module("scores")


@pytest.fixture(scope="module")
def recipe():
    return find_recipe("reward_features")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, quick_world) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "reward"
    prepare("reward_features", overrides=SMALLEST, out=folder).execute()
    return folder


QUESTION = "Ann has 12 cups and gets 30 more. Then Ann loses 5."
STEPS = ("12+30=42", "42-5=37", "#### 37")
MONEY = ("Each of 3 pays $14, so 3 x $14 = $42.", "So 42 - 7 = 35 is left.", "#### 35")


@pytest.mark.parametrize("kind", ["operand", "operation", "carry", "final"])
@pytest.mark.parametrize("steps", [STEPS, MONEY])
def test_an_error_is_of_its_kind_and_ends_the_solution(recipe, kind, steps):
    """What each kind promises, computed anew from the text of the wrong step."""
    corrupt = recipe.module("errors").corrupt
    for seed in range(30):
        found = corrupt(QUESTION, steps, kind, random.Random(seed))
        at = len(found) - 1
        assert found[:at] == steps[:at] and found[at] != steps[at]
        numbers = [int(n) for n in re.findall(r"\d+", found[at])]
        right = [int(n) for n in re.findall(r"\d+", steps[at])]
        if kind == "final":
            assert at == len(steps) - 1 and numbers != right
            continue
        a, b, c = numbers[-3:]
        op = re.search(r"\d\s*([-+x])\s*\$?\d", found[at])[1]
        value = {"+": a + b, "-": a - b, "x": a * b}[op]
        before = {int(n) for n in re.findall(r"\d+", " ".join([QUESTION, *steps[:at], steps[at]]))}
        if kind == "operand":
            assert value == c and a not in before and b == right[-2]
        elif kind == "operation":
            assert value == c and [a, b] == right[-3:-1] and c != right[-1]
        else:
            assert abs(value - c) == 10 and [a, b] == right[-3:-1]


def test_solutions_are_the_same_again_and_candidates_differ(recipe):
    make = recipe.module("errors").solutions
    sums = [(n, n + 3, 2 * n + 3) for n in range(10, 50)]
    rows = [
        {"question": f"Ann has {a} cups and gets {b} more.", "answer": f"{a}+{b}={c}\n#### {c}"} for a, b, c in sums
    ]
    found = make(rows, lambda q: f"{q}\n", wrong=(0.0, 1.0, 1.0, 1.0), first=7)
    assert found == make(rows, lambda q: f"{q}\n", wrong=(0.0, 1.0, 1.0, 1.0), first=7)
    for problem in range(7, 47):
        own = [s for s in found if s.problem == problem]
        assert len({s.steps for s in own}) == len(own) >= 3
        assert [s.kind for s in own].count("right") == 1
        assert all(s.good == (*[True] * (len(s.steps) - 1), s.kind == "right") for s in own)
    half = make(rows, lambda q: f"{q}\n")
    assert 8 < sum(s.kind != "right" for s in half) < 32 and len(half) == 40


def test_every_token_has_the_score_of_its_step_and_every_step_its_two_ends(recipe, quick_world):
    from hubsae.rl.steps import StepFormat

    Solution, items_of = recipe.module("errors").Solution, recipe.module("data").items_of
    solution = Solution(3, "user\nAnn?\n", ("2+3=5", "#### 5"), (True, False), "final", (0.9, 0.2))
    (item,) = items_of(quick_world.tokenizer, [solution], StepFormat())
    text = [quick_world.tokenizer.decode([token]) for token in item["input_ids"]]
    inside = item["step"] > 0
    assert np.isnan(item["score"][~inside]).all() and set(item["score"][inside]) == {0.9, 0.2}
    assert [text[i] for i in np.flatnonzero(item["step_end"])] == ["\n", "\n"]
    assert [text[i] for i in np.flatnonzero(item["content_end"])] == ["5", "5"]
    assert item["good"][item["step"] == 1].all() and not item["good"][item["step"] == 2].any()
    assert [text[i] for i in np.flatnonzero(item["is_format"] & (item["step"] == 1))] == ["+", "=", "\n"]
    assert item["length"][inside][0] == 1 and (np.diff(item["length"][item["step"] == 1]) == 1).all()


def test_kinds_of_errors_are_spread_over_the_solutions_they_fit(recipe):
    """Another final answer fits every solution; it is not made where a rarer kind fits too."""
    fits_all = {"question": QUESTION, "answer": "\n".join(STEPS)}
    fits_one = {"question": "How many?", "answer": "All of them.\n#### 9"}
    found = recipe.module("errors").solutions([fits_all, fits_one] * 30, lambda q: f"{q}\n", wrong=(1.0,))
    kinds = Counter(s.kind for s in found)
    assert kinds["final"] <= 31 and min(kinds.values()) >= 9 and len(kinds) == 4


def test_traces_without_labels_are_read_at_the_same_steps_by_both_models(recipe, quick_world):
    """As in the full profile: chats split at blank lines, `<extra_0>` for one tokenizer and none for the other."""
    errors, items_of = recipe.module("errors"), recipe.module("data").items_of
    answer = "First 2+3=5.\n\nThen 5-1=4.\n\nSo it is 4."
    rows = [{"messages": [{"role": "user", "content": "Ann?"}, {"role": "assistant", "content": answer}]}]
    (found,) = errors.solutions(rows, lambda q: f"user\n{q}\n")
    assert found.steps == tuple(answer.split("\n\n")) and found.good == ()
    scored = replace(found, scores=(0.9, 0.4, 0.8))
    marked = copy.deepcopy(quick_world.tokenizer)
    marked.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    read = []
    for tokenizer, how in zip((marked, quick_world.tokenizer), recipe.config("full").data.formats(), strict=True):
        (item,) = items_of(tokenizer, [scored], how)
        ends = np.flatnonzero(item["step_end"])
        read.append([tokenizer.decode([item["input_ids"][i]]) for i in ends])
        assert [float(item["score"][i]) for i in ends] == [0.9, 0.4, 0.8]
        assert item["step"][ends].tolist() == [1, 2, 3] and item["good"][ends].tolist() == [True, False, True]
    assert read == [["<extra_0>"] * 3, ["."] * 3]


def ends_of(run: Path, of: str, split: str) -> dict:
    """The rows at the ends of steps at layer 2."""
    acts = Activations(run / "harvest" / of / split).open(2, "train", of)
    return find_recipe("reward_features").module("data").rows_at(acts, "step_end")


@pytest.mark.slow
def test_the_run_leaves_the_table_the_verdicts_and_a_release_with_probes(run):
    table = [row for of in ("reward", "base", "untrained") for row in read_csv(run / "probes" / of / "table.csv")]
    layers = {(row["model"], int(row["layer"])) for row in table}
    assert layers == {("reward", 1), ("reward", 2), ("base", 2), ("untrained", 1)}
    assert len(table) == 4 * 7
    for row in table:
        if row["inputs"] == "shuffled scores":
            assert float(row["r2_low"]) <= 0, "the split leaks"
            assert float(row["spearman_low"]) <= 0 <= float(row["spearman_high"])
    result = read_json(run / ".steps" / "report.json")["result"]
    text = (run / "report" / "report.md").read_text()
    assert result["leaks"] == 0 and "their interval holds 0 at every layer" in text
    for claim, verdict in result.items():
        if claim not in ("report", "leaks"):
            assert f"| {claim} | {verdict} |" in text
    assert "## As a reward" in text and "AUC of its scores by kind of error" in text

    release = Release.open(run / "release")
    release.verify()
    assert set(release.ids) == {"base/layer2", "reward/layer1", "reward/layer2"}
    # each SAE knows the model that it is of
    base, reward = load_model(run / "subject/model"), load_reward_model(run / "prm/model").backbone
    for sae, own, other in (("base/layer2", base, reward), ("reward/layer1", reward, base)):
        assert release.load(sae).check(own) and release.load(sae).check(other).difference > 1e-3
    probe = load_probe(run / "release", "reward/layer2")
    assert probe.record["target"] == "score" and probe.record["sae"] == "reward/layer2"
    # the published probe, on held-out rows read from disk, gives the R² of the table
    held = ends_of(run, "reward", "test")
    said = probe(release.load("reward/layer2").encode_sparse(held["x"])).numpy()
    again = scores.r2(said, held["score"], held["problem"], probe.record["mean"]).value
    row = next(r for r in table if (r["model"], r["layer"], r["inputs"]) == ("reward", "2", "SAE"))
    assert again == pytest.approx(float(row["r2"]), abs=1e-6)
    # features that carry the score say so on the pages
    index = FeatureIndex.open(run / "release", "reward/layer2")
    carriers = [r for r in read_csv(run / "probes" / "reward" / "carriers.csv") if r["layer"] == "2"]
    assert len(carriers) == 8
    for carrier in carriers:
        (label,) = index[int(carrier["feature"])].labels
        assert label["method"] == "ridge probe" and label["score"] == pytest.approx(float(carrier["effect"]), rel=1e-5)


@pytest.mark.slow
def test_both_models_are_read_at_the_same_steps_of_the_same_problems(run):
    held = [ends_of(run, of, "test") for of in ("reward", "base")]
    for name in ("score", "problem", "step", "good"):
        assert (held[0][name] == held[1][name]).all()
    train = ends_of(run, "reward", "train")
    assert not set(train["problem"].tolist()) & set(held[0]["problem"].tolist())
    learned = read_json(run / ".steps" / "prm.json")["result"]
    assert min(train["problem"]) >= learned["next"], "the reward model learned from a problem that is probed"


@pytest.mark.slow
def test_a_finished_run_does_nothing_again(run):
    again = prepare("reward_features", overrides=SMALLEST, out=run)
    assert not any(outcome.ran for outcome in again.execute())


def test_verdicts_follow_the_numbers(recipe):
    judge = recipe.module("takeaways").judge

    def rows(sae: float, base: float, raw: float, strong: float, drop: float, agree: float):
        def row(model, layer, inputs, r2):
            about = {"strongest": strong if inputs == "SAE" else 0.1, "used": 50}
            interval = {"r2": r2, "r2_low": r2 - 0.02, "r2_high": r2 + 0.02}
            return {"model": model, "layer": layer, "inputs": inputs, **interval, **about}

        table = [
            row("reward", 2, "SAE", sae), row("reward", 2, "raw activations", raw), row("base", 2, "SAE", base),
            row("reward", 2, "random dictionary", sae / 2), row("base", 2, "position, length, step number", 0.1),
            row("base", 2, "raw activations", raw), row("reward", 2, "SAE, format tokens masked", sae),
        ]  # fmt: skip
        carriers = [{"model": "reward", "layer": 2, "drop": drop, "stable": 1.0, "on_format": 0.1}]
        short = {"spearman": agree, "spearman_low": agree - 0.01, "spearman_high": agree + 0.01, "share_of_time": 0.7}
        truncation = [{"reward": "whole model", "layer": 3},
                      *({"reward": name, "layer": 2, **short} for name in ("SAE", "raw activations"))]  # fmt: skip
        return [j.verdict for j in judge(table, truncation, carriers, None, layer=2, layers=4)]

    assert rows(0.95, 0.93, 0.7, 0.5, 0.05, 0.97) == ["holds"] * 6
    assert rows(0.6, 0.1, 0.7, 0.1, 0.0, 0.3)[:5] == ["does not hold"] * 5
    assert rows(0.6, 0.4, 0.6, 0.5, 0.0, 0.8)[:3] == ["holds in part"] * 3


def test_full_and_small_profiles_are_what_was_published_and_fit(recipe):
    full = recipe.config("full")
    assert full.layers == (17, 18, 19, 20, 21, 24, 27) and full.base_layers == (21, 24)
    assert (full.sae.width, full.data.tokens, full.prm.id) == (32768, 800_000, "Qwen/Qwen2.5-Math-PRM-7B")
    cost = recipe.module("estimates").of(full)
    assert max(e.memory for e in cost.values()) < 128e9 and sum(e.seconds for e in cost.values()) < 24 * 3600
    small = recipe.config("small")
    assert sum(e.seconds for e in recipe.module("estimates").of(small).values()) < 45 * 60
    assert split_steps("a\n\nb", full.data.base_separator) == ("a", "b")


def test_measures_are_those_of_scipy_and_scikit_learn():
    from scipy.stats import spearmanr
    from sklearn.metrics import r2_score, roc_auc_score

    rng = np.random.default_rng(0)
    score, groups = rng.normal(size=400).round(1), np.arange(400) // 4
    predicted = (score + rng.normal(size=400)).round(1)
    assert scores.r2(predicted, score, groups).value == pytest.approx(r2_score(score, predicted))
    assert scores.spearman(predicted, score, groups).value == pytest.approx(spearmanr(predicted, score)[0])
    good = score > 0.3
    assert scores.auc(predicted, good, groups).value == pytest.approx(roc_auc_score(good, predicted))
    with pytest.raises(DataError, match="good rows and bad ones"):
        scores.auc(predicted, np.ones(400), groups)
