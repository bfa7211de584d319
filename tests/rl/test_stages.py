"""Checkpoints made elsewhere as stages: folders, adapters, Hub repos at a revision; and what a merge would lose."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from hubsae.core.errors import ConfigError, NotFoundError
from hubsae.rl.policy import LoRA, Policy
from hubsae.rl.stages import Checkpoint, merge_loss, parse_checkpoint

SCRIPT = """
import json, sys
from hubsae.core.errors import NotFoundError
from hubsae.rl.stages import parse_checkpoint
model, adapter = sys.argv[1:]
found = {}
for name, source in (("whole", model), ("adapter", adapter), ("whole_at_main", model.partition("@")[0])):
    stage = parse_checkpoint(name + "_step3", source, model)
    weight = stage.load().model.layers[1].mlp.up_proj.weight.detach()
    found[name] = [stage.revision, stage.base is not None, str(weight.dtype), float(weight.double().sum())]
try:
    parse_checkpoint("step1", "me/nothing-here", model)
except NotFoundError as error:
    found["missing"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def adapter(quick_world, tmp_path_factory):
    policy = Policy(quick_world.model_path, LoRA(r=4, alpha=8), seed=0, name="tiny-world")
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    folder = tmp_path_factory.mktemp("stages") / "ppo_step3"
    policy.save_stage(folder, quick_world.tokenizer)
    return folder


def test_an_adapter_is_merged_in_float32_exactly(quick_world, adapter):
    stage = parse_checkpoint("ppo_step3", str(adapter), str(quick_world.model_path))
    assert (stage.step, stage.base) == (3, str(quick_world.model_path))
    merged = stage.load()
    assert type(merged).__name__ == "Qwen2ForCausalLM" and next(merged.parameters()).dtype == torch.float32
    policy = Policy(quick_world.model_path, LoRA(r=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        ids = torch.tensor([quick_world.prompt_ids(quick_world.test_problems[0])])
        assert torch.allclose(merged(ids).logits, policy.model(ids).logits, atol=1e-4)


def test_the_saved_adapter_names_its_base_and_lists_its_targets_in_order(adapter):
    about = json.loads((adapter / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "tiny-world"
    assert about["target_modules"] == sorted(about["target_modules"]) and len(about["target_modules"]) == 7


def test_stages_come_from_a_hub_at_a_revision_adapters_too(quick_world, adapter, tmp_path):
    from huggingface_hub import HfApi

    from hubsae import localhub
    from hubsae.localhub.settings import Token

    with localhub.running(root=tmp_path / "hub", tokens=[Token.parse("me=hf_me")]) as hub:
        api = HfApi(endpoint=hub.url, token="hf_me")
        for repo, folder in (("me/base", quick_world.model_path), ("me/adapter", adapter)):
            api.create_repo(repo)
            api.upload_folder(repo_id=repo, folder_path=folder)
        first = {repo: api.model_info(repo).sha for repo in ("me/base", "me/adapter")}
        # what is on main later is another model: a stage named by revision must not follow
        api.upload_folder(repo_id="me/base", folder_path=quick_world.stages["sft_step40"])
        env = {**os.environ, **hub.env(home=tmp_path / "home"), "HF_TOKEN": "hf_me", "OMP_NUM_THREADS": "1"}
        argv = [sys.executable, "-c", SCRIPT, f"me/base@{first['me/base']}", f"me/adapter@{first['me/adapter']}"]
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().split("\n")[-1])

    def total(stage: Checkpoint) -> float:
        return float(stage.load().model.layers[1].mlp.up_proj.weight.detach().double().sum())

    base, early = str(quick_world.model_path), str(quick_world.stages["sft_step40"])
    assert found["whole"] == [first["me/base"], False, "torch.float32", total(Checkpoint("x", base))]
    assert found["adapter"][:3] == [first["me/adapter"], True, "torch.float32"]
    assert found["adapter"][3] == total(parse_checkpoint("x", str(adapter), base))
    assert found["whole_at_main"][3] == total(Checkpoint("x", early)) != found["whole"][3]
    assert "me/nothing-here" in found["missing"]


def test_an_adapter_without_its_base_is_refused(adapter):
    with pytest.raises(ConfigError, match="is an adapter"):
        parse_checkpoint("ppo_step3", str(adapter))


def test_what_is_neither_a_folder_nor_a_repo_is_refused():
    with pytest.raises(NotFoundError, match="neither a folder nor a repo id"):
        parse_checkpoint("ppo_step3", "no such place", "x")


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-4])
def test_merge_loss_counts_what_bfloat16_rounds_away(size):
    base, stage = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        base.weight.copy_(torch.randn(64, 64, generator=generator))
        stage.weight.copy_(base.weight + size * torch.randn(64, 64, generator=generator))
    got = merge_loss(base, stage, torch.bfloat16)
    old, new = base.weight.detach(), stage.weight.detach()
    pairs = [(a, b) for a, b in zip(old.view(-1), new.view(-1), strict=True) if a != b]
    same = sum(float(a.to(torch.bfloat16)) == float(b.to(torch.bfloat16)) for a, b in pairs)
    assert got["unchanged"] == pytest.approx(same / len(pairs))
    assert got["update"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-3)
    assert merge_loss(base, stage, torch.float32)["error"] < 1e-6


def test_the_smaller_the_update_the_larger_the_share_that_is_lost():
    base, stage = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
    lost = []
    for size in (3e-2, 1e-2, 1e-3):
        with torch.no_grad():
            stage.weight.copy_(base.weight * (1 + size))
        lost.append(merge_loss(base, stage, torch.bfloat16)["unchanged"])
    assert lost == sorted(lost) and lost[-1] > 0.5
