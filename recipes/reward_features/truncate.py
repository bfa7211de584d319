"""The claim that upper layers can be thrown away: probes as rewards, run up to their layer, beside the whole model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hubsae.core.sae import SAE
from hubsae.evals.probes import Probe
from hubsae.rl.reward_models import RewardModel
from hubsae.rl.steps import StepReward
from hubsae.rl.truncated import TruncatedReward

from . import scores
from .errors import RIGHT, Solution
from .table import RAW, SAE_CODES

FULL, GUESS = "whole model", "a guess"
Probes = Mapping[int, tuple[SAE, Probe, Probe]]
"""By layer: the SAE, the probe on its codes, the probe on the states themselves"""


def truncated(reward: RewardModel, probes: Probes, solutions: Sequence[Solution], layers: int) -> list[dict[str, Any]]:
    """A row per reward: how it agrees with the whole model on whole solutions, what it picks, how long it takes."""
    texts, problem = [s.text for s in solutions], np.array([s.problem for s in solutions])
    right = np.array([s.kind == RIGHT for s in solutions])
    several = len(np.unique(problem)) < len(problem)
    whole, seconds = _timed(reward, texts)
    rows = [{"reward": FULL, "layer": layers - 1, "layers_run": 1.0, "seconds": seconds, "share_of_time": 1.0}]
    if several:
        chance = scores.best_of_n(np.zeros(len(texts)), right, problem)
        rows[0] |= scores.best_of_n(whole, right, problem).columns("best_of_n")
        rows.append({"reward": GUESS, **chance.columns("best_of_n")})
    for layer, (sae, on_codes, on_states) in probes.items():
        for name, of, probe in ((SAE_CODES, sae, on_codes), (RAW, None, on_states)):
            short = TruncatedReward(
                reward.backbone, reward.tokenizer, probe, sae=of, hook=layer, how=reward.how, aggregate=reward.aggregate
            )
            found, seconds = _timed(short, texts)
            row = {"reward": name, "layer": layer, "layers_run": (layer + 1) / layers, "seconds": seconds,
                   "share_of_time": seconds / rows[0]["seconds"],
                   **scores.spearman(found, whole, problem).columns("spearman")}  # fmt: skip
            if several:
                row |= scores.pairs(found, whole, problem).columns("pairs")
                row |= scores.best_of_n(found, right, problem).columns("best_of_n")
            rows.append(row)
    return rows


def _timed(reward: StepReward, texts: Sequence[Any]) -> tuple[np.ndarray, float]:
    reward.total(texts[:2])  # what is only done once
    began = time.process_time()
    found = reward.total(texts)
    return found, time.process_time() - began
