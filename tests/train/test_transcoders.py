"""Transcoders from end to end: harvested in pairs, trained, measured at the output, spliced, loaded by SAELens."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hubsae import HubSAE, SAEConfig
from hubsae.activations import ActivationDataset, PairedActivations, harvest
from hubsae.cli.main import build
from hubsae.core.errors import ConfigError
from hubsae.evals import reconstruction, splice
from hubsae.train import DeadConfig, ResampleConfig, SparsityConfig, TrainConfig, train, train_many

IN, OUT = "layers.1.mlp_in", "layers.1.mlp_out"


@pytest.fixture(scope="module")
def acts(quick_world, tmp_path_factory):
    """Input and output of an MLP of the tiny world, with a validation split."""
    texts = [{"input_ids": quick_world.tokenizer(row["text"])["input_ids"]} for row in quick_world.train_texts[:300]]
    out = tmp_path_factory.mktemp("pairs")
    harvest(quick_world.model, texts, [IN, OUT], out=out, dtype="float32", validation_fraction=0.2, progress=False)
    return out


@pytest.fixture(scope="module")
def pairs(acts):
    return tuple(
        PairedActivations(*(ActivationDataset.open(acts, name, split) for name in (IN, OUT)))
        for split in ("train", "validation")
    )


def config(**values) -> TrainConfig:
    values = {"architecture": "topk", "d_sae": 256, "lr": 2e-3, "batch_size": 256, "epochs": 4, **values}
    if values["architecture"] in ("topk", "batch_topk"):
        values.setdefault("k", 8)
    return TrainConfig(**values)


def independent(sae, x, y) -> dict[str, float]:
    """The error in a few lines, from the tensors of the SAE alone, in float64."""
    t = {name: tensor.double() for name, tensor in sae.tensors().items()}
    pre = x.double() @ t["W_enc"] + t["b_enc"]
    if sae.config.architecture == "topk":
        values, where = pre.topk(sae.config.k, dim=1)
        z = torch.zeros_like(pre).scatter(1, where, values.relu())
    elif sae.config.architecture == "jumprelu":
        z = pre * (pre > t["threshold"])
    elif sae.config.architecture == "batch_topk":
        z = pre * (pre > sae.config.threshold)
    else:
        z = pre.relu()
    out = z @ t["W_dec"] + t["b_dec"]
    if "W_skip" in t:
        out = out + x.double() @ t["W_skip"].t()
    error = (out - y.double()).square().sum()
    fvu = error / (y.double() - y.double().mean(0)).square().sum()
    return {"fvu": float(fvu), "mse": float(error / y.numel()), "l0": float((z > 0).sum() / len(z))}


ARCHITECTURES = {
    "topk": {},
    "batch_topk": {"normalize": "mean_std"},
    "jumprelu": {"sparsity": SparsityConfig(l0=1e-3, bandwidth=0.05), "loss": "sum"},
    "relu": {"sparsity": SparsityConfig(l1=1e-3), "loss": "sum", "normalize": "scalar"},
}


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trained_transcoder_predicts_and_its_numbers_are_those_of_a_few_lines(architecture, skip, pairs):
    data, val = pairs
    result = train(config(architecture=architecture, skip=skip, **ARCHITECTURES[architecture]), data, val=val)
    sae = result.sae
    assert sae.config.d_out == data.d_out and bool(sae.config.skip) == skip and not sae.config.apply_b_dec_to_input
    assert sae.metadata.hook.kind == "mlp_in" and sae.metadata.hook_out.kind == "mlp_out"
    expected = independent(sae, val.source.read_all(), val.target.read_all())
    measured = reconstruction(sae, val)["sae0"]
    for metric, value in expected.items():
        assert measured.value(metric) == pytest.approx(value, rel=1e-5), metric
        assert result.metrics[f"val_{metric}"] == pytest.approx(value, rel=1e-5), metric
    assert expected["fvu"] < 0.8  # a constant has 1
    with pytest.raises(ConfigError, match="is a transcoder"):
        reconstruction(sae, val.source)


def test_the_command_line_trains_measures_and_saelens_loads(acts, quick_world, tmp_path):
    run, job = CliRunner(), tmp_path / "job.yaml"
    data = {"path": str(acts), "config": IN, "target": OUT, "val_split": "validation"}
    settings = config(architecture="relu", skip=True, sparsity=SparsityConfig(l1=1e-3), loss="sum", epochs=2)
    given = settings.model_dump(mode="json", exclude_unset=True)
    job.write_text(yaml.safe_dump({"data": data, "out": str(tmp_path / "run"), "train": given}))
    plan = run.invoke(build(), ["train", str(job), "--dry-run", "--json"], catch_exceptions=False)
    assert json.loads(plan.stdout)[0]["parameters"] == 2 * 64 * 256 + 256 + 64 + 64 + 64 * 64
    done = run.invoke(build(), ["train", str(job), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    release = tmp_path / "release"
    done = run.invoke(
        build(), ["package", str(tmp_path / "run" / "sae"), "--out", str(release)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps(row) for row in quick_world.test_texts[:8]))
    model = ["--model", str(quick_world.model_path), "--text", str(texts)]
    done = run.invoke(build(), ["eval", str(release), "-a", str(acts), *model, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = {row["metric"]: row["value"] for row in json.loads(done.stdout) if row["scope"] == "all"}
    sae = HubSAE.from_pretrained(release)
    val = [ActivationDataset.open(acts, name, "validation").read_all() for name in (IN, OUT)]
    assert rows["fvu"] == pytest.approx(independent(sae, *val)["fvu"], rel=1e-5)
    recorded = {(m.name, m.scope): m.value for m in sae.metadata.metrics}
    assert recorded["fvu", "all"] == rows["fvu"] and recorded["ce_sae", "all"] == rows["ce_sae"]
    assert run.invoke(build(), ["card", str(release)], catch_exceptions=False).exit_code == 0
    card = (release / "README.md").read_text()
    assert "1 transcoder" in card and "predicted" in card and "blocks.1.hook_mlp_out" in card

    sae_lens = pytest.importorskip("sae_lens")
    folder = next(release.rglob("cfg.json")).parent
    lens = sae_lens.SAE.load_from_disk(folder)
    assert type(lens).__name__ == "SkipTranscoder"
    with torch.no_grad():
        theirs, mine = lens(val[0]), sae(val[0])
    assert float((theirs - mine).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_loss_with_a_transcoder_in_place_is_that_of_the_module_replaced(chunk, quick_world):
    model = quick_world.model
    sae = HubSAE.random(SAEConfig(architecture="topk", d_in=64, d_out=64, d_sae=128, k=8, skip=True))
    ids = [torch.tensor(quick_world.tokenizer(row["text"])["input_ids"]) for row in quick_world.test_texts[:6]]
    found = splice(model, None, sae, (IN, OUT), [{"input_ids": i} for i in ids], cache_chunk=chunk)
    mlp, outputs = model.model.layers[1].mlp, {"sae": sae, "zero": lambda x: torch.zeros_like(x)}
    loss, n = {}, sum(len(i) - 1 for i in ids)
    for name, stand_in in outputs.items():
        handle = mlp.register_forward_hook(lambda m, args, out, f=stand_in: f(args[0]))
        with torch.no_grad():
            logits = [model(i[None]).logits[0, :-1].double() for i in ids]
        handle.remove()
        pieces = zip(logits, ids, strict=True)
        loss[name] = sum(torch.nn.functional.cross_entropy(a, i[1:], reduction="sum").item() for a, i in pieces) / n
    assert found.value("ce_sae") == pytest.approx(loss["sae"], rel=1e-5)
    assert found.value("ce_zero") == pytest.approx(loss["zero"], rel=1e-5)
    assert found.hook == f"{IN} -> {OUT}"


def test_a_stopped_run_goes_on_to_the_bit_and_a_warm_start_begins_where_it_ended(pairs, tmp_path, monkeypatch):
    data, val = pairs
    resample = DeadConfig(tokens=2000, resample=ResampleConfig(method="anthropic", every_epochs=1, tokens=512))
    c = config(skip=True, normalize="mean_std", epochs=3, dead=resample, checkpoint_every=5)
    whole = train(c, data, val=val, quiet=True)
    assert any(line["event"] == "resample" and line["count"] for line in whole.history)
    from hubsae.train.trainer import Run

    class Stopped(Exception):
        pass

    run = Run([c], data, out=tmp_path / "run", val=val, quiet=True)
    save = run._save
    monkeypatch.setattr(run, "_save", lambda: (save(), (_ for _ in ()).throw(Stopped()))[0])
    with pytest.raises(Stopped):
        run.fit()
    again = train(c, data, out=tmp_path / "run", val=val, quiet=True)
    for name, tensor in whole.sae.tensors().items():
        assert torch.equal(tensor, again.sae.tensors()[name]), name
    warm = Run([config(skip=True, normalize="mean_std", lr=1e-9)], data, starts=[whole.sae], val=val).validate_now()
    assert warm["val_fvu"] == pytest.approx(whole.metrics["val_fvu"], rel=1e-4)
    with pytest.raises(ConfigError, match="with a skip matrix instead of an output of width 64"):
        train(config(), data, init=whole.sae)
    with pytest.raises(ConfigError, match="instead of an autoencoder's output"):
        train(config(), data.source, init=whole.sae)


def test_several_transcoders_share_a_stream_and_give_what_each_gives_alone(pairs):
    data, val = pairs
    cells = [config(name="a", epochs=1), config(name="b", epochs=1, architecture="batch_topk", skip=True)]
    together = train_many(cells, data, val=val)
    for cell, result in zip(cells, together, strict=True):
        alone = train(cell, data, val=val)
        assert result.metrics["val_fvu"] == pytest.approx(alone.metrics["val_fvu"], rel=1e-4)


@pytest.mark.parametrize(
    ("values", "match"),
    [({"architecture": "gated"}, "no gated transcoder"), ({"pre_bias": "tied"}, "lies at its output")],
)
def test_what_a_transcoder_cannot_be_is_said_before_training(values, match, pairs):
    with pytest.raises(ConfigError, match=match):
        train(config(**values), pairs[0])


def test_a_skip_matrix_of_one_hook_point_is_refused(pairs):
    with pytest.raises(ConfigError, match="skip is for transcoders"):
        train(config(skip=True), pairs[0].source)
