"""RLOO and GRPO through TRL's stable trainers: critic-free alternatives, never labelled PPO.

TRL counts optimiser steps; ours are rollout batches, as in verl. With `minibatches` updates per batch, our step n is
TRL's step n x minibatches, and everything written here counts in ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hubsae.core.errors import ConfigError
from hubsae.core.extras import require
from hubsae.core.files import write_csv_atomic
from hubsae.recipes.quiet import quiet
from hubsae.recipes.rl.config import RLConfig
from hubsae.recipes.rl.policy import Policy
from hubsae.recipes.rl.problems import Prompt
from hubsae.recipes.scorers import Scorer, find_scorer

Progress = Callable[[float, float | None, str | None], None]

COLUMNS = {
    "reward": "rewards/{reward}/mean",
    "score_strict": "rewards/strict/mean",
    "score_flexible": "rewards/flexible/mean",
    "kl": "kl",
    "length": "completions/mean_length",
    "entropy": "entropy",
    "clip_fraction": "clip_ratio/region_mean",
    "grad_norm": "grad_norm",
}
"""Our column names and TRL's."""


def run_trl(
    config: RLConfig,
    folder: Path,
    *,
    model: str | Path,
    tokenizer: Any,
    train: Sequence[Prompt],
    seed: int = 0,
    revision: str | None = None,
    device: Any = "cpu",
    name: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Train with RLOO or GRPO in `folder`, continuing from TRL's last checkpoint there.

    Leaves `metrics.csv` and `stages/<algorithm>_step<n>/`, as our PPO does.
    """
    trl = require("trl", extra="train")
    datasets = require("datasets", extra="train")
    if config.responses < 2:
        raise ConfigError(
            f"{config.algorithm} compares responses to one prompt; rl.responses is {config.responses}",
            hint="set rl.responses to 2 or more, or use rl.algorithm=ppo",
        )
    rows = [{"prompt": tokenizer.decode(p.ids), "gold": p.gold, "rewarded": p.rewarded} for p in train]
    rewards, weights = _rewards(config)
    with _no_telemetry(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(model, config.lora, seed=seed, revision=revision, device=device, name=name)
        arguments = _arguments(trl, config, folder / "trl", torch.device(device), seed, weights)
        kind = trl.RLOOTrainer if config.algorithm == "rloo" else trl.GRPOTrainer
        with quiet():
            trainer = kind(
                model=policy.model,
                reward_funcs=rewards,
                args=arguments,
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[_callback(config, folder, policy, tokenizer, progress)],
            )
            trainer.remove_callback(require("transformers", extra="train").PrinterCallback)
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder / "trl"))
    _write_metrics(config, folder, trainer.state.log_history)


def _arguments(trl: Any, config: RLConfig, out: Path, device: torch.device, seed: int, weights: list[float]) -> Any:
    per_update = config.sequences // config.minibatches
    micro = min(config.micro_batch, per_update)
    if config.sequences % config.minibatches or per_update % micro:
        raise ConfigError(
            f"{config.sequences} sequences do not divide into {config.minibatches} updates of micro-batches of {micro}",
            hint="choose rl.prompts, rl.responses, rl.minibatches and rl.micro_batch that divide",
        )
    common: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": config.steps * config.minibatches,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": per_update // micro,
        # one rollout batch serves `minibatches` updates
        "steps_per_generation": config.minibatches * (per_update // micro),
        "num_generations": config.responses,
        "num_iterations": config.epochs,
        "max_completion_length": config.max_response,
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.grad_clip,
        "temperature": config.temperature,
        "beta": config.kl_coef,
        "epsilon": config.clip,
        "reward_weights": weights,
        "seed": seed,
        "bf16": config.dtype == "bfloat16" and device.type == "cuda",
        "gradient_checkpointing": False,
        "use_cpu": device.type == "cpu",
        "save_strategy": "steps",
        "save_steps": config.state_every * config.minibatches,
        "save_total_limit": 1,
        "logging_steps": config.minibatches,
        "disable_tqdm": True,
        "report_to": [] if config.tracker in ("none", "auto") else [config.tracker],
    }
    if config.algorithm == "rloo":
        return trl.RLOOConfig(**common, normalize_advantages=True)
    return trl.GRPOConfig(**common)


def _rewards(config: RLConfig) -> tuple[list[Any], list[float]]:
    """The reward and, at weight 0 so that they are only logged, both scorers against the true gold."""
    reward = _reward("reward", find_scorer(config.scorer), "rewarded")
    watched = [_reward(name, find_scorer(name), "gold") for name in ("strict", "flexible")]
    return [reward, *watched], [1.0, 0.0, 0.0]


def _reward(name: str, scorer: Scorer, column: str) -> Any:
    def score(completions: list[str], **columns: Any) -> list[float]:
        return [scorer(text, gold) for text, gold in zip(completions, columns[column], strict=True)]

    score.__name__ = name  # TRL logs a reward under the function's name
    return score


def _callback(config: RLConfig, folder: Path, policy: Policy, tokenizer: Any, progress: Progress | None) -> Any:
    transformers = require("transformers", extra="train")

    class Stages(transformers.TrainerCallback):
        """Saves the listed steps; TRL itself saves at intervals only."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step, rest = divmod(state.global_step, config.minibatches)
            if rest:
                return
            if step in config.save_steps:
                final = folder / "stages" / f"{config.algorithm}_step{step}"
                temporary = final.with_name(f".{final.name}")
                for old in (temporary, final):
                    shutil.rmtree(old, ignore_errors=True)
                policy.save_stage(temporary, tokenizer)
                temporary.rename(final)
            if progress is not None:
                progress(step, config.steps, None)

    return Stages()


def _last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint that TRL finished writing; its trainer_state.json is written last."""
    found = [path for path in out.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _write_metrics(config: RLConfig, folder: Path, history: list[dict[str, Any]]) -> None:
    rows = []
    for entry in history:
        if "rewards/reward/mean" not in entry:
            continue
        row: dict[str, Any] = {"step": entry["step"] // config.minibatches}
        for name, theirs in COLUMNS.items():
            value = entry.get(theirs.format(reward="reward"))
            row[name] = None if value is None else round(float(value), 6)
        rows.append(row)
    if rows:
        write_csv_atomic(folder / "metrics.csv", rows)


@contextmanager
def _no_telemetry() -> Any:
    """TRL tells its maker of every trainer that is made, unless this is set."""
    before = os.environ.get("HF_HUB_DISABLE_TELEMETRY")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_DISABLE_TELEMETRY"]
        else:
            os.environ["HF_HUB_DISABLE_TELEMETRY"] = before
