"""Harvested values equal a one-sample-at-a-time forward, for every family, mode and number of ranks."""

from __future__ import annotations

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
from conftest_activations import make_qwen

from hubsae.activations import ActivationDataset, harvest
from hubsae.core.errors import ConfigError, DataError, HookError, HubSAEError
from hubsae.core.hooks import HookPoint, read_hook

ROOT = Path(__file__).parents[2]


def families():
    import transformers as t

    common = {"vocab_size": 120, "max_position_embeddings": 128}
    llama = {**common, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2}  # fmt: skip
    gemma = {**llama, "head_dim": 8}
    return {
        "qwen2": (t.Qwen2Config, llama),
        "qwen3": (t.Qwen3Config, gemma),
        "llama": (t.LlamaConfig, llama),
        "mistral": (t.MistralConfig, {**llama, "sliding_window": 16}),
        "gemma": (t.GemmaConfig, gemma),
        "gemma2": (t.Gemma2Config, {**gemma, "sliding_window": 16}),
        "gemma3": (t.Gemma3TextConfig, {**gemma, "sliding_window": 16}),
        "gpt2": (t.GPT2Config, {"vocab_size": 120, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}),
        "gpt_neox": (t.GPTNeoXConfig, {**common, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                                       "num_attention_heads": 4}),
        "olmo": (t.OlmoConfig, llama),
        "olmo2": (t.Olmo2Config, llama),
    }  # fmt: skip


def build(name: str):
    import transformers as t

    kind, options = families()[name]
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(kind(**options)).eval()


def one_at_a_time(model, hook: str, ids: list[int]) -> torch.Tensor:
    """The activations of one sample, alone, by a plain forward with a hook."""
    seen: list[torch.Tensor] = []
    with read_hook(model, hook, lambda h: seen.append(h.detach().clone())), torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    return seen[0][0]


def check_against_single_forwards(model, data, found, tolerance=2e-6):
    for name, activations in found.items():
        labels, x = activations.columns(["sample_id", "position", "token_id"]), activations.read_all()
        for sample in np.unique(labels["sample_id"]):
            rows = np.flatnonzero(labels["sample_id"] == sample)
            ids = data[sample]["input_ids"]
            assert labels["token_id"][rows].tolist() == ids and labels["position"][rows].tolist() == list(
                range(len(ids))
            )
            expected = one_at_a_time(model, name.removeprefix("s."), ids)
            assert (x[rows] - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("family", list(families()))
def test_every_family_and_hook_point(family, tmp_path, token_data):
    model = build(family)
    data = [{**s, "input_ids": [i % 120 for i in s["input_ids"]]} for s in token_data[:12]]
    hooks = [0, 2, "1.resid_pre", "1.mlp_out", "1.attn_out"]
    found = harvest(model, data, hooks, out=tmp_path, dtype="float32", batch_tokens=256, progress=False)
    assert set(found) == {"layers.0", "layers.2", "layers.1.resid_pre", "layers.1.mlp_out", "layers.1.attn_out"}
    check_against_single_forwards(model, data, found)
    assert found["layers.0"].read_all().equal(found["layers.1.resid_pre"].read_all())
    # the last layer is taken before the final norm, which hidden_states[-1] is not
    with torch.no_grad():
        states = model(input_ids=torch.tensor([data[0]["input_ids"]]), output_hidden_states=True).hidden_states
    last = one_at_a_time(model, "2", data[0]["input_ids"])
    norm = next(m for n, m in model.named_modules() if n.endswith(("ln_f", "final_layer_norm")) or n == "model.norm")
    assert torch.allclose(norm(last), states[-1][0], atol=1e-5)
    assert found["layers.2"].info["hook_point"] == HookPoint(2).module_path(model)


def test_padding_batches_and_windows_do_not_change_values(tmp_path, tiny_model, token_data):
    found = harvest(
        tiny_model, token_data, [1, 3], out=tmp_path, dtype="float32", batch_tokens=300, window=32, progress=False
    )
    assert len(found["layers.1"]) == sum(len(s["input_ids"]) for s in token_data)
    check_against_single_forwards(tiny_model, token_data, found)


def test_stops_after_the_last_layer_and_restores_the_model(tmp_path, tiny_model, token_data):
    calls = []
    handle = tiny_model.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    tiny_model.train()
    try:
        harvest(tiny_model, token_data[:5], [1], out=tmp_path, progress=False)
        assert tiny_model.training and not calls
    finally:
        handle.remove()
        tiny_model.eval()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_model.modules())


def sorted_rows(folder, config="layers.1", split="train"):
    data = ActivationDataset.open(folder, config, split)
    labels = data.columns()
    order = np.lexsort([labels["position"], labels["sample_id"]])
    return {k: v[order] for k, v in labels.items()}, data.read_all()[torch.from_numpy(order)]


def test_the_result_does_not_depend_on_the_number_of_ranks(tmp_path, tiny_model, token_data):
    options = {"batch_tokens": 300, "window": 40, "validation_fraction": 0.2, "progress": False}
    harvest(tiny_model, token_data, [1], out=tmp_path / "one", **options)
    for world in (2, 3):
        for rank in range(world):
            harvest(tiny_model, token_data, [1], out=tmp_path / f"{world}", rank=rank, world_size=world, **options)
        for split in ("train", "validation"):
            labels, values = sorted_rows(tmp_path / "one", split=split)
            other_labels, other_values = sorted_rows(tmp_path / f"{world}", split=split)
            assert torch.equal(values, other_values)
            assert all(np.array_equal(labels[k], other_labels[k]) for k in labels)
        one, many = (ActivationDataset.open(tmp_path / n, 1).stats for n in ("one", f"{world}"))
        assert torch.allclose(one.std, many.std, rtol=1e-9) and one.count == many.count
        splits = json.loads((tmp_path / f"{world}" / "activations.json").read_text())["configs"]["layers.1"]["splits"]
        assert splits["train"]["samples"] + splits["validation"]["samples"] == 150


SCRIPT = """
import sys, torch, numpy as np
sys.path.insert(0, {tests!r})
from conftest_activations import make_qwen
from hubsae.activations import harvest
rng = np.random.default_rng(0)
data = [{{"input_ids": rng.integers(3, 290, n).tolist(), "prompt_length": n // 3}}
        for n in rng.integers(20, 60, {count})]
torch.set_num_threads(1)
harvest(make_qwen(), data, [1, 3], out={out!r}, batch_tokens=200, window=64, shard_bytes=40_000,
        validation_fraction=0.2, progress=False)
"""


def run_script(out: Path, count: int, **env: str) -> subprocess.Popen:
    code = SCRIPT.format(tests=str(Path(__file__).parent), out=str(out), count=count)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def in_process(out: Path, count: int) -> None:
    """The same harvest as `SCRIPT`, undisturbed."""
    rng = np.random.default_rng(0)
    data = [
        {"input_ids": rng.integers(3, 290, n).tolist(), "prompt_length": n // 3} for n in rng.integers(20, 60, count)
    ]
    harvest(
        make_qwen(), data, [1, 3], out=out, batch_tokens=200, window=64, shard_bytes=40_000, validation_fraction=0.2,
        progress=False,
    )  # fmt: skip


def assert_same_dataset(one: Path, other: Path) -> None:
    for config in ("layers.1", "layers.3"):
        for split in ("train", "validation"):
            labels, values = sorted_rows(one, config, split)
            other_labels, other_values = sorted_rows(other, config, split)
            assert torch.equal(values, other_values)
            assert all(np.array_equal(labels[k], other_labels[k]) for k in labels)


def test_two_processes_under_the_environment_of_torchrun(tmp_path):
    workers = [run_script(tmp_path / "two", 60, RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r)) for r in range(2)]
    assert [w.wait(timeout=240) for w in workers] == [0, 0]
    in_process(tmp_path / "one", 60)
    assert {p.name.split("-")[1] for p in (tmp_path / "two" / "layers.1").glob("train-*")} == {"00000", "00001"}
    assert_same_dataset(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "README.md").is_file()


def test_a_killed_harvest_resumes_without_losing_or_doubling_a_token(tmp_path):
    out = tmp_path / "killed"
    worker = run_script(out, 400)
    while worker.poll() is None and len(list(out.glob("layers.*/train-*.parquet"))) < 3:
        time.sleep(0.002)
    assert worker.poll() is None, "the harvest was over before it could be killed"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert not (out / "activations.json").exists()
    # a different number of ranks may take it up, too
    workers = [run_script(out, 400, RANK=str(r), WORLD_SIZE="2") for r in range(2)]
    assert [w.wait(timeout=240) for w in workers] == [0, 0]
    in_process(tmp_path / "whole", 400)
    assert_same_dataset(tmp_path / "whole", out)
    assert not list(out.glob("layers.*/.*.tmp"))


def test_a_finished_harvest_run_again_changes_nothing(tmp_path, tiny_model, token_data):
    harvest(tiny_model, token_data, [1], out=tmp_path, progress=False)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    harvest(tiny_model, token_data, [1], out=tmp_path, progress=False)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before


def test_other_weights_may_not_continue_a_harvest(tmp_path, tiny_model, token_data):
    harvest(tiny_model, token_data[:20], [1], out=tmp_path, progress=False)
    with pytest.raises(DataError, match="weights"):
        harvest(make_qwen(seed=5), token_data, [1], out=tmp_path, progress=False)
    with pytest.raises(DataError, match="max_length"):
        harvest(tiny_model, token_data, [1], out=tmp_path, max_length=7, progress=False)


def test_stages_share_a_folder(tmp_path, token_data):
    for stage, seed in (("base", 0), ("ppo_step10", 1)):
        harvest(make_qwen(seed), token_data[:10], [1, 3], out=tmp_path, stage=stage, progress=False)
    names = ["base.layers.1", "base.layers.3", "ppo_step10.layers.1", "ppo_step10.layers.3"]
    found = {n: ActivationDataset.open(tmp_path, n) for n in names}
    assert not torch.equal(found["base.layers.1"].read_all(), found["ppo_step10.layers.1"].read_all())
    assert found["ppo_step10.layers.3"].info["stage"] == "ppo_step10"


def test_the_scale_is_found_before_anything_overflows(tmp_path, token_data):
    model = make_qwen()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 3e5
    found = harvest(model, token_data[:20], [0], out=tmp_path, progress=False)["layers.0"]
    assert found.scale == 2.0**-5
    assert found.read_all()[:, 3].min() > 2.9e5
    with pytest.raises(DataError, match="does not fit float16"):
        harvest(model, token_data[:20], [0], out=tmp_path / "b", scale=1.0, progress=False)
    assert not list((tmp_path / "b").rglob("*.parquet"))


def test_what_cannot_work_is_said_before_the_first_forward(tmp_path, tiny_model, tokenizer):
    with pytest.raises(HookError, match="no layer 9: it has 4 blocks"):
        harvest(tiny_model, ["a"], [9], out=tmp_path, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="texts need a tokenizer"):
        harvest(tiny_model, ["a"], [1], out=tmp_path)
    with pytest.raises(ConfigError, match="no mode 'chat'"):
        harvest(tiny_model, ["a"], [1], out=tmp_path, tokenizer=tokenizer, mode="chat")
    with pytest.raises(ConfigError, match="needs a mode with prompts"):
        harvest(tiny_model, ["a"], [1], out=tmp_path, tokenizer=tokenizer, select="response")
    with pytest.raises(DataError, match="no data"):
        harvest(tiny_model, [], [1], out=tmp_path, tokenizer=tokenizer)
    with pytest.raises(HubSAEError, match="there is no model"):
        harvest(str(tmp_path / "no_model"), ["a"], [1], out=tmp_path, tokenizer=tokenizer)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_model_folder_with_an_adapter_is_merged_in_float32(tmp_path, tokenizer):
    import peft

    base = make_qwen()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(make_qwen(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(tmp_path / "adapter")
    data = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}]
    options = {"dtype": "float32", "progress": False}
    merged = harvest(str(tmp_path / "base"), data, [3], out=tmp_path / "m", adapter=tmp_path / "adapter", **options)
    live = harvest(wrapped, data, [3], out=tmp_path / "w", **options)
    plain = harvest(base, data, [3], out=tmp_path / "p", **options)
    memory = harvest(base, data, [3], out=tmp_path / "mm", adapter=tmp_path / "adapter", **options)
    x = merged["layers.3"].read_all()
    assert (x - live["layers.3"].read_all()).norm() < 1e-5 * x.norm()
    assert torch.equal(x, memory["layers.3"].read_all())
    assert (x - plain["layers.3"].read_all()).norm() > 1e-3 * x.norm()
    assert merged["layers.3"].info["adapter_merge"] == "float32"
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, make_qwen().model.layers[0].mlp.up_proj.weight)


def test_a_typo_in_the_model_and_a_hub_that_does_not_answer_are_said_to_be_what_they_are(tmp_path):
    from hubsae.localhub import running

    (tmp_path / "model").mkdir()
    code = (
        "import sys; from hubsae.activations.models import load_model, load_tokenizer\n"
        "for name in sys.argv[1:]:\n"
        "    for load in (load_tokenizer, load_model):\n"
        "        try: load(name)\n"
        "        except Exception as error: print(type(error).__name__, error)\n"
    )
    with running(tmp_path / "hub") as hub:
        env = {**os.environ, **hub.env(home=tmp_path / "home")}
        command = [sys.executable, "-c", code, "local/no-such-model", str(tmp_path / "modle")]
        said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        assert said.count(f"there is no model local/no-such-model: no such folder here, no such repo at {hub.url}") == 2
    # a Hub that does not answer is not asked again and again for every file
    gone = subprocess.run([*command[:3], "local/no-such-model"], env=env, capture_output=True, text=True, check=True)
    assert gone.stdout.count("local/no-such-model cannot be loaded: We couldn't connect") == 2
    assert "Retry" not in gone.stderr
    assert said.count(f"did you mean {tmp_path / 'model'}?") == 2
    assert "tokenizer=" not in said and "huggingface.co" not in said
