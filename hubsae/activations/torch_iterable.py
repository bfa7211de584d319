"""Activation batches as a plain torch IterableDataset, for code that wants a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info


class ActivationIterable(IterableDataset):
    """Yields whole batches. Worker processes count as further ranks, so no row comes twice."""

    def __init__(self, batches: Callable[..., Iterator[Any]], batch_size: int, options: dict[str, Any]):
        self.batches, self.batch_size, self.options, self.epoch = batches, batch_size, dict(options), 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffling of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        options = {"epoch": self.epoch, **self.options}
        if (worker := get_worker_info()) is not None and worker.num_workers > 1:
            world, rank = options.get("world_size", 1), options.get("rank", 0)
            options["world_size"] = world * worker.num_workers
            options["rank"] = rank * worker.num_workers + worker.id
            options.setdefault("drop_last", False)  # workers need not finish together: nothing is dropped
        return self.batches(self.batch_size, **options)
