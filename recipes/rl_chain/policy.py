"""The policy's side of a chain: its model and problems, warm-up, reinforcement learning, and the stages they leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hubsae.core.files import read_csv, write_csv_atomic, write_json_atomic
from hubsae.recipes.standard import pick_device
from hubsae.recipes.steps import StepContext
from hubsae.recipes.subject import Subject, fetch_subject, subject_of
from hubsae.rl.accuracy import accuracy
from hubsae.rl.config import METHOD
from hubsae.rl.ppo import PPO
from hubsae.rl.problems import make_prompts
from hubsae.rl.rollout import Sampling
from hubsae.rl.stages import Checkpoint, merge_loss
from hubsae.rl.warmup import warm_up

from .chain import checkpoints
from .settings import ChainConfig


class Policy:
    """The steps up to the stages; the recipe's own class goes on from there."""

    def __init__(self, config: ChainConfig):
        self.config = config
        self.device = pick_device(config.device)

    def source(self, ctx: StepContext) -> dict[str, Any]:
        """Model and problems: made, opened or downloaded, and fixed."""
        return fetch_subject(ctx.folder, self.config.model, self.config.data, self.config.seed, ctx.progress)

    def warmup(self, ctx: StepContext) -> dict[str, Any]:
        """A few supervised steps on the answer format; the chain starts from what comes out."""
        config, source = self.config, source_of(ctx)
        assert config.warmup is not None
        losses = warm_up(
            config.warmup, ctx.folder, model=source.model, revision=source.revision, tokenizer=source.tokenizer(),
            questions=source.problems(), style=config.data.style(), seed=config.seed, device=self.device,
            progress=ctx.progress,
        )  # fmt: skip
        return {"first": losses[0]["loss"], "last": losses[-1]["loss"]}

    def rl(self, ctx: StepContext) -> dict[str, Any]:
        """Reinforcement learning, with a stage kept at every listed step."""
        config, rl, source = self.config, self.config.rl, source_of(ctx)
        assert rl is not None
        tokenizer, style, test = source.tokenizer(), config.data.style(), source.problems("test")
        shuffled = config.seed if rl.shuffled_gold else None
        PPO(
            rl, ctx.folder, model=source.model, revision=source.revision, name=source.label, tokenizer=tokenizer,
            train=make_prompts(
                tokenizer, source.problems(), style, max_prompt=rl.max_prompt, shuffle_gold_seed=shuffled
            ),
            test=make_prompts(tokenizer, test[: rl.test_problems], style, max_prompt=rl.max_prompt),
            seed=config.seed, device=self.device,
        ).run(ctx.progress)  # fmt: skip
        return {"method": METHOD, "stages": rl.stage_names(), "last": read_csv(ctx.folder / "metrics.csv")[-1]}

    def accuracy(self, ctx: StepContext) -> dict[str, Any]:
        """Held-out accuracy of one stage, by every scorer."""
        config, source, settings = self.config, source_of(ctx), self.config.evaluation
        tokenizer, style = source.tokenizer(), config.data.style()
        longest = (config.rl.max_prompt, config.rl.max_response) if config.rl else (512, config.harvest.max_new_tokens)
        test = source.problems("test")[: settings.accuracy_problems]
        sampling = Sampling(longest[1], settings.accuracy_temperature, settings.rollout_batch)
        model = self.stages(ctx, source)[ctx.settings["stage"]].load(self.device)
        prompts = make_prompts(tokenizer, test, style, max_prompt=longest[0])
        found = accuracy(model, tokenizer, prompts, sampling, seed=config.seed)
        write_json_atomic(ctx.folder / "accuracy.json", found)
        return found

    def merge(self, ctx: StepContext) -> list[dict[str, Any]]:
        """How large each stage's update is, and what bfloat16 or float16 storage would lose of it."""
        stages, rows = self.stages(ctx, source_of(ctx)), []
        base = stages[self.config.base_stage].load()
        for number, (name, stage) in enumerate(stages.items()):
            if name == self.config.base_stage or self.config.control_steps:
                continue
            model = stage.load()
            for dtype in (torch.bfloat16, torch.float16):
                lost = merge_loss(base, model, dtype)
                rows.append({"stage": name, "stored_in": str(dtype).removeprefix("torch."), **lost})
            ctx.progress(number, len(stages), name)
        if rows:
            write_csv_atomic(ctx.folder / "merge_loss.csv", rows)
        return rows

    def stages(self, ctx: StepContext, source: Subject) -> dict[str, Checkpoint]:
        """Every stage of the chain, the base first."""
        return checkpoints(self.config, source, ctx.path("rl") if self.config.runs_rl else None)


def source_of(ctx: StepContext) -> Subject:
    """The model that the chain starts from, with its problems."""
    found = subject_of(ctx, "source")
    if "warmup" in ctx.folders:
        found = replace(found, model=str(ctx.path("warmup") / "model"), revision=None)
    return found
