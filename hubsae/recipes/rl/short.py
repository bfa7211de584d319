"""A short run of the rl_chain recipe's policy on a tiny world: real stages of reinforcement learning in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubsae.recipes.quiet import quiet
from hubsae.recipes.registry import find_recipe
from hubsae.recipes.rl.chain_settings import ChainConfig
from hubsae.recipes.rl.ppo import PPO
from hubsae.recipes.rl.problems import Question, make_prompts
from hubsae.recipes.rl.stages import Checkpoint, parse_checkpoint
from hubsae.recipes.tiny import TinyWorld, single_thread


def short_run(
    world: TinyWorld,
    folder: Path,
    *,
    save_steps: Sequence[int] = (5, 20),
    variant: str = "strict",
    seed: int = 0,
    progress: Any = None,
) -> dict[str, Checkpoint]:
    """Train the policy up to the last of `save_steps`; the stages by name, the base first.

    Settings are those of the recipe's tiny profile. A killed run continues in the same `folder`.

    >>> stages = short_run(tiny_world("quick"), Path("rl"), save_steps=(2,))    # doctest: +SKIP
    >>> stages["ppo_step2"].load()                                              # doctest: +SKIP
    """
    config = find_recipe("rl_chain").config("tiny", variant)
    assert isinstance(config, ChainConfig) and config.rl is not None
    changes = {"steps": max(save_steps), "save_steps": tuple(save_steps), "test_every": 0}
    rl = config.rl.model_copy(update=changes)
    questions = [Question(p.question, p.answer) for p in world.train_problems]
    train = make_prompts(world.tokenizer, questions, config.data.style(), max_prompt=rl.max_prompt)
    with single_thread(), quiet():
        ppo = PPO(
            rl, folder, model=world.model_path, tokenizer=world.tokenizer, train=train, seed=seed, name="tiny-world"
        )
        ppo.run(progress)
    base = str(world.model_path)
    stages = {config.base_stage: Checkpoint(config.base_stage, base)}
    for name in rl.stage_names():
        stages[name] = parse_checkpoint(name, str(folder / "stages" / name), base)
    return stages
