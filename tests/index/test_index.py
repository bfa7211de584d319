"""Indexes of tiny models: the files say what the codes are, a killed run goes on, the terminal shows it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from hubsae.activations import ActivationDataset, ActivationWriter
from hubsae.core.config import SAEConfig
from hubsae.core.errors import DataError, HookError, NotFoundError
from hubsae.formats.release import Release
from hubsae.hub.sae import HubSAE
from hubsae.index.build import PARTS, Settings, index_activations, index_texts, merge_parts
from hubsae.index.features import FeatureIndex
from hubsae.index.lens import cofiring, decoder_neighbours, final_norm, logit_lens

D, D_SAE, N = 32, 64, 9000
TEXTS = [
    {"prompt": f"Ann has {i} apples", "response": f" and eats {i % 7} pears. Bob <b>has</b> none."} for i in range(90)
]


@pytest.fixture(scope="module")
def world():
    """A tiny model with its tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from hubsae.recipes.tiny_tokenizer import train_tokenizer

    tokenizer = train_tokenizer([t["prompt"] + t["response"] for t in TEXTS], vocab_size=300)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=D, intermediate_size=64, **shape)
    return Qwen2ForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def sae():
    made = HubSAE.random(SAEConfig(architecture="topk", d_in=D, d_sae=D_SAE, k=4), seed=1)
    made.metadata.hook.layer, made.metadata.base_model.id = 1, "someone/tiny"
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acts")
    rows = torch.arange(N)
    with ActivationWriter(folder, d=D, config="layers.1", columns={"is_special": "bool"}) as writer:
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
        writer.write(x, position=rows % 45, sample_id=rows // 45, token_id=rows % 50, is_special=rows % 45 == 0)
    return ActivationDataset.open(folder, "layers.1")


def read(path):
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def test_the_files_say_what_the_codes_are(sae, data, tmp_path):
    (folder,) = index_activations({"saes/one": sae}, data, tmp_path, Settings(top=3, random=4, window=2))
    assert folder.name == "saes--one" and not (folder / PARTS).exists()
    dense = sae.encode(data.read_all(dtype=torch.float32)).numpy()
    metrics, prompts = read(folder / "feature_metrics.parquet"), read(folder / "feature_prompts.parquet")
    assert [row["feature"] for row in metrics] == list(range(D_SAE))
    for f in range(0, D_SAE, 7):
        z = dense[:, f]
        fires = np.flatnonzero(z)
        row = metrics[f]
        assert (row["count"], row["max"]) == (len(fires), z.max())
        assert row["density"] == len(fires) / N and row["mean"] == pytest.approx(z[fires].mean(), rel=1e-5)
        assert row["position_0_share"] == pytest.approx((fires % 45 == 0).mean())
        assert row["special_share"] == row["position_0_share"] and sum(row["histogram"]) == len(fires)
        strongest = sorted(fires, key=lambda i: (-z[i], i))
        tokens = [r for r in prompts if r["feature"] == f and r["kind"] == "token"]
        assert [r["token_index"] for r in tokens] == strongest[:3] and [r["rank"] for r in tokens] == [0, 1, 2]
        for r in tokens:
            i = r["token_index"]
            window = [j for j in range(i - 2, i + 3) if 0 <= j < N and j // 45 == i // 45]
            assert r["token_ids"] == [j % 50 for j in window] and window[r["center"]] == i
            assert r["values"] == pytest.approx([z[j] for j in window]) and r["value"] == z[i]
            assert (r["sample_id"], r["position"], r["token_id"]) == (i // 45, i % 45, i % 50)
        prompts_of = [r["sample_id"] for r in prompts if r["feature"] == f and r["kind"] == "prompt"]
        assert prompts_of == list(dict.fromkeys(i // 45 for i in strongest))[:3]
        drawn = [r for r in prompts if r["feature"] == f and r["kind"] == "sample"]
        assert len(drawn) == min(4, len(fires))
        for r in drawn:
            assert r["quantile"] == pytest.approx((z[fires] < r["value"]).mean(), abs=0.35)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["n_tokens"] == N and summary["n_active"] == int((dense != 0).any(0).sum())
    assert set(summary["files"]) | {"summary.json"} == {p.name for p in folder.iterdir()}


def test_the_tables_of_the_pages_hold_row_groups_of_256_features(data, tmp_path):
    import pyarrow.parquet as pq

    wide = HubSAE.random(SAEConfig(architecture="topk", d_in=D, d_sae=600, k=4))
    (folder,) = index_activations({"a": wide}, data, tmp_path, Settings(top=2, random=2))
    file = pq.ParquetFile(folder / "features.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [256, 256, 88]
    assert file.metadata.row_group(0).column(0).compression == "SNAPPY"
    rows = file.read().to_pylist()
    assert [row["feature"] for row in rows] == list(range(600))
    for row in rows:
        strong = {e["position"] for e in row["examples"] if e["kind"] == "token"}
        assert len(strong) == min(2, row["count"]) or row["count"] > 2
        assert len(row["neighbours"]) == 10
    assert pq.ParquetFile(folder / "summary.parquet").num_row_groups == 1


def test_the_same_rows_are_the_same_bytes_in_one_part_or_many(sae, data, tmp_path, monkeypatch):
    from hubsae.activations.ranks import Ranks
    from hubsae.evals import passes

    (one,) = index_activations({"a": sae}, data, tmp_path / "one")
    monkeypatch.setattr(passes, "PART_BLOCKS", 1)
    assert index_activations({"a": sae}, data, tmp_path / "two", ranks=Ranks(1, 2)) == []
    (two,) = index_activations({"a": sae}, data, tmp_path / "two", ranks=Ranks(0, 2))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


KILLED = """
import os, random, shutil, signal, sys, time, torch
import hubsae.index.build as build
from hubsae.activations import ActivationDataset
from hubsae.evals import passes
from hubsae.hub.sae import HubSAE
torch.set_num_threads(1)
passes.PART_BLOCKS = 1
sae = HubSAE.from_pretrained(sys.argv[2])
data = ActivationDataset.open(sys.argv[1], "layers.1")
def work():
    build.index_activations({"a": sae}, data, sys.argv[3], show=False)
    os._exit(0)
begin = time.monotonic()
os.waitpid(os.fork() or work(), 0)
whole = time.monotonic() - begin
shutil.rmtree(sys.argv[3])
drawn, killed = random.Random(0), 0
while killed < int(sys.argv[4]):  # each run goes on where the last one was killed
    child = os.fork() or work()
    time.sleep(drawn.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == signal.SIGKILL:
        killed += 1
    else:  # it was done before
        shutil.rmtree(sys.argv[3])
print("killed", killed, flush=True)
work()
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bytes(kills, sae, data, tmp_path):
    sae.save_pretrained(tmp_path / "sae")
    (whole,) = index_activations({"a": sae}, data, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(data.path), str(tmp_path / "sae"), str(tmp_path / "out"), str(kills)]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == f"killed {kills}\n"
    assert {p.name for p in whole.iterdir()} == {p.name for p in (tmp_path / "out" / "a").iterdir()}
    for file in whole.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / "a" / file.name).read_bytes(), file.name


def test_parts_of_different_saes_are_not_merged(sae, data, tmp_path, monkeypatch):
    from hubsae.activations.ranks import Ranks
    from hubsae.evals import passes

    monkeypatch.setattr(passes, "PART_BLOCKS", 1)
    other = HubSAE.random(sae.config, seed=2)
    for number, one in enumerate((sae, other)):
        index_activations({"a": one}, data, tmp_path / f"{number}", ranks=Ranks(number, 2), force=True)
    with pytest.raises(DataError, match="do not belong together: sae is"):
        merge_parts([tmp_path / "0", tmp_path / "1"])


def test_texts_and_a_model_give_the_index_of_their_activations(world, sae, tmp_path):
    model, tokenizer = world
    from hubsae.activations.capture import capture, padded
    from hubsae.core.hooks import HookPoint
    from hubsae.evals.texts import encode_texts

    (folder,) = index_texts({"a": sae}, model, tokenizer, TEXTS, tmp_path, Settings(window=3))
    encoded, _ = encode_texts(TEXTS, tokenizer)
    vectors = [capture(model, *padded([t.ids.tolist()]), [HookPoint(1)])["layers.1"] for t in encoded]
    dense = torch.cat([sae.encode(v) for v in vectors]).numpy()
    index = FeatureIndex.open(tmp_path / "a")
    assert index.summary["n_tokens"] == len(dense) and folder == tmp_path / "a"
    ids = np.concatenate([t.ids.numpy() for t in encoded])
    for f in np.argsort(-(dense != 0).sum(0))[:8].tolist():
        feature = index[f]
        assert feature.count == int((dense[:, f] != 0).sum())
        assert feature.examples[0].value == pytest.approx(dense[:, f].max(), rel=1e-5)
        for example in feature.examples:
            assert tokenizer.decode([ids[example.token_index]]) == example.tokens[example.center]
    assert "".join(index[f].examples[0].tokens) in "".join(t["prompt"] + t["response"] for t in TEXTS)


def test_logits_are_the_decoder_row_through_norm_and_unembedding(world, sae):
    model, _ = world
    lens = logit_lens(sae, model, 5)
    assert final_norm(model) is model.model.norm
    for f in (0, 9, 63):
        with torch.no_grad():
            logits = model.lm_head(model.model.norm(sae.W_dec[f] * 100))
        assert lens.top_ids[f].tolist() == logits.topk(5).indices.tolist()
        assert lens.bottom[f] == pytest.approx(logits.topk(5, largest=False).values.numpy(), rel=1e-4)


def test_a_transcoder_is_indexed_by_its_inputs_and_speaks_by_what_it_writes(world, data, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    _, tokenizer = world
    wide = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=32)).eval()  # fmt: skip
    made = HubSAE.random(SAEConfig(architecture="topk", d_in=D, d_out=48, d_sae=D_SAE, k=4, apply_b_dec_to_input=False))
    (folder,) = index_activations({"a": made}, data, tmp_path, Settings(top=2, logits=3), model=wide, force=True)
    index = FeatureIndex.open(folder)
    dense = made.encode(data.read_all(dtype=torch.float32))
    f = int(dense.ne(0).sum(0).argmax())
    assert index[f].count == int(dense[:, f].ne(0).sum()) and index[f].examples[0].value == dense[:, f].max()
    with torch.no_grad():
        logits = wide.lm_head(wide.model.norm(made.W_dec[f] * 100))
    lens = [row for row in read(folder / "feature_logits.parquet") if row["feature"] == f]
    assert [row["token_id"] for row in lens if row["side"] == "top"] == logits.topk(3).indices.tolist()
    unit = torch.nn.functional.normalize(made.W_dec, dim=1)
    others = (unit @ unit[f]).scatter(0, torch.tensor([f]), -2).topk(3).indices.tolist()
    assert [other for other, _ in index[f].neighbours[:3]] == others


def test_neighbours_are_those_of_a_direct_computation(sae):
    near = decoder_neighbours(sae, 3)
    unit = torch.nn.functional.normalize(sae.W_dec, dim=1)
    cosines = unit @ unit.t() - 3 * torch.eye(D_SAE)
    assert near.ids.tolist() == cosines.topk(3).indices.tolist()
    codes = sae.encode_sparse(torch.randn(500, D, generator=torch.Generator().manual_seed(3)))
    tokens = np.repeat(np.arange(500), 4)
    found = cofiring(tokens, codes.indices.reshape(-1).numpy(), D_SAE, 4)
    fires = codes.dense().ne(0).double()
    together = fires.t() @ fires / fires.sum(0).outer(fires.sum(0)).sqrt() - 3 * torch.eye(D_SAE)
    for f in range(D_SAE):
        if fires[:, f].sum() >= 5:
            others = found.values[f][found.ids[f] >= 0]
            common = together[f][fires.sum(0) >= 5]
            assert others == pytest.approx(common[common > 0].topk(len(others)).values.numpy(), rel=1e-5)


def test_an_sae_of_another_layer_is_refused_unless_asked_for(data, world, tmp_path):
    elsewhere = HubSAE.random(SAEConfig(architecture="topk", d_in=D, d_sae=D_SAE, k=4))
    elsewhere.metadata.hook.layer = 7
    with pytest.raises(HookError):
        index_texts({"a": elsewhere}, *world, TEXTS, tmp_path)


@pytest.fixture(scope="module")
def release(world, sae, tmp_path_factory):
    """A release with its index, and the saved model."""
    root = tmp_path_factory.mktemp("release")
    model, tokenizer = world
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    made = Release.create(root / "release", name="tiny")
    own = HubSAE(sae.config, sae.tensors())
    own.metadata.hook.layer = 1
    made.add(own, "saes/one")
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    return root


def hubsae(*arguments):
    from typer.testing import CliRunner

    from hubsae.cli.main import build

    return CliRunner().invoke(build(), [str(a) for a in arguments])


def test_the_verbs_index_a_release_and_show_its_features(release):
    done = hubsae(
        "index", release / "release", "--model", release / "model", "--texts", release / "texts.jsonl", "--top", 4
    )
    assert done.exit_code == 0, done.output
    folder = release / "release" / "reverse-index" / "saes--one"
    assert {"feature_logits.parquet", "feature_neighbours.parquet", "report.md"} <= {p.name for p in folder.iterdir()}
    index = FeatureIndex.open(release / "release")
    best = max(range(D_SAE), key=lambda f: index.metrics["count"][f].as_py())
    shown = hubsae("features", release / "release", "saes/one", best)
    assert shown.exit_code == 0, shown.output
    assert f"feature {best}" in shown.output and "promotes" in shown.output and "nearest decoder rows" in shown.output
    as_json = json.loads(hubsae("features", release / "release", best, "--json").stdout)
    assert as_json["count"] == index[best].count and len(as_json["examples"]) >= 4
    assert hubsae("features", release / "release").exit_code == 0
    found = json.loads(hubsae("features", release / "release", "--search", "pears", "--json").stdout)
    assert found and all(isinstance(row["feature"], int) for row in found)
    prompt = ("--prompt", "Ann has 3 apples", "--model", release / "model", "--json")
    rows = json.loads(hubsae("features", release / "release", *prompt).stdout)
    assert "".join(row["token"] for row in rows) == "Ann has 3 apples" and rows[1]["features"]
    Release.open(release / "release").verify()


def test_nothing_in_a_context_is_markup(release):
    index = FeatureIndex.open(release / "release")
    feature = next(f for f in index if any("<" in "".join(e.tokens) for e in f.examples))
    assert "<b>has" not in feature._repr_html_().replace("<b>feature", "") and "&lt;" in feature._repr_html_()
    assert "<b>" not in (index.folder / "report.md").read_text()


def test_a_release_without_an_index_says_how_to_make_one(tmp_path):
    with pytest.raises(NotFoundError, match="hubsae index"):
        FeatureIndex.open(tmp_path)
