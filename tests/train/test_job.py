"""`hubsae train`: the configs that come with it train on tokens of a small model, and dry-run with an estimate."""

import json
import subprocess
import sys

import pytest
import torch

from hubsae.core.errors import ConfigError, FormatError, HubSAEError
from hubsae.hub.sae import HubSAE
from hubsae.train.config import TrainConfig
from hubsae.train.estimate import estimate
from hubsae.train.job import CONFIGS, load_job


@pytest.fixture(scope="module")
def activations(tmp_path_factory) -> dict[str, str]:
    """Residuals of a small random Qwen2 model, as .pt piles."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        out = model(torch.randint(0, 97, (80, 40)), output_hidden_states=True).hidden_states[1]
    rows = out.reshape(-1, 32)
    folder = tmp_path_factory.mktemp("acts")
    torch.save(rows[:-320].half(), folder / "train.pt")
    torch.save(rows[-320:].half(), folder / "val.pt")
    return {"data.path": str(folder / "train.pt"), "data.val": str(folder / "val.pt")}


def small(activations, out, **more):
    shared = {**activations, "data.config": None, "data.val_split": None, "out": str(out), "device": "cpu"}
    return words({**shared, "train.init.rows": 2048, **more})


def words(pairs: dict) -> list[str]:
    """Overrides as they are typed."""
    return [f"{key}={'null' if value is None else value}" for key, value in pairs.items()]


def test_rl_chain_settings_train_on_a_small_model(activations, tmp_path):
    overrides = small(activations, tmp_path, batch_size=128, k=4, lr=1e-3, **{"train.aux.k": 16})
    job = load_job("rl-chain-k64", overrides)
    (result,) = job.run(quiet=True)
    sae = HubSAE.from_pretrained(tmp_path / "sae")
    assert result.steps == 20 * (2880 // 128) and sae.config.topk_relu is False and sae.d_sae == 256
    assert [line["step"] for line in result.history if line["event"] == "resample"] == [220]
    assert result.metrics["val_fvu"] < 0.55 and sae.metadata.hook.module_path == "model.layers.18"
    # the next stage starts from it
    again = load_job(
        "rl-chain-k64", [*overrides, *words({"init": tmp_path / "sae", "out": tmp_path / "next", "epochs": 1})]
    )
    assert again.run(quiet=True)[0].metrics["val_fvu"] < 1.2 * result.metrics["val_fvu"]


def test_grid_settings_train_every_cell_on_one_stream(activations, tmp_path):
    overrides = small(activations, tmp_path, batch_size=128, lr=1e-3, epochs=2)
    overrides += words({"grid.k": [2, 4], "grid.expansion": [2, 4]})
    results = load_job("grid-layer12", overrides).run(quiet=True)
    assert len(results) == 8 and all(r.error is None for r in results)
    assert {r.sae.config.architecture for r in results if r.sae} == {"topk", "batch_topk"}
    assert (tmp_path / "sae" / "architecture=topk,expansion=4,k=2" / "metadata.json").exists()


def test_the_qwen3_config_dry_runs_without_the_data(capsys):
    from hubsae.cli.train import command

    command("qwen3-8b-layer35", [], dry_run=True, json_=True)
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 536_944_640 and plan["steps"] == 70_000 and plan["tokens"] == 2_293_760_000
    assert plan["state_bytes"] == 12 * plan["parameters"] and plan["gradient_bytes"] == 0
    assert 8e9 < plan["total_bytes"] < 25e9 and 0.5 < plan["h200_seconds"] / 3600 < 3


def test_every_config_is_valid_and_predicts_memory():
    for path in CONFIGS.glob("*.yaml"):
        job = load_job(str(path))
        for cell in job.cells():
            assert cell.width(job.data.d_in or 0) > 0
    plain = estimate(TrainConfig(d_sae=512, k=8, batch_size=64), 64, 6400, torch.device("cpu"))
    clipped = estimate(TrainConfig(d_sae=512, k=8, batch_size=64, clip=1.0), 64, 6400, torch.device("cpu"))
    assert clipped.total_bytes - plain.total_bytes == 8 * 512 * 64


def test_mistakes_in_a_file_name_the_key_and_the_nearest_one(tmp_path):
    with pytest.raises(ConfigError, match=r"lrr: no such key \(nearest: lr"):
        load_job("rl-chain-k64", ["train.lrr=1"]).cells()
    with pytest.raises(ConfigError, match="there is no config rl-chain"):
        load_job("rl-chain")
    with pytest.raises(ConfigError, match="dta: no such key"):
        load_job("rl-chain-k64", ["dta=1"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [")
    with pytest.raises(FormatError, match="expected YAML"):
        load_job(str(broken))


def test_command_line_prints_metrics_and_fails_with_one_message(activations, tmp_path):
    more = {"train.aux.k": 16, "train.dead.resample": None}
    given = small(activations, tmp_path / "run", batch_size=128, k=4, epochs=1, **more)
    base = [sys.executable, "-m", "hubsae.cli.main", "train", "rl-chain-k64"]
    done = subprocess.run([*base, *given, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["steps"] == 22 and row["error"] is None and row["val_mse"] > 0
    wrong = subprocess.run([*base, *given, "k=1000"], capture_output=True, text=True)
    assert (
        wrong.returncode == 1 and "k=1000 is larger than d_sae=256" in wrong.stderr and "Traceback" not in wrong.stderr
    )


def test_a_value_beside_a_grid_over_it_is_refused():
    with pytest.raises(ConfigError, match=r"k=999 is set beside a grid over k; say grid.k=\[999\]"):
        load_job("grid-layer12", ["k=999"])
    assert {cell.k for cell in load_job("grid-layer12", ["grid.k=[999]"]).cells()} == {999}


def test_a_dry_run_counts_the_steps_of_the_run_and_refuses_what_it_refuses(activations, tmp_path):
    given = small(activations, tmp_path / "run", batch_size=100, k=4, epochs=1.9, **{"train.aux.k": 16})
    (plan,) = load_job("rl-chain-k64", given).plan()
    (result,) = load_job("rl-chain-k64", given).run(quiet=True)
    assert plan.steps == result.steps == round(1.9 * (2880 // 100))
    for wrong in ("batch_size=5000", "k=1000", "exclude=[position_0]", "lr=0.5"):
        job = load_job("rl-chain-k64", [*given, wrong])
        with pytest.raises(HubSAEError) as planned:
            job.plan()
        with pytest.raises(HubSAEError) as run:
            job.run(quiet=True)
        assert str(planned.value) == str(run.value)


def harvested(folder, layer):
    """Activations as a harvest leaves them."""
    from hubsae.activations import ActivationWriter

    where = {"layer": layer, "kind": "resid_post", "hook_point": f"model.layers.{layer}", "model": "me/model"}
    about = {"revision": "abc", "mode": "text", "dataset": "me/texts", "max_length": 64, "stage": "step30", **where}
    with ActivationWriter(folder, d=8, config=f"layers.{layer}", source=about) as writer:
        g = torch.Generator().manual_seed(layer)
        writer.write(torch.randn(512, 8, generator=g), sample_id=0, position=list(range(512)))
    return str(folder)


def test_the_record_is_read_from_the_activations_and_a_contradiction_is_an_error(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(f"data: {{path: {harvested(tmp_path / 'acts', 8)}}}\ntrain: {{d_sae: 16, k: 2, batch_size: 64}}")
    (result,) = load_job(str(path)).run(quiet=True)
    record = result.sae.metadata
    assert (record.base_model.id, record.base_model.revision, record.base_model.stage) == ("me/model", "abc", "step30")
    assert (record.hook.layer, record.hook.module_path, record.hook.context_size) == (8, "model.layers.8", 64)
    acts = record.activations
    assert (acts.id, acts.config, acts.text_dataset, acts.tokens) == ("acts", "layers.8", "me/texts", 512)
    for record in ("record.hook.layer=22", "record.hook.module_path=model.layers.22", "record.base_model.id=me/other"):
        job = load_job(str(path), [record])
        for call in (job.plan, job.run):
            with pytest.raises(ConfigError, match=r"record\.(hook|base_model) says"):
                call()
