"""RLOO and GRPO through TRL: stages at our steps, both scorers logged, resume, honest errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hubsae.core.errors import ConfigError
from hubsae.recipes.quiet import quiet
from hubsae.recipes.report import read_csv
from hubsae.recipes.rl.config import LABELS, RLConfig
from hubsae.recipes.rl.policy import LoRA
from hubsae.recipes.rl.problems import PromptStyle, Question, make_prompts
from hubsae.recipes.rl.trl_trainers import run_trl


@pytest.fixture(scope="module")
def train(quick_world, tmp_path_factory):
    pytest.importorskip("trl")
    questions = [Question(p.question, p.answer) for p in quick_world.train_problems[:200]]
    prompts = make_prompts(quick_world.tokenizer, questions, PromptStyle(), max_prompt=64)

    def run(folder: Path, algorithm: str, progress=None, **changes) -> Path:
        config = RLConfig(**{
            "algorithm": algorithm, "scorer": "strict", "steps": 2, "save_steps": (1, 2), "prompts": 8, "responses": 4,
            "minibatches": 2, "micro_batch": 8, "lr": 5e-4, "max_response": 16, "state_every": 1,
            "lora": LoRA(r=4, alpha=8), **changes,
        })  # fmt: skip
        with quiet():
            run_trl(config, folder, model=quick_world.model_path, tokenizer=quick_world.tokenizer, train=prompts,
                    progress=progress)  # fmt: skip
        return folder

    return run


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_run_leaves_stages_at_rollout_steps_and_metrics_of_both_scorers(train, tmp_path, algorithm):
    train(tmp_path, algorithm)
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == [f"{algorithm}_step{n}" for n in (1, 2)]
    one, two = (load_file(tmp_path / f"stages/{algorithm}_step{n}/adapter_model.safetensors") for n in (1, 2))
    assert any((one[name] != two[name]).any() for name in one)
    rows = read_csv(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [1, 2]
    for row in rows:
        assert 0 <= float(row["score_strict"]) <= float(row["score_flexible"]) <= 1
        assert row["reward"] == row["score_strict"] and float(row["length"]) > 2
        # an estimate of one sample each: it may be a little below zero
        assert abs(float(row["kl"])) < 1


def test_an_interrupted_run_goes_on_from_the_last_whole_checkpoint(train, tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, total, text):
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path, "rloo", stop)
    # a checkpoint that was being written when the process died
    half = tmp_path / "trl" / "checkpoint-99"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    shutil.rmtree(tmp_path / "stages" / "rloo_step2", ignore_errors=True)
    steps: list[float] = []
    train(tmp_path, "rloo", lambda done, total, text: steps.append(done))
    assert steps == [2]
    assert (tmp_path / "stages/rloo_step1").is_dir() and (tmp_path / "stages/rloo_step2").is_dir()
    assert [int(row["step"]) for row in read_csv(tmp_path / "metrics.csv")] == [1, 2]


def test_sizes_that_do_not_divide_and_single_responses_are_refused(train, tmp_path):
    with pytest.raises(ConfigError, match="compares responses"):
        train(tmp_path, "grpo", responses=1)
    with pytest.raises(ConfigError, match="do not divide"):
        train(tmp_path, "grpo", minibatches=3)


def test_no_method_is_called_what_it_is_not():
    assert "critic" in LABELS["ppo"] and "critic-free" in LABELS["rloo"] and "critic-free" in LABELS["grpo"]
    assert "PPO" not in LABELS["rloo"] + LABELS["grpo"]
