"""The full profile, run for real on a stand-in: a 24-layer Qwen2 checkpoint and a GSM8K-layout dataset on a hub.

Only sizes differ from the published run. Model and data are downloaded from the hub by revision, the activations and
the release are pushed back to it, and loaded from there by hubsae and by stock SAELens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from hubsae.core.files import read_csv, read_json

SMALLER = [
    "model.id=me/qwen-standin", "model.revision=main", "data.id=me/gsm8k-standin", "device=cpu", "threads=1",
    "rl.steps=1", "rl.save_steps=[1]", "rl.prompts=4", "rl.responses=2", "rl.minibatches=2", "rl.micro_batch=4",
    "rl.max_response=8", "rl.test_every=1", "rl.test_problems=4", "harvest.problems=40", "harvest.max_new_tokens=6",
    "sae.epochs=2", "sae.resample_every=1", "sae.batch_size=128", "evaluation.accuracy_problems=4",
    "evaluation.splice_texts=4", "publish.release=me/chain", "publish.activations=me/chain-acts",
]  # fmt: skip

SCRIPT = """
import json, sys
import torch
from hubsae.recipes.registry import prepare

prepare("rl_chain", profile="full", variant="flexible", overrides=json.loads(sys.argv[2]), out=sys.argv[1]).execute()

from datasets import load_dataset
from hubsae import HubSAE
sae = HubSAE.from_pretrained("me/chain", layer=18, stage="ppo_step1")
x = torch.randn(16, 32)
from sae_lens import SAE
lens = SAE.from_pretrained("me/chain", "saes_k64/ppo_step1/layer18")
lens = lens[0] if isinstance(lens, tuple) else lens
with torch.no_grad():
    assert torch.allclose(lens(x), sae(x), atol=1e-4)
rows = load_dataset("me/chain-acts", "ppo_step1.layers.23", split="validation")
assert len(rows[0]["vector"]) == 32, rows
print("all back")
"""


@pytest.fixture(scope="module")
def stand_in(quick_world, tmp_path_factory):
    """A checkpoint with the real file layout: 24 layers, bfloat16, instruct generation defaults; and its data."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = quick_world.tokenizer
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=24, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config.update(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("stand-in")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    quick_world.rows_folder("problems", folder / "data")
    return folder


def test_the_full_profile_runs_from_a_hub_to_a_hub(stand_in, tmp_path):
    pytest.importorskip("sae_lens")
    from huggingface_hub import HfApi

    from hubsae import localhub
    from hubsae.localhub.settings import Token

    with localhub.running(root=tmp_path / "hub", tokens=[Token.parse("me=hf_me")]) as hub:
        api = HfApi(endpoint=hub.url, token="hf_me")
        for repo, kind, part in (("me/qwen-standin", "model", "model"), ("me/gsm8k-standin", "dataset", "data")):
            api.create_repo(repo, repo_type=kind)
            api.upload_folder(repo_id=repo, repo_type=kind, folder_path=stand_in / part)
        commit = api.model_info("me/qwen-standin").sha
        env = {**os.environ, **hub.env(home=tmp_path / "home"), "HF_TOKEN": "hf_me", "OMP_NUM_THREADS": "1"}
        run = tmp_path / "run"
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(run), json.dumps(SMALLER)],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        assert "all back" in done.stdout
    # the model is pinned to the commit it was downloaded at, and every SAE says so
    assert read_json(run / ".steps/source.json")["result"]["revision"] == commit
    record = read_json(run / "release/saes_l23_k256/ppo_step1/layer23/metadata.json")
    assert record["base_model"]["id"] == "me/qwen-standin" and record["base_model"]["revision"] == commit
    assert (record["base_model"]["stage"], record["base_model"]["step"]) == ("ppo_step1", 1)
    # the update of all weights is small: this is what bfloat16 would have lost
    lost = {(row["stage"], row["stored_in"]): row for row in read_csv(run / "merge/merge_loss.csv")}
    assert float(lost["ppo_step1", "bfloat16"]["unchanged"]) > 0.5
    # the numbers of a stand-in lie outside the bands of the real model, and the report says so
    compared = [r for r in read_csv(run / "report/published_reconstruction.csv") if r["stage"] == "instruct_base"]
    verdicts = {(row["layer"], row["metric"]): row for row in compared}
    assert verdicts["6", "mse"]["verdict"] in ("below band", "above band")
    assert float(verdicts["6", "mse"]["low"]) == pytest.approx(0.0235, abs=1e-4)
    assert float(verdicts["6", "mse"]["high"]) == pytest.approx(0.0251, abs=1e-4)
