"""Which samples go through the model together: sorted by length, as many as a token budget holds.

The batches of a window depend on the samples alone, not on ranks or on what is done already, so a run on eight
ranks, or one that was killed and resumed, computes exactly the same batches as an undisturbed run on one.
"""

from __future__ import annotations

from collections.abc import Sequence

from hubsae.activations.samples import Sample

MOST = 512
"""Samples of a batch."""


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of samples by batch: longest first, padded size (count x longest) within `budget` tokens.

    >>> token_budget_batches([5, 1, 4, 1], budget=10)
    [[0, 2], [1, 3]]
    """
    order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    current: list[int] = []
    for index in order:
        longest = lengths[current[0]] if current else lengths[index]
        # a batch is also cut where the samples have become half as long: padding would cost more than it saves
        too_short = bool(current) and 2 * lengths[index] < longest and len(current) * longest > budget // 4
        if current and ((len(current) + 1) * longest > budget or len(current) >= MOST or too_short):
            batches.append(current)
            current = []
        current.append(index)
    if current:
        batches.append(current)
    return batches


def batches_of(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """The samples of a window in batches; samples without tokens are in none."""
    return [[samples[i] for i in batch] for batch in token_budget_batches([len(s.ids) for s in samples], budget)]
