"""A recipe under torchrun: rank 0 runs it, the others help in the steps whose work spreads over ranks.

Only `Step.spreads` steps are called on other ranks, with RANK and WORLD_SIZE in the environment as torchrun
sets them; every other step they wait out. Ranks meet in the run folder alone, so it must be one they all see. When
one rank fails torchrun ends the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hubsae.recipes.steps import Step

if TYPE_CHECKING:
    from hubsae.recipes.run import RunFolder, StepOutcome

POLL = 0.1
"""Seconds between two looks at what rank 0 has reached."""


def follows() -> bool:
    """Whether this process is a rank other than the first.

    >>> follows()
    False
    """
    return int(os.environ.get("RANK", 0)) > 0


def follow(run: RunFolder, steps: Sequence[Step], prints: dict[str, str], context: Callable[..., Any]) -> list[Any]:
    """Wait for rank 0 through every step, and do this rank's share of those that spread."""
    outcomes: list[StepOutcome] = []
    for step in steps:
        helped = False
        while True:
            if step.spreads and not helped and run.has_begun(step, prints[step.name]):
                step.run(context(step, outcomes))
                helped = True
            outcome = run.finished(step, prints[step.name])
            if outcome is not None:
                outcomes.append(outcome)
                break
            time.sleep(POLL)
    return outcomes
