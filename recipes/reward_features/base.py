"""Reward features in the base model: matched by direction and by firing, and one of them steered under the reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.core.extras import require
from hubsae.core.sae import SAE
from hubsae.evals.steering import Direction, directions, dose_response
from hubsae.evals.weights import unit_rows
from hubsae.rl.steps import StepReward, StepText, split_steps

from .settings import SteerSettings


class Matched(NamedTuple):
    """One reward feature and the base feature that is its partner."""

    feature: int
    partner: int
    decoder: float
    """Cosine of their decoder rows"""
    firing: float
    """Correlation of their values at the ends of the same steps"""


def match(reward: SAE, base: SAE, here: Tensor, there: Tensor, chosen: Sequence[int]) -> list[Matched]:
    """Partners of the chosen features, one each, by Hungarian assignment on the mean of both similarities.

    `here` and `there` are the two models' states at the same steps, row by row.
    """
    optimize = require("scipy.optimize", extra="train")
    mine, theirs = (_codes(sae, x) for sae, x in ((reward, here), (base, there)))
    mine = mine[:, list(chosen)]
    firing = torch.nan_to_num(_standard(mine).T @ _standard(theirs) / len(mine))
    decoder = unit_rows(reward.W_dec)[list(chosen)] @ unit_rows(base.W_dec).T
    rows, partners = optimize.linear_sum_assignment((firing + decoder.double()).numpy(), maximize=True)
    return [
        Matched(chosen[i], int(j), float(decoder[i, j]), float(firing[i, j]))
        for i, j in zip(rows.tolist(), partners.tolist(), strict=True)
    ]


def steer(
    model: Any, tokenizer: Any, base: SAE, hook: int, feature: int, states: Tensor, prompts: Sequence[str],
    reward: StepReward, how: SteerSettings, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Let the base model answer with the feature added, beside random controls; the reward of what it writes."""
    largest = float(_codes(base, states)[:, feature].max())
    seen: dict[tuple[str, str], float] = {}

    def judge(direction: Direction, prompt: str, text: str) -> float:
        if (prompt, text) not in seen:
            seen[prompt, text] = float(reward.total([StepText(prompt, split_steps(text, reward.how.separator))])[0])
        return seen[prompt, text]

    asked = directions(base, {feature: []}, maxima={feature: largest}, controls=how.controls, hook=hook, seed=seed)
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    found = dose_response(
        model, tokenizer, ids, asked, how.strengths, max_new_tokens=how.tokens, judge=judge, seed=seed
    )  # fmt: skip
    names = {"said": "reward", "said_low": "reward_low", "said_high": "reward_high"}
    kept = ("direction", "kind", "strength", *names, "kl", "perplexity", "repetition", "length", "prompts")
    return [{names.get(key, key): row.flat()[key] for key in kept} for row in found.rows()]


def _codes(sae: SAE, x: Tensor) -> Tensor:
    """Dense codes of the ends of steps, which are few. [rows, d_sae] float64"""
    with torch.no_grad():
        return sae.encode(x.to(sae.device)).double().cpu()


def _standard(codes: Tensor) -> Tensor:
    centred = codes - codes.mean(0)
    return centred / centred.square().mean(0).sqrt()


def summary(found: Sequence[Matched], control: Sequence[Matched]) -> dict[str, float]:
    """Means over the matched features, and of the same features matched with a random dictionary."""
    of = {"matched": found, "random": control}
    return {
        f"{name}_{what}": float(np.mean([getattr(m, what) for m in pairs]))
        for name, pairs in of.items()
        for what in ("decoder", "firing")
    }
