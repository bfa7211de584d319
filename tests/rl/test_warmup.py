"""The supervised warm-up: it teaches the answer format, the same way each time, and starts the chain."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hubsae.core.errors import DataError
from hubsae.recipes.registry import prepare
from hubsae.rl.problems import PromptStyle, Question
from hubsae.rl.warmup import WarmUp, answer_batch, answer_loss, warm_up


def taught(world, folder, **changes):
    questions = [Question(p.question, p.answer) for p in world.train_problems[:200]]
    settings = WarmUp(**{"steps": 12, "batch": 8, "lr": 3e-3, "max_tokens": 120, **changes})
    start = world.stages["sft_step0"]
    return warm_up(
        settings, folder, model=start, tokenizer=world.tokenizer, questions=questions, style=PromptStyle(), seed=3
    )


def test_the_loss_falls_and_the_checkpoint_is_what_was_trained(quick_world, tmp_path):
    losses = taught(quick_world, tmp_path / "one")
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model", dtype=torch.float32)
    pairs = [
        (quick_world.prompt_ids(p), quick_world.tokenizer(p.answer, add_special_tokens=False).input_ids)
        for p in quick_world.test_problems[:16]
    ]
    batch = answer_batch(pairs, quick_world.tokenizer.pad_token_id)
    untaught = quick_world.load_stage("sft_step0")
    assert answer_loss(model, batch).item() < 0.6 * answer_loss(untaught, batch).item()
    assert taught(quick_world, tmp_path / "two") == losses


def test_padding_and_prompts_do_not_count(quick_world):
    model = quick_world.model
    alone = answer_loss(model, answer_batch([([5, 6], [7, 8])], pad=0))
    longer = answer_batch([([5, 6], [7, 8]), ([5, 6, 7, 9], [3, 4, 5])], pad=0)
    first = answer_loss(model, longer._replace(weights=longer.weights * torch.tensor([[1.0], [0.0]])))
    torch.testing.assert_close(alone, first)


def test_problems_that_are_all_too_long_are_an_error(quick_world, tmp_path):
    with pytest.raises(DataError, match="0 of 200 problems fit in 3 tokens"):
        taught(quick_world, tmp_path, max_tokens=3)


def test_a_chain_with_a_warm_up_starts_from_what_it_left(tmp_path):
    run = prepare("rl_chain", variant="strict", overrides=["warmup.steps=2"], out=tmp_path / "run")
    by_name = {step.name: step for step in run.steps}
    assert "warmup" in by_name["rl"].needs and "warmup" in by_name["accuracy/instruct_base"].needs
    assert (
        "warmup" in by_name["activations/prompt-response"].needs and "warmup" in by_name["evaluation/ppo_step5"].needs
    )
