"""Shards of activations as one table: its rows read in place, into recycled memory, or window by window."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.buffers import BufferPool
from hubsae.activations.order import Order, Unit
from hubsae.activations.sources import Source, spans
from hubsae.core.errors import DataError

READERS = 8
"""Connections used at once for a dataset that is streamed from the Hub."""
UNITS_PER_WINDOW = 32
"""Runs of neighbouring rows in a window; of the usual window, each is as long as a page of our files."""


class Shards:
    """Sources of vectors of one width, type and scale, one behind the other.

    >>> from hubsae.activations.sources import TensorSource
    >>> shards = Shards([TensorSource(torch.ones(2, 3), "a", {}), TensorSource(torch.zeros(4, 3), "b", {})])
    >>> out = torch.empty(3, 3)
    >>> shards.read(1, 3, out)
    >>> shards.n_rows, out[:, 0].tolist()
    (6, [1.0, 0.0, 0.0])
    """

    def __init__(self, sources: Sequence[Source]):
        first = sources[0]
        for source in sources[1:]:
            if (source.d, source.dtype, source.scale) != (first.d, first.dtype, first.scale):
                raise DataError(
                    f"{source.name} does not belong beside {first.name}: vectors of {source.d} {source.dtype} "
                    f"(scale {source.scale:g}) instead of {first.d} {first.dtype} (scale {first.scale:g})",
                    hint="keep each config's shards in its own folder",
                )
            if first.header and source.header and (wrong := first.header.differences(source.header)):
                raise DataError(f"{source.name} does not belong beside {first.name}: {'; '.join(wrong)}")
            if (first.header is None) != (source.header is None):
                odd = source if source.header is None else first
                raise DataError(f"{odd.name} has a schema from elsewhere: it was not written by hubsae")
        self.sources = list(sources)
        self.starts = np.concatenate([[0], np.cumsum([s.n_rows for s in sources])]).tolist()
        self.n_rows = int(self.starts[-1])
        self.d, self.dtype, self.scale = first.d, first.dtype, first.scale
        self.label_names = tuple(n for n in first.label_names if all(n in s.label_names for s in sources))
        self.remote = any(source.remote for source in sources)
        self._pools: dict[torch.dtype, BufferPool] = {}
        self._readers: ThreadPoolExecutor | None = None

    def read(self, first: int, rows: int, out: Tensor) -> None:
        """Stored values of rows first to first + rows."""
        at = 0
        for number, start, stop in spans(self.starts, first, first + rows):
            self.sources[number].read(start, stop, out[at : at + stop - start])
            at += stop - start

    def labels(self, names: Sequence[str], units: Sequence[Unit]) -> dict[str, np.ndarray]:
        """Label columns of runs of rows, one behind the other."""
        parts = [part for first, n in units for part in spans(self.starts, first, first + n)]
        found = [self.sources[number].labels(names, start, stop) for number, start, stop in parts]
        return {name: np.concatenate([part[name] for part in found]) if found else np.empty(0) for name in names}

    def buffer(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """Recycled memory [rows, d], of the stored type unless another is named."""
        kind = dtype or self.dtype
        return self._pools.setdefault(kind, BufferPool(kind)).take(rows, self.d)

    def deliver(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Stored values as the caller wants them."""
        if dtype == stored.dtype and self.scale == 1:
            return stored
        out = self.buffer(len(stored), dtype)
        if self.scale == 1:
            return out.copy_(stored)
        wide = out if dtype == torch.float32 else self.buffer(len(stored), torch.float32)
        wide.copy_(stored).mul_(1 / self.scale)  # a power of two: exact
        return wide if dtype == torch.float32 else out.copy_(wide)

    def rows(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Vectors of rows first to first + count."""
        stored = self.buffer(count)
        self.read(first, count, stored)
        return self.deliver(stored, dtype)

    def units(self, window_rows: int) -> list[Unit]:
        """What is read at once. It does not follow the cut into files, so that rows come in the same order after a
        harvest that was stopped and went on, and streamed as from disk; except where reading from anywhere is dear."""
        if any(source.whole_blocks for source in self.sources):
            return self.blocks()
        rows = max(1, window_rows // UNITS_PER_WINDOW)
        return [(first, min(rows, self.n_rows - first)) for first in range(0, self.n_rows, rows)]

    def blocks(self) -> list[Unit]:
        """The runs of rows that the files themselves are made of."""
        return [(start + f, n) for start, s in zip(self.starts, self.sources, strict=False) for f, n in s.blocks]

    def read_units(self, units: Sequence[Unit], skip: int, rows: int, out: Tensor) -> None:
        """Rows skip to skip + rows of consecutive units, straight into the batch."""
        at = 0
        for first, n in units:
            if skip < n and at < rows:
                part = min(n - skip, rows - at)
                self.read(first + skip, part, out[at : at + part])
                at += part
            skip = max(0, skip - n)

    def windows(
        self, order: Order, start: int, names: list[str], prefetch: int | None
    ) -> Iterator[tuple[int, int, Tensor | None, dict[str, np.ndarray]]]:
        """Number, rows, pool of vectors (None: read in place) and labels of each window from `start` on.

        `prefetch` windows are read ahead by a thread while one is used; None: one over a network, none from a disk.
        """

        def load(number: int) -> tuple[Tensor | None, dict[str, np.ndarray]]:
            units = order.windows[number]
            labels = self.labels(names, units) if names else {}
            if order.seed is None and not self.remote:
                return None, labels
            pool = self.buffer(sum(n for _, n in units))
            edges = np.concatenate([[0], np.cumsum([n for _, n in units])]).tolist()
            jobs = [(first, n, pool[a : a + n]) for (first, n), a in zip(units, edges[:-1], strict=True)]
            if self.remote:
                list(self._pool_of_readers().map(lambda job: self.read(*job), jobs))
            else:
                for job in jobs:
                    self.read(*job)
            return pool, labels

        ahead = int(self.remote) if prefetch is None else prefetch
        if not ahead:
            for number in range(start, len(order.windows)):
                pool, labels = load(number)
                yield number, sum(n for _, n in order.windows[number]), pool, labels
                del pool  # so that the next window may use its memory again
            return
        reader, numbers = ThreadPoolExecutor(1), iter(range(start, len(order.windows)))
        try:  # the next windows are read while this one is used
            coming = deque(reader.submit(load, number) for number in islice(numbers, ahead))
            for number in range(start, len(order.windows)):
                pool, labels = coming.popleft().result()
                coming.extend(reader.submit(load, later) for later in islice(numbers, 1))
                yield number, sum(n for _, n in order.windows[number]), pool, labels
                del pool
        finally:
            reader.shutdown(cancel_futures=True)

    def _pool_of_readers(self) -> ThreadPoolExecutor:
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="hubsae-read")
        return self._readers
