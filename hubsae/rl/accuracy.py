"""Accuracy of a model on held-out problems, by every scorer at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hubsae.rl.problems import Prompt
from hubsae.rl.rollout import Sampling, sample
from hubsae.rl.scorers import SCORERS


def accuracy(
    model: Any, tokenizer: Any, problems: Sequence[Prompt], sampling: Sampling, *, seed: int
) -> dict[str, float]:
    """Share of problems answered right, by each scorer, with the mean response length."""
    rollout = sample(model, tokenizer, [p.ids for p in problems], sampling, seed=seed)
    texts = rollout.texts(tokenizer)
    found = {
        name: round(sum(scorer(t, p.gold) for t, p in zip(texts, problems, strict=True)) / len(texts), 6)
        for name, scorer in SCORERS.items()
    }
    return {**found, "length": round(float(rollout.lengths.float().mean()), 3), "problems": len(problems)}
