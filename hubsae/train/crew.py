"""Threads that step the banks of a run side by side, each with its share of the cores.

The operators of a narrow SAE are too short to be worth splitting: two threads inside every operator burn twice the CPU
time for a quarter less wall time (twelve cells at width 64). With the cells dealt into one bank per core and each bank
stepped by a thread of its own, the cores wait for each other once per step (`benchmarks/train_many.py`).
PyTorch's and numpy's operators release the interpreter's lock, so threads suffice.

Banks share nothing that a step writes, so results do not depend on how the threads were scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from hubsae.train.config import TrainConfig

T = TypeVar("T")
R = TypeVar("R")

# an active entry costs a step about as much as this many latents (measured at widths 64 and 224)
LATENTS_PER_ENTRY = 20


class Crew:
    """`members` threads while its context lasts, the calling one included; outside it, or with one, no thread at all.

    >>> with Crew(2) as crew:
    ...     crew.map(lambda number: number + 1, [1, 2, 3])
    [2, 3, 4]
    """

    def __init__(self, members: int):
        self.members = members
        self._pool: ThreadPoolExecutor | None = None
        self._before = 1

    def __enter__(self) -> Crew:
        if self.members > 1:
            self._before = torch.get_num_threads()
            share = max(1, self._before // self.members)
            torch.set_num_threads(share)
            self._pool = ThreadPoolExecutor(self.members - 1, initializer=_start, initargs=(share,))
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            torch.set_num_threads(self._before)

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results in the order of the items; where several fail, the first one's error."""
        if self._pool is None or len(items) < 2:
            return [work(item) for item in items]
        others = [self._pool.submit(work, item) for item in items[1:]]
        try:
            first = work(items[0])
        finally:
            wait(others)
        return [first, *(other.result() for other in others)]


def _start(share: int) -> None:
    # all three belong to a thread, not to the process
    torch.set_num_threads(share)
    torch.set_grad_enabled(False)
    torch.set_flush_denormal(True)


def deal(configs: Sequence[TrainConfig], d_in: int, hands: int) -> list[list[int]]:
    """Numbers of the configs, dealt so that every hand takes about the same time; in their order within a hand.

    >>> cells = [TrainConfig(d_sae=n, k=2) for n in (512, 256, 256)]
    >>> deal(cells, 64, 2)
    [[0], [1, 2]]
    """

    def cost(number: int) -> float:
        config = configs[number]
        width = config.width(d_in)
        active = config.k or config.sparsity.l0_target or width / 32
        return width + LATENTS_PER_ENTRY * active

    dealt: list[list[int]] = [[] for _ in range(min(hands, len(configs)))]
    load = [0.0] * len(dealt)
    for number in sorted(range(len(configs)), key=cost, reverse=True):
        hand = load.index(min(load))
        dealt[hand].append(number)
        load[hand] += cost(number)
    return [sorted(hand) for hand in dealt]
