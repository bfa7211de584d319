"""`hubsae eval` and `hubsae drift` on a release of tiny SAEs: results land in the release, its metadata and plots."""

import csv
import json

import pytest
import torch

from hubsae.cli.main import build
from hubsae.core.metadata import Metadata
from hubsae.formats.release import Release

STAGES = ("instruct_base", "ppo_step10")


@pytest.fixture
def hubsae(capsys):
    """Runs the command line in this process: (exit code or exception, stdout)."""
    from typer.testing import CliRunner

    runner = CliRunner()

    def run(*arguments):
        return runner.invoke(build(), [str(a) for a in arguments])

    return run


@pytest.fixture
def release(tmp_path, make_sae):
    made = Release.create(tmp_path / "release", name="tiny")
    for number, stage in enumerate(STAGES):
        for layer in (0, 1):
            sae = make_sae(seed=layer * 10)
            sae.W_dec.add_(0.02 * number * torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(layer)))
            sae.metadata.base_model.stage, sae.metadata.base_model.step = stage, 10 * number
            sae.metadata.hook.layer = layer
            made.add(sae, f"saes/{stage}/layer{layer}")
    return made


@pytest.fixture
def activations(tmp_path):
    folder = tmp_path / "acts"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for stage in STAGES:
        for layer in (0, 1):
            for split, rows in (("train", 300), ("val", 700)):
                torch.save(torch.randn(rows, 32, generator=generator), folder / f"{stage}_layer{layer}_{split}.pt")
    return folder


def test_eval_writes_metrics_tables_and_plots_into_the_release(hubsae, release, activations):
    done = hubsae("eval", release.path, "--activations", activations)
    assert done.exit_code == 0, done.output
    assert "N = 700 tokens" in done.output and "nmse_pooled" in done.output
    metadata = Metadata.load(release.path / "saes/ppo_step10/layer1")
    metric = next(m for m in metadata.metrics if m.name == "fvu")
    assert (metric.n_tokens, metric.scope, metric.source) == (700, "all", "hubsae") and metric.interval
    opened = Release.open(release.path)
    opened.verify()
    assert {p.name for p in opened.results} == {"reconstruction.csv", "norm_deciles.csv", "density_histogram.csv"}
    assert {p.name for p in opened.plots} == {"density_histogram.png", "norm_deciles.png"}
    assert opened.entry(stage="ppo_step10", layer=1).metrics["fvu"] == metric.value


def test_evaluating_part_of_a_release_keeps_the_rest_of_the_results(hubsae, release, activations):
    assert hubsae("eval", release.path, "-a", activations, "--layer", 0).exit_code == 0
    assert hubsae("eval", release.path, "-a", activations, "--layer", 1, "--split", "train").exit_code == 0
    with open(release.path / "results/reconstruction.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    n = {row["sae"]: row["n_tokens"] for row in rows if row["metric"] == "mse"}
    assert n == {f"saes/{stage}/layer{layer}": "700" if layer == 0 else "300" for stage in STAGES for layer in (0, 1)}


@pytest.fixture
def saved_model(tmp_path):
    """A folder with a tiny Qwen2 and its tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from hubsae.recipes.tiny_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["Ann has 12 apples and eats 3"] * 4, vocab_size=280)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, **shape)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_eval_splices_into_a_model(hubsae, release, saved_model, tmp_path):
    texts = [{"prompt": "Ann has 12", "response": " apples"}, {"prompt": "Ann eats", "response": " 3 apples"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    arguments = ("--model", saved_model, "--text", tmp_path / "texts.jsonl", "--scope", "response")
    done = hubsae("eval", release.path, *arguments, "--stage", "instruct_base", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert {row["scope"] for row in rows} == {"all", "prompt", "response"}
    metadata = Metadata.load(release.path / "saes/instruct_base/layer0")
    assert metadata.metric("delta_ce", "response") is not None
    assert (release.path / "results/splice.csv").is_file()


def test_eval_follows_the_record_and_says_so(hubsae, release, saved_model, tmp_path, make_sae):
    sae = make_sae()
    sae.metadata.hook.layer, sae.metadata.training.exclude = 1, ["position_0"]
    made = release.create(tmp_path / "own", name="own")
    made.add(sae, "one")
    (tmp_path / "texts.txt").write_text("Ann has 12 apples\nAnn eats 3 apples and 12 apples")
    arguments = ("--model", saved_model, "--text", tmp_path / "texts.txt")
    done = hubsae("eval", tmp_path / "own", *arguments)
    assert done.exit_code == 0, done.output
    assert "scope: not position_0 (what these SAEs are for, by their record)" in done.stderr
    metadata = Metadata.load(tmp_path / "own" / "one")
    own = metadata.metric("delta_ce", metadata.own_scope)
    every = hubsae("eval", tmp_path / "own", *arguments, "--exclude", "none", "--json", "--out", tmp_path / "out")
    replaced = next(r for r in json.loads(every.stdout) if r["metric"] == "delta_ce" and r["scope"] == "all")
    assert replaced["replaced"] == "all" and replaced["value"] != pytest.approx(own, rel=1e-3)


def test_the_error_by_group_of_tokens_is_one_command(hubsae, release, tmp_path, make_sae):
    from hubsae.activations import ActivationWriter

    with ActivationWriter(tmp_path / "acts", d=32, config="layers.0") as writer:
        rows = torch.arange(90)
        writer.write(torch.randn(90, 32), position=rows % 9, sample_id=rows // 9, token_id=rows % 5)
    done = hubsae("eval", release.path, "-a", tmp_path / "acts", "--layer", 0, "--config", "layers.0", "--by-group")
    assert done.exit_code == 0, done.output
    assert "position 0" in done.stdout and "content" in done.stdout


def test_eval_of_something_not_a_release_needs_a_place_to_write(hubsae, make_sae, activations, tmp_path):
    sae = make_sae()
    sae.metadata.hook.layer, sae.metadata.base_model.stage = 0, "instruct_base"
    sae.save_pretrained(tmp_path / "one")
    failed = hubsae("eval", tmp_path / "one", "-a", activations)
    assert failed.exit_code == 1 and "pass --out" in str(failed.exception)
    done = hubsae("eval", tmp_path / "one", "-a", activations, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/reconstruction.csv").is_file()


def test_activations_of_another_stage_or_layer_are_not_taken(hubsae, release, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    torch.save(torch.randn(100, 32), folder / "ppo_step99_layer0_train.pt")
    failed = hubsae("eval", release.path, "-a", folder, "--layer", 0)
    assert failed.exit_code == 1 and "is not stage" in str(failed.exception)
    named = hubsae("eval", release.path, "-a", folder, "--layer", 0, "--config", "ppo_step99.layers.0")
    assert named.exit_code == 0, named.output


@pytest.mark.parametrize(
    "arguments", [(), ("--model", "m"), ("-a", "x", "--scope", "&")], ids=["nothing", "model only", "scope"]
)
def test_wrong_usage_of_eval_exits_with_2(hubsae, arguments):
    assert hubsae("eval", "somewhere", *arguments).exit_code == 2


def test_drift_writes_into_the_release(hubsae, release, activations):
    done = hubsae("drift", release.path, "-a", activations)
    assert done.exit_code == 0, done.output
    assert "instruct_base → ppo_step10" in done.output
    opened = Release.open(release.path)
    opened.verify()
    assert {p.name for p in opened.results} >= {
        "drift_stages.csv",
        "drift_moves.csv",
        "drift_cross.csv",
        "drift_rates.csv",
    }
    assert {p.name for p in opened.plots} >= {"drift_cosines.png", "drift_nmse.png", "drift_cross.png"}


def test_drift_compares_two_chains_and_subtracts_a_control(hubsae, release, activations, tmp_path):
    arguments = ("-a", activations, "--control", release.path, "--layer", 0, "--out", tmp_path / "out", "--json")
    done = hubsae("drift", release.path, release.path, *arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["control"]["groups"] and found["less_control"]
    matched = [r for r in found["comparison"] if r["comparison"] == "matched" and r["metric"] == "fvu"]
    assert matched[0]["ratio_of_rates"] == pytest.approx(1)
    assert (tmp_path / "out/drift_comparison.csv").is_file() and (tmp_path / "out/drift_comparison.png").is_file()


def test_drift_without_activations_compares_weights(hubsae, release, tmp_path):
    done = hubsae("drift", release.path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/drift_moves.csv").is_file()


def test_drift_from_a_published_table(hubsae, tmp_path):
    done = hubsae("drift", "--from-table", "published/chains_reconstruction.csv", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "1.25 end to end and 0.74 at step 116" in done.output
    assert (tmp_path / "findings.json").is_file()
    as_json = hubsae("drift", "--from-table", "grid_layer12.csv", "--json")
    assert json.loads(as_json.stdout)["kind"] == "grid"


@pytest.mark.parametrize("arguments", [(), ("somewhere", "--from-table", "x"), ("somewhere", "--match", "best")])
def test_wrong_usage_of_drift_exits_with_2(hubsae, arguments):
    assert hubsae("drift", *arguments).exit_code == 2
