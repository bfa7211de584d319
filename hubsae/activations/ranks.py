"""Which of several processes this is, and how they agree that a harvest is complete - without a process group.

Each rank leaves a marker when its files are done; whoever finds all markers there finishes the dataset.
Two ranks that do so at once write the same files, each atomically.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hubsae.core.errors import ConfigError
from hubsae.core.files import read_json, write_json_atomic

FOLDER = ".harvest"


@dataclass(frozen=True)
class Ranks:
    """One of `world_size` processes.

    >>> Ranks.find(1, 4)
    Ranks(rank=1, world_size=4, local=0)
    """

    rank: int = 0
    world_size: int = 1
    local: int = 0

    @staticmethod
    def find(rank: int | None = None, world_size: int | None = None) -> Ranks:
        """As given, else from the environment `torchrun` and `accelerate launch` set, else alone."""
        number = int(os.environ.get("RANK", 0)) if rank is None else rank
        world = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
        if not 0 <= number < world:
            raise ConfigError(f"rank {number} is outside a world of {world}")
        return Ranks(number, world, int(os.environ.get("LOCAL_RANK", 0)))

    def finish(self, out: Path, complete: Callable[[dict[str, int]], object], counts: dict[str, int]) -> None:
        """Mark this rank as done, and complete the dataset once all are; `complete` gets the summed counts."""
        if self.world_size > 1:
            folder = out / FOLDER
            write_json_atomic(folder / f"rank-{self.rank:05d}-of-{self.world_size:05d}.json", counts)
            markers = sorted(folder.glob(f"rank-*-of-{self.world_size:05d}.json"))
            if len(markers) < self.world_size:
                return
            every = [read_json(marker) for marker in markers]
            counts = {key: sum(found.get(key, 0) for found in every) for key in counts}
        complete(counts)
