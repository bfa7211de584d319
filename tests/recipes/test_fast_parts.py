"""FAST's parts alone: the published claims, comparison at equal L0, groups of tokens, the judge by rule, the texts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hubsae.core.config import SAEConfig
from hubsae.core.sae import SAE
from hubsae.evals.passes import run_pass
from hubsae.index import explain, rubric
from hubsae.recipes.registry import find_recipe
from hubsae.recipes.subject import open_subject

RECIPE = find_recipe("fast")
matched, published, measure = (RECIPE.module(name) for name in ("matched", "published", "measure"))
interpret, steer, corpus = (RECIPE.module(name) for name in ("interpret", "steer", "corpus"))
estimates = RECIPE.module("estimates")

# ---- the published tables ----------------------------------------------------------------------------------------


def test_the_tables_have_480_numbers_and_the_known_win_counts():
    numbers = published.table()
    assert sum(len(values) for values in numbers.values()) == 480 and len(published.settings()) == 40
    counts = {
        key: {name: len(where) for name, where in lowest.items()} for key, lowest in published.wins(numbers).items()
    }
    assert counts["standard", "MSE"] == {"FAST": 31, "BT(F)": 9, "BT(P)": 0}
    assert counts["standard", "MSE_st"] == {"FAST": 37, "BT(F)": 3, "BT(P)": 0}
    assert counts["jumprelu", "MSE"] == {"FAST": 34, "BT(F)": 5, "BT(P)": 1}
    assert counts["jumprelu", "MSE_st"] == {"FAST": 40, "BT(F)": 0, "BT(P)": 0}
    exceptions = published.wins(numbers)["standard", "MSE"]["BT(F)"]
    assert len(exceptions) == 9 and all(setting.model.startswith("Qwen") for setting in exceptions)
    assert sum(setting.model.startswith("Qwen") for setting in published.settings()) == 23


def test_the_abstract_quotes_log2_and_one_digit_that_is_not_in_the_table():
    key = published.Setting("Qwen2.5-7B-Instruct", 18, 8)
    special = published.table()["standard", "MSE_st", key]
    assert special == {"FAST": 0.6468, "BT(P)": 5.1985, "BT(F)": 1.5093}
    real = {name: 2**value for name, value in special.items()}
    assert [round(real[name], 3) for name in ("FAST", "BT(P)", "BT(F)")] == [1.566, 36.720, 2.847]
    found = {claim.claim: claim for claim in published.claims()}
    quoted = next(claim for text, claim in found.items() if "0.6468" in text)
    assert "log2" in quoted.numbers and "1.566, 36.72 and 2.847" in quoted.numbers and "5.8% lower" in quoted.numbers
    assert quoted.supported == "no, as worded"
    digit = next(claim for text, claim in found.items() if text.startswith("BT(F) at that SAE"))
    assert "1.5093" in digit.numbers and digit.supported == "no"


def test_the_share_of_clear_features_gets_its_interval():
    rated = next(claim for claim in published.claims() if "21.1 %" in claim.claim)
    assert "FAST 27/128 [14.9%, 29.0%]" in rated.numbers and "+2.0% to +19.8%" in rated.numbers


def test_no_l0_is_published_and_the_claims_say_so():
    found = next(claim for claim in published.claims() if claim.claim == "FAST reconstructs better")
    assert found.supported == "cannot be told" and "-25.66" in found.numbers


def test_every_setting_of_the_tables_has_its_ratios():
    rows = published.per_setting()
    assert len(rows) == 80
    row = next(r for r in rows if (r["model"], r["layer"], r["SAE"]) == ("Qwen2.5-7B-Instruct", 18, "standard"))
    assert row["MSE_st FAST / BT(F)"] == pytest.approx(2 ** (0.6468 - 1.5093))


def test_a_dry_run_of_every_published_setting_has_memory_time_and_disk():
    config = RECIPE.config("full")
    rows = [estimates.of_setting(config, setting) for setting in published.settings()]
    assert len(rows) == 40 and all(row[name] > 0 for row in rows for name in ("memory GB", "hours", "disk GB"))
    by = {(row["model"], row["layer"], row["expansion"]): row for row in rows}
    small, wide = (by["Qwen2.5-0.5B-Instruct", 12, x] for x in (8, 16))
    assert wide["latents"] == 2 * small["latents"] and wide["memory GB"] > small["memory GB"]
    deep, early = (by["Qwen2.5-7B-Instruct", layer, 8] for layer in (25, 4))
    assert deep["hours"] > early["hours"]
    readme = (RECIPE.folder / "README.md").read_text()
    for row in rows:
        cells = " | ".join(f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in list(row)[1:])
        assert f"| {row['model']} | {cells} |" in readme, row


def test_the_published_profiles_are_the_published_settings_and_training():
    seen = set()
    for profile in set(RECIPE.profiles) - {"tiny", "small"}:
        config = RECIPE.config(profile)
        name = config.model.id.partition("/")[2]
        assert published.DIMENSIONS[name] == (config.model.d_model, config.model.layers, config.model.parameters)
        own = [s for s in published.settings() if s.model == name]
        assert config.data.layer in {s.layer for s in own}
        assert {int(x) for x in config.train.expansions} == {s.expansion for s in own}
        said = (RECIPE.folder / f"{profile}.yaml").read_text()
        assert f"layers {', '.join(str(layer) for layer in sorted({s.layer for s in own}))}:" in said.replace(
            "\n# ", " "
        )
        seen |= set(own)
        train = config.train
        assert (train.tokens, train.batch_size, train.lr, train.seeds[0]) == (40_960_000, 128, 7e-5, 42)
        assert (train.warmup_steps, train.cooldown_steps, train.sparsity_warmup_steps) == (16_000, 64_000, 10_000)
        assert (train.bandwidth, train.threshold, train.exclude) == (0.001, 0.001, ())
        assert train.published == {"standard": 5, "jumprelu": 0.01} and config.data.ngram == 20
        assert (config.data.max_length, config.data.block, config.data.test_chats) == (8192, 2048, 5000)
    assert seen == set(published.settings())


def test_training_configs_are_the_published_ones():
    config = RECIPE.config("full")
    found = {c.name: c for c in RECIPE.module("cells").train_configs(config, "fast", {"activations": {}})}
    assert len(found) == 18
    standard, jump = found["standard-x8-l5-s42"], found["jumprelu-x8-l0.01-s42"]
    assert standard.steps(config.train.tokens)[1] == 320_000
    assert (standard.loss, standard.pre_bias, standard.project, standard.unit_norm) == ("sum", "none", False, True)
    assert (standard.init.encoder, standard.init.decoder, standard.init.bias) == (
        "kaiming", "kaiming", "geometric_median",
    )  # fmt: skip
    assert standard.lr * standard.schedule.floor == pytest.approx(7e-6) and standard.betas == (0.9, 0.999)
    assert (jump.sparsity.l0, jump.sparsity.bandwidth, jump.init.threshold) == (0.01, 0.001, 0.001)
    assert jump.record["training"]["method"] == "FAST" and "8,192" in jump.record["activations"]["mode"]


def test_gradients_are_taken_on_the_rows_named_where_training_leaves_some_out():
    """The small profile trains without position 0; which rows a ratio is of is the measure's own business."""
    config = RECIPE.config("tiny")
    train = config.train.model_copy(update={"exclude": ("position_0",), "batch_size": 8})
    config = config.model_copy(update={"train": train})
    cells = RECIPE.module("cells").train_configs(config, "fast", {"activations": {}})
    generator = torch.Generator().manual_seed(0)
    kept = {"x": torch.randn(64, 16, generator=generator), "position": torch.arange(64) % 4}
    begun = measure.starts(cells, kept["x"])
    for one in cells:
        if one.name in begun:
            found = measure.gradient_ratios(one, begun[one.name], kept, 4)
            assert [(row["tokens"], row["batches"]) for row in found] == [("all tokens", 4), ("without position 0", 4)]
    assert len(begun) == 3


# ---- equal L0 ----------------------------------------------------------------------------------------------------


def laws(factor: float, slope: float = 0.5, shift: float = 1.0, seeds=(0, 1)) -> list[dict]:
    """SAEs whose errors follow a power law of L0, FAST's `factor` times that of the others, its L0 `shift` times."""
    rows = []
    for method, times, moved in (("fast", factor, shift), ("bt-f", 1.0, 1.0), ("bt-p", 1.0, 1.0)):
        for seed in seeds:
            for number, l0 in ((1.0, 80.0), (2.0, 40.0), (3.0, 20.0)):
                mse = times * (1 + 0.01 * seed) * (l0 * moved) ** -slope
                row = {"method": method, "kind": "standard", "expansion": 4.0, "number": number, "seed": seed}
                rows.append(row | {"l0": l0 * moved, "id": f"{method}/standard-x4-l{number:g}-s{seed}"}
                            | {f"mse_{short}": mse for short in measure.TOKENS})  # fmt: skip
    return rows


def test_an_advantage_that_is_only_sparsity_is_gone_at_equal_l0():
    # twice the L0 at every coefficient, the same law: 2 ** -0.5 as published, nothing at equal L0
    row = matched.advantage(laws(1.0, shift=2.0), {"standard": 2.0}, 3)[0]
    assert row["error ratio, same coefficient"] == pytest.approx(2**-0.5)
    assert row["error ratio, equal L0"] == pytest.approx(1.0, abs=1e-9)
    assert row["L0 there"] == "80 / 40" and row["L0"] == "40 56.6 80"


def test_a_true_advantage_comes_out_at_equal_l0_with_its_interval_over_seeds():
    row = matched.advantage(laws(0.5, shift=2.0), {"standard": 2.0}, 3)[0]
    assert row["error ratio, equal L0"] == pytest.approx(0.5)
    assert row["low"] == pytest.approx(0.5) and row["holds"] == "yes" and row["seeds lower"] == "2 of 2"
    assert len(matched.advantage(laws(0.5), {}, 3)) == 8


def test_sweeps_that_do_not_meet_are_not_compared():
    row = matched.advantage(laws(0.5, shift=10.0), {"standard": 2.0}, 3)[0]
    assert row["error ratio, equal L0"] is None and row["holds"] == "no common L0"
    assert row["error ratio, same coefficient"] == pytest.approx(0.5 * 10**-0.5)


def test_topk_is_compared_where_it_stands():
    rows = [row | {"kind": "topk"} for row in laws(0.25, shift=1.0)]
    row = matched.advantage(rows, {}, 3)[0]
    assert row["error ratio, equal L0"] == pytest.approx(0.25) and row["L0"] == "1 2 3"


def test_a_cell_that_one_method_lacks_is_compared_with_nothing():
    rows = laws(0.5)
    missing = [r for r in rows if (r["method"], r["number"], r["seed"]) != ("bt-p", 2.0, 1)]
    kept = matched.whole(missing)
    assert len(kept) == len(rows) - 3 and matched.whole(rows) == rows
    broken = [r | ({"l0": 0.0} if r is rows[0] else {}) for r in rows]
    assert len(matched.whole(broken)) == len(rows) - 3


def test_the_representatives_of_the_methods_have_about_the_same_l0():
    rows = laws(0.5, shift=2.0)
    found = matched.representative(rows, "standard", 4.0, 3)
    l0 = {row["id"]: row["l0"] for row in rows}
    assert set(found) == {"fast", "bt-f", "bt-p"}
    assert max(l0[i] for i in found.values()) / min(l0[i] for i in found.values()) <= 2
    assert all(i.endswith("s0") for i in found.values())


# ---- tokens, judge, features -------------------------------------------------------------------------------------


def test_special_tokens_are_named_by_their_text(quick_world):
    tokenizer = quick_world.tokenizer
    ids = measure.special_ids(tokenizer, ["<|im_start|>", "apples and"])
    assert ids["<|im_start|>"] == [tokenizer.convert_tokens_to_ids("<|im_start|>")] and len(ids["apples and"]) > 1
    text = tokenizer("<|im_start|>user\napples and apples, apples and", add_special_tokens=False)["input_ids"]
    labels = {"token_id": np.array(text), "sample_id": np.zeros(len(text), int)}
    places = measure.places_of(labels, ids)
    assert np.flatnonzero(places["<|im_start|>"]).tolist() == [0]
    assert places["apples and"].sum() >= len(ids["apples and"])
    assert tokenizer.decode(labels["token_id"][places["apples and"]]).strip().startswith("apples and")
    # a name that is cut by the end of a chat is none
    labels["sample_id"][-1] = 1
    assert not measure.places_of(labels, ids)["apples and"][-1]


def contexts(tokens: list[str]) -> list[dict]:
    return [{"tokens": ["x", token, "y"], "values": [0.1, 2.0, 0.0]} for token in tokens]


def test_the_judge_without_a_model_goes_by_the_strongest_token():
    judge = interpret.RuleJudge()
    assert rubric.rate(judge, contexts([" cat"] * 5)) == (5, "cat")
    assert rubric.rate(judge, contexts([" cat"] * 4 + ["it's"]))[0] == 4
    assert rubric.rate(judge, contexts([" cat", " cat", "a", "b", '"']))[0] == 3
    assert rubric.rate(judge, contexts(["a", "b", "c", "d", "e\n"]))[0] == 1
    assert explain.label_of(judge, contexts([" cat"] * 3)) == "cat"
    said = judge(
        [
            {"role": "system", "content": explain.DETECT},
            {"role": "user", "content": "Property: cat\n\n1. a cat\n2. dog"},
        ]
    )
    assert json.loads(said) == [1, 0]
    text = "Property: cat\n\n1. a «cat» sat\n2. the cat «sat»"
    assert json.loads(judge([{"role": "system", "content": explain.FUZZ}, {"role": "user", "content": text}])) == [1, 0]


def test_the_features_of_special_tokens_are_those_of_the_largest_mean_maximum():
    generator = torch.Generator().manual_seed(0)
    sae = SAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=32, k=4), seed=0)
    x = torch.randn(9000, 8, generator=generator)
    rng = np.random.default_rng(0)
    token, sample = rng.integers(0, 6, 9000), np.sort(rng.integers(0, 300, 9000))
    places = {"two": token == 2, "five": token == 5}
    found = steer.strongest(sae, {"x": x, "sample_id": sample}, places)
    z = sae.encode(x).detach().numpy()
    for row, wanted in zip(found, (2, 5), strict=True):
        maxima = [z[(token == wanted) & (sample == s)].max(0) for s in set(sample[token == wanted].tolist())]
        mean = np.mean(maxima, axis=0)
        assert row["feature"] == int(mean.argmax()) and row["mean_maximum"] == pytest.approx(mean.max(), rel=1e-6)


def test_maxima_of_parts_of_the_chats_saved_and_merged_are_those_of_all(tmp_path):
    sae = SAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=32, k=4), seed=0)
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    sample, special = np.arange(4000) // 40, np.arange(4000) % 3 == 0

    def maxima(rows: slice):
        found = steer.MaximaByToken("sae", 32, ["special"])
        data = {"x": x[rows], "sample_id": sample[rows]}
        return found, run_pass(data, {"sae": sae}, [found], columns={"special": special[rows]})[0]

    whole = maxima(slice(None))[1]
    (first, _), (second, _) = maxima(slice(0, 1600)), maxima(slice(1600, None))
    again = steer.MaximaByToken("sae", 32, ["special"])
    again.load(first.save(tmp_path / "part.safetensors"))
    again.merge(second)
    assert whole.abs().max() > 0
    torch.testing.assert_close(again.result(), whole)


def test_a_chat_models_score_of_an_answer_is_read_and_asked_for_once():
    asked = []

    def chat(messages):
        asked.append(messages)
        return "[[7]]" if "good" in messages[1]["content"] else "well"

    quality = steer.Quality(chat)
    assert [quality(None, "why", text) for text in ("good", "good", "bad")] == [0.7, 0.7, 0.0] and len(asked) == 2


# ---- texts -------------------------------------------------------------------------------------------------------


def test_texts_come_from_several_datasets_in_turn_without_repeats_and_in_every_layout(quick_world, tmp_path):
    long = " ".join(f"word{i}" for i in range(30))
    answer = {"role": "assistant", "content": "Yes."}
    first = [{"messages": [{"role": "user", "content": f"{n} {long[n:]}"}, answer]} for n in range(3)]
    second = [
        {"conversations": [{"from": "human", "value": f"say {n}"}, {"from": "gpt", "value": "ok"}]} for n in range(4)
    ]
    third = [{"messages": json.dumps([{"role": "user", "content": f"as text {n}"}, answer])} for n in range(3)]
    third += [{"messages": json.dumps([{"role": "user", "content": "no answer"}])}]
    for name, rows in (("a", first), ("b", second), ("c", third), ("t", [{"text": "plain"}, {"text": ""}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [{"id": str(tmp_path / f"{name}.jsonl")} for name in "abc"]
    config = RECIPE.module().Config(
        model={"id": str(quick_world.model_path), "name": "a model"},
        data={"layer": 1, "chats": sources, "texts": {"id": str(tmp_path / "t.jsonl")}, "test_chats": 2,
              "dedup_megabytes": 1},
    )  # fmt: skip
    found = corpus.gather(tmp_path, config)
    assert (found["kept"], found["skipped"], found["unusable"]) == (8, 2, 1)
    assert (found["train"], found["test"], found["texts"], found["label"]) == (6, 2, 1, "a model")
    subject = open_subject(tmp_path, found)
    said = [row["messages"][0]["content"] for row in [*subject.test, *subject.train]]
    assert said[:3] == [f"0 {long}", "say 0", "as text 0"] and said[3:] == [
        "say 1",
        "as text 1",
        "say 2",
        "as text 2",
        "say 3",
    ]


def test_the_three_methods_read_the_same_chats_alone_and_packed_and_plain_texts(quick_world, tmp_path):
    config = RECIPE.config("tiny", overrides=["model.size=quick", "data.most_chats=60", "data.test_chats=20",
                                              "data.most_texts=40", "data.max_length=48", "data.block=64"])  # fmt: skip
    found = corpus.gather(tmp_path, config)
    subject = open_subject(tmp_path, found)
    tokenizer, model = subject.tokenizer(), subject.load()
    ids = {}
    for method in ("fast", "bt-f", "bt-p"):
        stream, texts = corpus.streams(subject, tmp_path, config, method, model, "layers.1")
        parts = [batch.labels for batch in stream.batches(texts())]
        labels = {n: np.concatenate([p[n] for p in parts]) for n in ("token_id", "sample_id", "position")}
        ids[method] = labels["token_id"][np.lexsort([labels["position"], labels["sample_id"]])].tolist()
    rendered = [
        tokenizer(corpus.rendered(tokenizer, row["messages"]), add_special_tokens=False)["input_ids"]
        for row in subject.train
    ]
    assert ids["fast"] == [i for chat in rendered for i in chat[:48]]
    assert ids["bt-f"] == [i for chat in rendered for i in chat]
    plain = [json.loads(line)["text"] for line in (tmp_path / corpus.TEXTS).read_text().splitlines()]
    assert ids["bt-p"] == [i for text in plain for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
