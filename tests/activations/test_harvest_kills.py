"""A harvest killed at random, with a random bit of its folder flipped before each resume: never other values."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from kills import in_a_process, kill_and_flip

SAMPLES = 120


def harvests(folder: Path, kills: int) -> dict[str, int]:
    from test_harvest import assert_same_dataset, in_process

    started = time.monotonic()
    in_process(folder / "whole", SAMPLES)
    return kill_and_flip(
        lambda out: in_process(out, SAMPLES),
        lambda out: assert_same_dataset(folder / "whole", out),
        folder, kills=kills, longest=time.monotonic() - started, share=0.7, seed=7,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_with_a_random_bit_flipped_before_each_resume(tmp_path):
    """Every harvest ends with the values of an undisturbed one, or with an error of ours that says what is damaged."""
    kills = int(os.environ.get("HUBSAE_KILLS", "300"))
    outcomes = in_a_process(__file__, f"harvests({tmp_path!r}, {kills})")
    assert outcomes["whole"] > 0 and outcomes["kills"] >= kills
