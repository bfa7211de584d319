"""Live training: what a model makes of texts is mixed, cut, trained on, and taken up again to the bit."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hubsae.activations import ActivationDataset, PairedActivations
from hubsae.activations.activation_set import Batch
from hubsae.activations.ranks import Ranks
from hubsae.activations.stream import open_stream
from hubsae.core.errors import ConfigError
from hubsae.train import TrainConfig, checkpoint, train, train_live
from hubsae.train.job import load_job
from hubsae.train.live import LiveActivations

transformers = pytest.importorskip("transformers")
LAYERS = ["layers.0", "layers.1"]
IN, OUT = "layers.1.mlp_in", "layers.1.mlp_out"
CONFIG = TrainConfig(d_sae=64, k=4, batch_size=64, lr=3e-3, tokens=64 * 40, checkpoint_every=7, log_every=10)


def model():
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(settings).eval()


def texts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 61, rng.integers(4, 24)).tolist() for _ in range(150)]


def live(seed: int = 0, *, hooks=(0, 1), **options) -> LiveActivations:
    stream = open_stream(model(), list(hooks), batch_tokens=96, window=16, ranks=Ranks(), tokenizer=None)
    return LiveActivations(
        stream, texts, **{"tokens": 64 * 40, "buffer_rows": 256, "val_rows": 128, "seed": seed, **options}
    )


def live_pair(seed: int = 0, *, beside=(), **options) -> LiveActivations:
    """Input and output of an MLP, and what stands beside them."""
    return live(seed, hooks=(*beside, IN, OUT), targets={IN: OUT}, **options)


def batches(source: LiveActivations, count: int, layer: str = "layers.1") -> list[Batch]:
    columns = ["sample_id", "position", "token_id"]
    return list(itertools.islice(source[layer].labelled_batches(columns, 64), count))


def test_batches_hold_each_token_once_per_pass_as_the_model_makes_it_and_mixed():
    source = live()
    assert source.validation is not None
    held = set(zip(*(source.validation.labels[c].tolist() for c in ("sample_id", "position")), strict=True))
    found = batches(source, 20)
    seen = [pair for b in found for pair in zip(b.labels["sample_id"], b.labels["position"], strict=True)]
    assert len(set(seen)) == len(seen) == 20 * 64 and not held & set(seen)
    # the vectors are those of the model at that place
    alone, all_texts = model(), texts()
    for b in found[::7]:
        sample, position = int(b.labels["sample_id"][0]), int(b.labels["position"][0])
        expected = _residual(alone, all_texts[sample])[position]
        torch.testing.assert_close(b.x[0], expected, rtol=1e-4, atol=1e-5)
    # a batch of 64 tokens holds few neighbours: texts have about 14 tokens
    assert min(len(set(b.labels["sample_id"])) for b in found) > 12


def _residual(alone, ids) -> torch.Tensor:
    kept = []
    handle = alone.model.layers[1].register_forward_hook(
        lambda module, inputs, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        alone.model(torch.tensor([ids]))
    handle.remove()
    return kept[0].reshape(len(ids), -1)


def test_a_seed_gives_the_same_batches_and_another_seed_others():
    one, two, other = (batches(live(seed), 6) for seed in (0, 0, 1))
    assert all(torch.equal(a.x, b.x) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].x, other[0].x)


@pytest.mark.parametrize(("at", "mixing"), [(1, "even"), (5, "even"), (17, "even"), (30, "even"), (7, "half")])
def test_a_source_goes_on_where_its_state_stood_also_in_a_later_pass(at, mixing):
    everything = batches(live(tokens=64 * 80, mixing=mixing), 45)
    source = live(tokens=64 * 80, mixing=mixing)
    batches(source, at)
    again = live(tokens=64 * 80, mixing=mixing)
    again["layers.1"].load_state_dict(json.loads(json.dumps(source["layers.1"].state_dict())))
    for a, b in zip(everything[at:], batches(again, 45 - at), strict=True):
        assert torch.equal(a.x, b.x) and np.array_equal(a.labels["sample_id"], b.labels["sample_id"])


def test_a_buffer_that_gives_out_half_holds_each_token_once_and_half_of_a_chunk_leaves_with_each():
    source = live(tokens=64 * 120, mixing="half", val_rows=0)
    assert (source.chunk_rows, source.span) == (128, 8)
    chunk_of = {}
    for index, chunk in enumerate(itertools.islice(source._chunks(source.begin, source.chunk_rows), 14)):
        chunk_of |= dict.fromkeys(
            zip(*(chunk.labels[c].tolist() for c in ("sample_id", "position")), strict=True), index
        )
    rounds = itertools.islice(source._rounds(7, source.begin), 5)
    left: dict[tuple, int] = {}
    for index, _, rows in rounds:
        pairs = list(zip(*(rows.labels[c].tolist() for c in ("sample_id", "position")), strict=True))
        assert len(set(pairs)) == len(pairs) and not left.keys() & set(pairs)
        left |= dict.fromkeys(pairs, index)
    waits = [index - chunk_of[pair] for pair, index in left.items() if index > 7]
    assert min(waits) >= 0 and max(waits) <= 7
    # half of those that wait leave with each chunk
    for wait in (0, 1, 2):
        share = waits.count(wait) / sum(w >= wait for w in waits)
        assert abs(share - 0.5) < 0.1, (wait, share)


def test_all_layers_train_from_one_pass_as_each_would_alone(tmp_path):
    source = live()
    together = train_live([CONFIG], source, out=tmp_path, quiet=True)
    samples = source.stream.counts.samples
    for name in LAYERS:
        alone = train(CONFIG, live()[name], val=live()[name].validation, quiet=True)
        (mine,) = together[name]
        assert mine.sae is not None and alone.sae is not None and torch.equal(mine.sae.W_dec, alone.sae.W_dec)
        assert mine.metrics == alone.metrics and mine.metrics["val_rows"] >= 128
        assert mine.sae.metadata.hook.module_path == f"model.{name}"
        assert (tmp_path / name / "sae" / "metadata.json").exists()
    # the texts went through the model once for both layers (and their beginning for validation and statistics)
    assert samples < 2.2 * 150


def test_training_live_and_from_disk_reach_the_same_error():
    source = live(val_rows=512)
    held = source["layers.1"].validation
    rows = torch.cat([b.x for b in batches(live(val_rows=512), 25)])
    many = CONFIG.model_copy(update={"tokens": 64 * 200, "checkpoint_every": None})
    (by_live,) = train_live([many], live(val_rows=512, tokens=64 * 200), quiet=True)["layers.1"]
    on_disk = [
        train(
            many.model_copy(update={"seed": s, "data_seed": s}),
            ActivationDataset.from_tensor(rows),
            val=held,
            quiet=True,
        )
        for s in (0, 1, 2)
    ]
    errors = [r.metrics["val_fvu"] for r in on_disk]
    spread = max(errors) - min(errors)
    assert abs(by_live.metrics["val_fvu"] - sum(errors) / 3) < max(3 * spread, 0.02)


def test_a_pair_gives_what_the_module_makes_of_each_row_mixed_as_a_single_hook_point_is():
    source, alone, mlp = live_pair(), batches(live(hooks=(IN,)), 12, IN), model().model.layers[1].mlp
    assert list(source.layers) == [IN] and (source[IN].d, source[IN].d_out) == (16, 16)
    for pair, one in zip(itertools.islice(source[IN].batches(64), 12), alone, strict=True):
        assert isinstance(pair, Batch) and torch.equal(pair.x, one.x) and made_by(mlp, pair.x, pair.target)
    held = source[IN].validation
    assert isinstance(held, PairedActivations) and len(held) >= 128
    assert made_by(mlp, held.source.read_all(), held.target.read_all())
    with pytest.raises(ConfigError, match="of a pair and no hook point of the stream"):
        live(hooks=(IN,), targets={IN: OUT})


def made_by(module, x, target) -> bool:
    with torch.no_grad():
        return float((module(x) - target).norm() / target.norm()) < 1e-5


def test_a_pair_goes_on_where_its_state_stood():
    def pairs(source, count):
        return list(itertools.islice(source[IN].labelled_batches(["position"], 64), count))

    everything, source, again = pairs(live_pair(), 30), live_pair(), live_pair()
    pairs(source, 17)
    again[IN].load_state_dict(json.loads(json.dumps(source[IN].state_dict())))
    for a, b in zip(everything[17:], pairs(again, 13), strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.target, b.target)
        assert np.array_equal(a.labels["position"], b.labels["position"])


def test_a_transcoder_trained_live_and_from_disk_reaches_the_same_error():
    other = {"tokens": 64 * 200, "checkpoint_every": None, "exclude": ("position_0",), "normalize": "mean_std"}
    many = CONFIG.model_copy(update=other)
    sizes = {"tokens": 64 * 200, "val_rows": 512}
    (by_live,) = train_live([many], live_pair(**sizes), quiet=True)[IN]
    source = live_pair(**sizes)
    rows = Batch.joined(list(itertools.islice(source[IN].labelled_batches(["position"], 64), 25)))
    disk = PairedActivations.from_tensors(rows.x, rows.target, **rows.labels)
    errors = []
    for seed in (0, 1, 2):
        config = many.model_copy(update={"seed": seed, "data_seed": seed})
        errors.append(train(config, disk, val=source[IN].validation, quiet=True).metrics["val_fvu"])
    assert max(errors) < 0.9, "a constant has 1"
    assert abs(by_live.metrics["val_fvu"] - sum(errors) / 3) < max(3 * (max(errors) - min(errors)), 0.02)
    record = by_live.sae.metadata
    assert (record.hook.kind, record.hook_out.kind, by_live.sae.config.d_out) == ("mlp_in", "mlp_out", 16)
    assert record.training.exclude == ["position_0"]


CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from train.test_live import CONFIG, live_pair
from hubsae.train import train_live
print("ready", flush=True)
train_live([CONFIG], live_pair(beside=(0,)), out=sys.argv[2], quiet=True)
"""


def child(out: Path) -> subprocess.Popen:
    arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parents[1]), str(out)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_live_run_ends_with_the_same_bytes(tmp_path):
    train_live([CONFIG], live_pair(beside=(0,)), out=tmp_path / "whole", quiet=True)
    out, names = tmp_path / "killed", ("layers.0", IN)
    for last in (False, False, True):
        process = child(out)
        assert process.stdout is not None and process.stdout.readline().strip() == b"ready"
        before = {name: checkpoint.states(out / name / "state")[-1:] for name in names}
        while not last and process.poll() is None:
            now = {name: checkpoint.states(out / name / "state")[-1:] for name in names}
            if now[names[0]] != before[names[0]]:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        _, errors = process.communicate(timeout=240)
        assert process.returncode in (0, -9), errors.decode()
    for name in names:
        for file in ("sae/sae_weights.safetensors", "state/step_00000040/cell0.safetensors"):
            assert (out / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()


def test_the_command_trains_every_layer_of_a_model_on_a_file_of_texts(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = [f"w{i}" for i in range(59)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *words])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    model().save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(" ".join(words[i % 59] for i in ids) for ids in texts()))
    job = tmp_path / "job.yaml"
    job.write_text("data: {path: nowhere}\ntrain: {d_sae: 32, k: 2, batch_size: 64, tokens: 1280, lr: 1.0e-3}\n")
    base = [sys.executable, "-m", "hubsae.cli.main", "train", str(job), "--model", str(folder), "--texts", str(file)]
    base += ["--layers", "0,1", "--exclude", "position_0", f"out={tmp_path / 'run'}"]
    base += ["live.buffer_rows=256", "live.val_rows=128"]
    planned = subprocess.run([*base, "--dry-run", "--json"], capture_output=True, text=True)
    assert planned.returncode == 0 and [p["steps"] for p in json.loads(planned.stdout)] == [20, 20], planned.stderr
    done = subprocess.run([*base, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == ["sae-layers.0", "sae-layers.1"]
    record = json.loads((tmp_path / "run" / "layers.1" / "sae" / "metadata.json").read_text())
    assert record["hook"]["layer"] == 1 and record["training"]["exclude"] == ["position_0"]
    assert record["base_model"]["id"] == "model" and record["activations"]["text_dataset"] == "texts.txt"
    assert {m["scope"] for m in record["metrics"]} == {"not position_0"}
    pair = [f"live.model={folder}", f"live.texts={file}", "live.layers=[1.mlp_in]", "live.targets=[1.mlp_out]"]
    pair += ["live.buffer_rows=256", "live.val_rows=128", "skip=true"]
    (plan,) = load_job(str(job), pair).plan()
    (made,) = load_job(str(job), pair).run(quiet=True)
    assert plan.parameters == 2 * 16 * 32 + 32 + 2 * 16 + 16 * 16 and made.steps == 20
    assert (made.sae.config.d_out, made.sae.metadata.hook_out.kind) == (16, "mlp_out")
    with pytest.raises(ConfigError, match="1 targets for 2 layers"):
        load_job(str(job), [*pair, "live.layers=[0.mlp_in, 1.mlp_in]"])
    endless = [f"live.model={folder}", f"live.texts={file}", "live.layers=[0]", "tokens=null"]
    with pytest.raises(ConfigError, match="live training has no end of its own"):
        load_job(str(job), endless).plan()
