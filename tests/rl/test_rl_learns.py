"""What the rewards teach, over two seeds: the recipe's own tiny profile, as `hubsae recipe run` runs it.

Slow: about a quarter of an hour on a quiet core.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hubsae.recipes.registry import prepare

SEEDS = (0, 1)


def learned(out: Path, variant: str, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Held-out accuracies of the base and of the last stage."""
    run = prepare("rl_chain", variant=variant, overrides=[f"seed={seed}"], out=out)
    policy = [step for step in run.steps if step.name in ("source", "rl") or step.name.startswith("accuracy/")]
    results = {outcome.name: outcome.result for outcome in run.run.execute(policy)}
    graded = [result for name, result in results.items() if name.startswith("accuracy/")]
    return graded[0], graded[-1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.timeout(3600)
def test_the_strict_reward_raises_strict_accuracy_by_at_least_30_points(tmp_path, seed):
    base, last = learned(tmp_path, "strict", seed)
    assert base["strict"] < 0.25 and base["flexible"] > base["strict"] + 0.2
    assert last["strict"] - base["strict"] >= 0.30


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.timeout(3600)
def test_the_flexible_reward_hardly_moves_strict_accuracy_and_does_not_lower_flexible(tmp_path, seed):
    base, last = learned(tmp_path, "flexible", seed)
    assert last["strict"] - base["strict"] <= 0.10
    assert last["flexible"] >= base["flexible"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.timeout(3600)
def test_the_shuffled_reward_gains_nothing(tmp_path, seed):
    base, last = learned(tmp_path, "shuffled", seed)
    # 0.03 is the standard error of a difference on 512 problems
    assert last["strict"] - base["strict"] <= 0.06
    assert last["flexible"] - base["flexible"] <= 0.03
