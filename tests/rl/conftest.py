"""A small PPO run on the quick tiny world."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubsae.rl.config import RLConfig
from hubsae.rl.policy import LoRA
from hubsae.rl.ppo import PPO
from hubsae.rl.problems import PromptStyle, Question, make_prompts

SMALL: dict[str, Any] = {
    "scorer": "flexible", "steps": 4, "save_steps": (2, 4), "prompts": 8, "responses": 2, "minibatches": 2,
    "micro_batch": 8, "lr": 5e-4, "critic_lr": 1e-3, "max_response": 16, "state_every": 2, "test_every": 2,
    "test_temperature": 1.0, "lora": LoRA(r=4, alpha=8),
}  # fmt: skip


@pytest.fixture(scope="session")
def make_ppo(quick_world) -> Callable[..., PPO]:
    def questions(problems):
        return [Question(p.question, p.answer) for p in problems]

    train = make_prompts(quick_world.tokenizer, questions(quick_world.train_problems), PromptStyle(), max_prompt=64)
    test = make_prompts(quick_world.tokenizer, questions(quick_world.test_problems[:32]), PromptStyle(), max_prompt=64)

    def make(folder: Path, seed: int = 0, **changes: Any) -> PPO:
        return PPO(
            RLConfig(**{**SMALL, **changes}),
            folder,
            model=quick_world.model_path,
            tokenizer=quick_world.tokenizer,
            train=train,
            test=test,
            seed=seed,
        )

    return make


@pytest.fixture(autouse=True, scope="session")
def _worlds_from_the_cache(cache_root: Path) -> Any:
    before = os.environ.get("HUBSAE_CACHE")
    os.environ["HUBSAE_CACHE"] = str(cache_root)
    yield
    if before is None:
        del os.environ["HUBSAE_CACHE"]
    else:
        os.environ["HUBSAE_CACHE"] = before
