"""Learning rate and sparsity coefficient as functions of the step."""

from __future__ import annotations

import math

from hubsae.train.config import TrainConfig


def warmup_steps(steps: int, tokens: int, batch_size: int) -> int:
    """Steps of a warm-up given in steps or in tokens."""
    return math.ceil(tokens / batch_size) if tokens else steps


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`.

    >>> from hubsae.train.config import ScheduleConfig
    >>> c = TrainConfig(d_sae=8, k=2, lr=1.0, schedule=ScheduleConfig(shape="cosine", floor=0.1))
    >>> [round(learning_rate(c, s, 100), 3) for s in (0, 50, 99)]
    [1.0, 0.55, 0.1]
    """
    s = config.schedule
    warm = warmup_steps(s.warmup_steps, s.warmup_tokens, config.batch_size)
    if step < warm:
        return config.lr * (step + 1) / warm
    total -= s.cooldown_steps
    if s.cooldown_steps and step >= total:
        last = 1.0 if s.shape == "constant" else s.floor
        return config.lr * last * (1 - (step - total) / s.cooldown_steps)
    if s.shape == "constant":
        return config.lr
    done = min(1.0, (step - warm) / max(total - warm, 1))
    down = (1 - done) if s.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.lr * (s.floor + (1 - s.floor) * down)


def sparsity_scale(config: TrainConfig, step: int) -> float:
    """Share of the sparsity coefficient in force at `step`."""
    s = config.sparsity
    warm = warmup_steps(s.warmup_steps, s.warmup_tokens, config.batch_size)
    return 1.0 if step >= warm else step / warm
