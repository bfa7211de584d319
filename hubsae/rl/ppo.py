"""Our own PPO: critic and GAE, clipped ratio, per-token KL in the reward. No library offers it any more.

One step is one rollout batch, as in verl:

    prompts -> responses -> scores -> per-token rewards (KL inside) -> GAE -> whitened advantages
            -> minibatch updates of policy and critic

Everything random in step n follows from (seed, n), so a run continued from a saved state is the same run to the bit.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.core.errors import TrainingError
from hubsae.core.files import atomic_path, read_csv, write_csv_atomic
from hubsae.core.tracking import Tracker
from hubsae.rl.accuracy import accuracy
from hubsae.rl.config import RLConfig
from hubsae.rl.objectives import (
    explained_variance,
    gae,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from hubsae.rl.policy import Policy, new_critic
from hubsae.rl.problems import Prompt, batch_of_step
from hubsae.rl.rollout import Rollout, Sampling, autocast, log_probs_of, sample, values_of
from hubsae.rl.scorers import find_scorer

Progress = Callable[[float, float | None, str | None], None]
Reward = Callable[[Sequence[Sequence[int]], Sequence[str]], Sequence[float]]
"""(prompts as token ids, responses) -> one reward each, such as `StepReward.responses`."""


class Experience:
    """A scored rollout batch with everything the update needs; tensors are [sequences, response tokens]."""

    def __init__(self, rollout: Rollout, old: Tensor, ref: Tensor, values: Tensor, entropy: Tensor):
        self.rollout, self.old, self.ref, self.values, self.entropy = rollout, old, ref, values, entropy
        self.mask = rollout.response_mask.to(old.dtype)
        self.advantages = self.returns = torch.zeros_like(old)

    def estimate(self, scores: Tensor, config: RLConfig) -> None:
        """Fill in advantages (whitened) and returns (from the unwhitened ones)."""
        rewards = token_rewards(scores, self.old, self.ref, self.rollout.response_mask, config.kl_coef)
        advantages, self.returns = gae(rewards, self.values, self.mask, config.gamma, config.lam)
        self.advantages = whiten(advantages, self.mask)


class PPO:
    """A PPO run in a folder: `metrics.csv`, `accuracy.csv`, `stages/ppo_step<n>/`, and a state to continue from."""

    def __init__(
        self,
        config: RLConfig,
        folder: Path,
        *,
        model: str | Path,
        tokenizer: Any,
        train: Sequence[Prompt],
        test: Sequence[Prompt] = (),
        seed: int = 0,
        revision: str | None = None,
        device: Any = "cpu",
        name: str | None = None,
        reward: Reward | None = None,
    ):
        """`reward` takes the place of the scorer that the config names; accuracies are measured beside it."""
        self.config, self.folder, self.seed, self.reward = config, folder, seed, reward
        self.tokenizer, self.train, self.test = tokenizer, train, test
        self.device = torch.device(device)
        self.policy = Policy(model, config.lora, seed=seed, revision=revision, device=self.device, name=name)
        self.critic = new_critic(model, revision=revision, device=self.device)
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(self.policy.trainable().values(), lr=config.lr, weight_decay=decay)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=config.critic_lr, weight_decay=decay)
        self.step = 0
        self.metrics: list[dict[str, Any]] = []
        self.accuracy: list[dict[str, Any]] = []

    def run(self, progress: Progress | None = None) -> None:
        """Train to the last step, continuing from the last saved state."""
        config = self.config
        for half_written in self.folder.rglob(".*.tmp"):
            half_written.unlink()
        self.resume()
        if self.step == 0:
            self._measure()
        with Tracker(config.tracker, self.folder, name=self.folder.parent.name or "run") as tracker:
            while self.step < config.steps:
                self.step += 1
                row = self.train_step()
                self.metrics.append({"step": self.step, **row})
                tracker.log(self.step, row)
                self._measure()
                if self.step in config.save_steps:
                    self._save_stage()
                if self.step % config.state_every == 0 or self.step in (*config.save_steps, config.steps):
                    self._save_state()
                if progress is not None:
                    progress(self.step, config.steps, f"reward {row['reward']:.2f}, KL {row['kl']:.3f}")
        self._write_tables()

    def train_step(self) -> dict[str, float]:
        """One rollout batch and its updates; returns the step's metrics."""
        config = self.config
        chosen = [self.train[i] for i in batch_of_step(len(self.train), config.prompts, self.step, self.seed)]
        prompts = [prompt for prompt in chosen for _ in range(config.responses)]
        sampling = Sampling(config.max_response, config.temperature, config.rollout_batch)
        with autocast(self.device, config.dtype):
            rollout = sample(
                self.policy.model, self.tokenizer, [p.ids for p in prompts], sampling, seed=self._seed("rollout")
            )
        experience = self.observe(rollout)
        texts = rollout.texts(self.tokenizer)
        if self.reward is not None:
            found = list(self.reward([p.ids for p in prompts], texts))
        else:
            scorer = find_scorer(config.scorer)
            found = [scorer(t, p.rewarded) for t, p in zip(texts, prompts, strict=True)]
        scores = torch.tensor(found, dtype=torch.float32, device=self.device)
        experience.estimate(scores, config)
        updates = self.update(experience)
        row: dict[str, float] = {"reward": float(scores.mean())}
        for name in ("strict", "flexible"):
            scorer = find_scorer(name)
            row[f"score_{name}"] = sum(scorer(t, p.gold) for t, p in zip(texts, prompts, strict=True)) / len(texts)
        row |= describe(experience) | updates
        if not all(math.isfinite(value) for value in row.values()):
            bad = ", ".join(name for name, value in row.items() if not math.isfinite(value))
            raise TrainingError(
                f"step {self.step}: {bad} is not finite",
                hint=f"lower rl.lr; the last good state is in {self._state_path()}",
            )
        return {name: round(value, 6) for name, value in row.items()}

    @torch.no_grad()
    def observe(self, rollout: Rollout) -> Experience:
        """Log-probabilities of policy and reference, and values, by the forwards that training uses.

        The log-probabilities that generation computed are not used: they come from other kernels (cache, other
        padding), and a ratio must be exactly 1 before the first update.
        """
        self.policy.model.train()
        self.critic.train()
        parts: list[tuple[Tensor, ...]] = []
        for start in range(0, len(rollout.tokens), self.config.micro_batch):
            some = rollout.rows(slice(start, start + self.config.micro_batch))
            with autocast(self.device, self.config.dtype):
                old, entropy = log_probs_of(self.policy.model, some, self.config.temperature)
                with self.policy.reference() as reference:
                    ref, _ = log_probs_of(reference, some, self.config.temperature)
                values = values_of(self.critic, some)
            parts.append((old, ref, values * some.response_mask, entropy))
        old, ref, values, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        return Experience(rollout, old, ref, values, entropy)

    def update(self, experience: Experience) -> dict[str, float]:
        """Minibatch updates of critic and, after the critic's warm-up, policy."""
        config = self.config
        count = len(experience.old)
        size = max(count // config.minibatches, 1)
        found: list[dict[str, float]] = []
        for epoch in range(config.epochs):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self._seed(f"order{epoch}")))
            for start in range(0, size * config.minibatches, size):
                rows = order[start : start + size]
                if len(rows):
                    found.append(self._update_once(experience, rows))
        return {name: sum(update[name] for update in found) / len(found) for name in found[0]}

    def _update_once(self, experience: Experience, rows: Tensor) -> dict[str, float]:
        config = self.config
        learning = self.step > config.critic_warmup
        tokens = experience.mask[rows].sum()
        names = ("policy_loss", "value_loss", "clip_fraction", "grad_norm", "critic_grad_norm")
        sums: dict[str, float] = dict.fromkeys(names, 0.0)
        for start in range(0, len(rows), config.micro_batch):
            some = rows[start : start + config.micro_batch]
            rollout, mask = experience.rollout.rows(some), experience.mask[some]
            with autocast(self.device, config.dtype):
                values = values_of(self.critic, rollout)
            lost = value_loss(values, experience.values[some], experience.returns[some], mask, config.value_clip)
            (lost / tokens).backward()
            sums["value_loss"] += float(lost.detach() / tokens)
            if not learning:
                continue
            with autocast(self.device, config.dtype):
                log_probs, entropy = log_probs_of(self.policy.model, rollout, config.temperature)
            surrogate = policy_loss(log_probs, experience.old[some], experience.advantages[some], mask, config.clip)
            objective = surrogate.loss - config.entropy_coef * (entropy * mask).sum()
            (objective / tokens).backward()
            sums["policy_loss"] += float(surrogate.loss.detach() / tokens)
            sums["clip_fraction"] += float(surrogate.clipped / tokens)
        sums["critic_grad_norm"] = self._apply(self.critic_optimizer)
        if learning:
            sums["grad_norm"] = self._apply(self.optimizer)
        return sums

    def _apply(self, optimizer: torch.optim.Optimizer) -> float:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def resume(self) -> bool:
        """Load the last saved state, if there is one."""
        path = self._state_path()
        if not path.is_file():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        parameters = self.policy.trainable()
        with torch.no_grad():
            for name, value in state["policy"].items():
                parameters[name].copy_(value)
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.step = state["step"]
        # rows of steps after the state belong to work that is done again
        self.metrics = [row for row in self._rows("metrics") if int(row["step"]) <= self.step]
        self.accuracy = [row for row in self._rows("accuracy") if int(row["step"]) <= self.step]
        return True

    def _save_state(self) -> None:
        # the tables first: a state must never be newer than the rows that lead to it
        self._write_tables()
        with atomic_path(self._state_path()) as temporary:
            torch.save(
                {
                    "step": self.step,
                    "policy": {name: p.detach() for name, p in self.policy.trainable().items()},
                    "critic": self.critic.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "critic_optimizer": self.critic_optimizer.state_dict(),
                },
                temporary,
            )

    def _save_stage(self) -> None:
        final = self.folder / "stages" / f"ppo_step{self.step}"
        temporary = final.with_name(f".{final.name}")
        # a run killed between a stage and its state comes here again
        for folder in (temporary, final):
            shutil.rmtree(folder, ignore_errors=True)
        self.policy.save_stage(temporary, self.tokenizer)
        temporary.rename(final)

    def _measure(self) -> None:
        every = self.config.test_every
        if not self.test or not every or (self.step % every and self.step != self.config.steps):
            return
        sampling = Sampling(self.config.max_response, self.config.test_temperature, self.config.rollout_batch)
        with autocast(self.device, self.config.dtype):
            found = accuracy(self.policy.model, self.tokenizer, self.test, sampling, seed=self._seed("test"))
        self.accuracy.append({"step": self.step, **found})

    def _write_tables(self) -> None:
        for name, rows in (("metrics", self.metrics), ("accuracy", self.accuracy)):
            if rows:
                write_csv_atomic(self.folder / f"{name}.csv", rows)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.csv"
        return list(read_csv(path)) if path.is_file() else []

    def _state_path(self) -> Path:
        return self.folder / "state.pt"

    def _seed(self, what: str) -> int:
        return zlib.crc32(f"{self.seed}-{self.step}-{what}".encode())


def describe(experience: Experience) -> dict[str, float]:
    """What a rollout batch looks like, before it is learned from."""
    mask, rollout = experience.mask, experience.rollout
    difference = (experience.old - experience.ref) * mask
    return {
        # as verl logs it: mean over the tokens of a sequence, then over sequences
        "kl": float((difference.sum(1) / mask.sum(1)).mean()),
        "kl_sequence": float(difference.sum(1).mean()),
        "length": float(rollout.lengths.float().mean()),
        "entropy": float(masked_mean(experience.entropy, mask)),
        "explained_variance": explained_variance(experience.values, experience.returns, mask),
        "return_mean": float(masked_mean(experience.returns, mask)),
    }
