"""The order in which rows are read: seeded windows of pages, split between ranks, resumable to the row.

A page is a run of neighbouring tokens, so whole pages in random order would give batches of neighbours. A window is a
few dozen pages in a seeded random order, permuted as a whole and drained before the next. Where a reader stands is
then three numbers: epoch, window, and offset in the window.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

Unit = tuple[int, int]
"""First row in the dataset and number of rows, read at once."""

MIN_UNITS_PER_RANK = 16


@dataclass(frozen=True)
class Order:
    """What one rank reads in one epoch."""

    windows: tuple[tuple[Unit, ...], ...]
    n_rows: int
    """rows of this rank"""
    smallest: int
    """rows of the rank that has fewest"""
    seed: tuple[int, int, int] | None
    """seed, epoch and rank of the permutations; None where rows come in storage order"""

    def permutation(self, window: int) -> np.ndarray | None:
        """The order of the rows inside a window."""
        if self.seed is None:
            return None
        return np.random.default_rng([*self.seed, window, 1]).permutation(sum(n for _, n in self.windows[window]))


def split_units(blocks: list[Unit], world_size: int) -> list[Unit]:
    """Blocks, cut smaller where there are too few of them to share out evenly."""
    if world_size == 1:
        return blocks
    total = sum(n for _, n in blocks)
    most = max(1, total // (world_size * MIN_UNITS_PER_RANK))
    units = []
    for first, rows in blocks:
        pieces = -(-rows // most)
        edges = np.linspace(0, rows, pieces + 1).astype(int).tolist()
        units += [(first + a, b - a) for a, b in itertools.pairwise(edges) if b > a]
    return units


def plan_order(
    blocks: list[Unit], *, shuffle: bool, seed: int, epoch: int, rank: int, world_size: int, window_rows: int
) -> Order:
    """Share the blocks between ranks and group them into windows.

    >>> order = plan_order([(0, 4), (4, 4)], shuffle=False, seed=0, epoch=0, rank=0, world_size=1, window_rows=8)
    >>> order.windows
    (((0, 4), (4, 4)),)
    """
    units = split_units(blocks, world_size)
    turn = np.random.default_rng([seed, epoch, 0]).permutation(len(units)) if shuffle else np.arange(len(units))
    shares = [turn[r::world_size] for r in range(world_size)]
    rows = np.array([n for _, n in units], dtype=np.int64)
    windows, current, size = [], [], 0
    for index in shares[rank]:
        current.append(units[index])
        size += units[index][1]
        if size >= window_rows:
            windows.append(tuple(current))
            current, size = [], 0
    if current:
        windows.append(tuple(current))
    totals = [int(rows[share].sum()) for share in shares]
    return Order(tuple(windows), totals[rank], min(totals), (seed, epoch, rank) if shuffle else None)
