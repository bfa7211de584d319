"""Read activation datasets: batches at disk speed, seeded shuffling, exact resume.

    ActivationDataset.open("out", "layers.18").batches(8192) -> float tensors [8192, d]
    ... .labelled_batches(["position"], 8192) -> the same with labels: Labelled(x, {"position": ...})

Opens folders of ours, datasets on the Hub, SAELens' cached activations, and piles of `.pt`, `.npy` and
`.safetensors` files. Batches use recycled memory (see `buffers`), so keeping a batch is safe and dropping it is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hubsae.activations.opening import REPO, Found, find_activations
from hubsae.activations.order import Order, plan_order
from hubsae.activations.shards import Shards
from hubsae.activations.sources import Source, TensorSource
from hubsae.activations.stats import ActivationStats
from hubsae.core import factory
from hubsae.core.errors import ConfigError, DataError, NotFoundError
from hubsae.core.options import pass_on

WINDOW_BYTES = 256 << 20
"""Vectors shuffled together: 150 k tokens at d 896, 32 k at d 4096 (float16)."""


class Labelled(NamedTuple):
    """Vectors with what is known of each of them."""

    x: Tensor
    """[rows, d]"""
    labels: Mapping[str, np.ndarray]
    """[rows] each"""


@dataclass
class _Place:
    """Where a reader stands: everything before it has been yielded."""

    epoch: int
    window: int
    offset: int
    shape: dict[str, Any]


class ActivationDataset:
    """One config and split of an activation dataset.

    >>> data = ActivationDataset.from_tensor(torch.arange(12.0).reshape(6, 2))
    >>> len(data), data.d, next(iter(data.batches(4, shuffle=False))).shape
    (6, 2, torch.Size([4, 2]))
    """

    def __new__(cls, *args: Any, **named: Any) -> Self:
        """An object of the class that users get, which can be published."""
        return super().__new__(factory.user_class(cls))

    def __init__(self, sources: Sequence[Source], config: str, split: str, path: str, configs: Sequence[str] = ()):
        if not sources:
            raise DataError(f"{path}: no activations in split {split!r} of {config}")
        shards, first = Shards(sources), sources[0]
        self.shards, self.sources = shards, shards.sources
        self.config, self.split, self.path, self.configs = config, split, path, list(configs) or [config]
        self.n_rows, self.d, self.label_names = shards.n_rows, shards.d, shards.label_names
        self.stored_dtype, self.scale = shards.dtype, shards.scale
        self.info: dict[str, Any] = dict(first.header.source) if first.header else {}
        self.window_bytes = WINDOW_BYTES
        """Vectors shuffled together, where `batches` does not say."""
        self.prefetch: int | None = None
        """Windows read ahead by a thread while one is used; None: one over a network, none from a disk."""
        self._stats: ActivationStats | None = None
        self._place: _Place | None = None
        self._resume: _Place | None = None

    @classmethod
    def open(
        cls,
        path_or_repo: str | Path,
        config: str | int | None = None,
        split: str = "train",
        *,
        revision: str | None = None,
        stream: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        verify: bool = False,
        vector: str | None = None,
    ) -> Self:
        """Open a folder, a file, or a dataset repo: `path_or_repo`, for instance `owner/name@revision`.

        `config` names the hook point (`layers.18`, or 18); it may be left out where there is only one. `split` is
        train, validation, or what else there is. `vector` names the matrix in a file that holds several. `verify`
        checks the checksum of every page at its first reading (about 0.3 us per token at d 896).
        A repo is downloaded at `revision` (through `cache_dir`, with `token`; `local_files_only` asks no Hub), or with
        `stream=True` read by ranges.
        """
        if Path(path_or_repo).exists():
            found: Found = find_activations(Path(path_or_repo), config, split, vector=vector)
        elif REPO.fullmatch(repo := str(path_or_repo)):
            found = pass_on(factory.user_class(cls)._find_in_repo, locals())
        else:
            raise NotFoundError(
                f"{path_or_repo} does not exist", hint="give a folder, a file, or a dataset repo as owner/name"
            )
        for source in found.sources:
            source.verify = verify
        return cls(*found)

    @classmethod
    def _find_in_repo(cls, repo: str, config: str | int | None, split: str, **options: Any) -> Found:
        raise NotFoundError(f"there is no folder or file {repo}", hint="`import hubsae` to open repos of the Hub")

    @classmethod
    def from_tensor(cls, vectors: Tensor, *, name: str = "tensor", **labels: Any) -> Self:
        """A dataset over a matrix [rows, d] in memory, with label columns if given."""
        columns = {k: np.asarray(v) for k, v in labels.items()}
        return cls([TensorSource(vectors, name, columns)], config=name, split="train", path=name)

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        kind = str(self.stored_dtype).removeprefix("torch.")
        return f"ActivationDataset({self.path!r}, {self.config!r}, {self.split!r}: {self.n_rows:,} x {self.d} {kind})"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the batches unless another is asked for: as stored, float32 for bfloat16 and scaled values."""
        return self.stored_dtype if self.scale == 1 and self.stored_dtype != torch.bfloat16 else torch.float32

    @property
    def stats(self) -> ActivationStats:
        """Mean, std, norms. Kept in the files of our format; computed by one pass for others."""
        if self._stats is None:
            running = ActivationStats(self.d)
            if all(s.stats is not None for s in self.sources):
                for source in self.sources:
                    running.merge(cast(ActivationStats, source.stats))
            else:
                known = ["position"] if "position" in self.label_names else []
                for at in range(0, self.n_rows, 8192):
                    rows = self.rows(at, 8192, columns=known, dtype=torch.float32)
                    running.see(rows.x, rows.labels.get("position", np.ones(len(rows.x))))
            self._stats = running
        return self._stats

    # -- reading -------------------------------------------------------------------------------------------------

    def _check_columns(self, columns: Sequence[str]) -> list[str]:
        if missing := [c for c in columns if c not in self.label_names]:
            have = ", ".join(self.label_names) or "none"
            raise DataError(f"{self.path} ({self.config}) has no column {missing[0]!r}", hint=f"columns here: {have}")
        return list(columns)

    def batches(
        self,
        batch_size: int = 8192,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype | None = None,
        drop_last: bool | None = None,
        window_bytes: int | None = None,
    ) -> Iterator[Tensor]:
        """One epoch of batches [batch_size, d].

        Between ranks rows are disjoint and every rank yields the same number of batches; that drops up to a
        batch per rank (with one rank nothing is dropped unless `drop_last`). After `load_state_dict`
        the first call continues behind the last batch that was yielded before.
        """
        return map(attrgetter("x"), pass_on(type(self).labelled_batches, locals(), columns=()))

    def labelled_batches(
        self,
        columns: Sequence[str],
        batch_size: int = 8192,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype | None = None,
        drop_last: bool | None = None,
        window_bytes: int | None = None,
    ) -> Iterator[Labelled]:
        """The batches of `batches` with the label columns asked for."""
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size} is less than 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is outside a world of {world_size}")
        names = self._check_columns(columns)
        dtype = dtype or self.dtype
        # the batch size has no part in it: the order, and a saved state, are the same for every batch size
        window_rows = max(1, (window_bytes or self.window_bytes) // (self.d * self.stored_dtype.itemsize))
        order = pass_on(plan_order, locals(), blocks=self.shards.units(window_rows))
        shape = {"seed": seed, "shuffle": shuffle, "rank": rank, "world_size": world_size, "n_rows": self.n_rows}
        shape["window_rows"] = window_rows
        window, offset = self._start(epoch, shape)
        drop = world_size > 1 if drop_last is None else drop_last
        seen = sum(n for w in order.windows[:window] for _, n in w) + offset
        rows_left = order.n_rows - seen
        if drop:
            rows_left = ((order.smallest if world_size > 1 else order.n_rows) - seen) // batch_size * batch_size
        return self._generate(order, batch_size, names, dtype, window, offset, rows_left, epoch, shape)

    def _start(self, epoch: int, shape: dict[str, Any]) -> tuple[int, int]:
        place, self._resume = self._resume, None
        if place is None:
            self._place = _Place(epoch, 0, 0, shape)
            return 0, 0
        wrong = [f"{k} {shape[k]!r} instead of {v!r}" for k, v in place.shape.items() if shape.get(k) != v]
        if place.epoch != epoch:
            wrong.insert(0, f"epoch {epoch} instead of {place.epoch}")
        if wrong:
            raise DataError(
                f"{self.path} ({self.config}): cannot continue where the saved state stood: {', '.join(wrong)}",
                hint="pass the same arguments as before, or do not load the state",
            )
        self._place = place
        return place.window, place.offset

    def _generate(
        self,
        order: Order,
        batch_size: int,
        names: list[str],
        dtype: torch.dtype,
        window: int,
        offset: int,
        rows_left: int,
        epoch: int,
        shape: dict[str, Any],
    ) -> Iterator[Labelled]:
        stored: Tensor | None = None
        parts: dict[str, list[np.ndarray]] = {n: [] for n in names}
        filled, goal = 0, min(batch_size, rows_left)
        for number, rows, pool, labels in self.shards.windows(order, window, names, self.prefetch):
            permutation = order.permutation(number)
            at = offset if number == window else 0
            while at < rows and rows_left > 0:
                if stored is None:
                    stored = self.shards.buffer(goal)
                take = min(goal - filled, rows - at)
                target = stored[filled : filled + take]
                if pool is None:
                    self.shards.read_units(order.windows[number], at, take, target)
                    chosen = np.arange(at, at + take)
                elif permutation is None:
                    chosen = np.arange(at, at + take)
                    target.copy_(pool[at : at + take])
                else:
                    chosen = permutation[at : at + take]
                    torch.index_select(pool, 0, torch.from_numpy(chosen), out=target)
                for name in names:
                    parts[name].append(labels[name][chosen])
                at, filled = at + take, filled + take
                if filled == goal:
                    rows_left -= goal
                    self._place = _Place(epoch, number, at, shape)
                    vectors = self.shards.deliver(stored, dtype)
                    stored = target = None  # the caller alone holds the memory while it works on the batch
                    yield Labelled(vectors, {n: np.concatenate(p) for n, p in parts.items()})
                    del vectors
                    parts = {n: [] for n in names}
                    filled, goal = 0, min(batch_size, rows_left)
            pool = target = None  # so that the next window is read into the same memory
        self._place = _Place(epoch + 1, 0, 0, shape)

    def read_all(self, max_rows: int | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """The first `max_rows` vectors (all by default) in storage order, as one tensor."""
        rows = self.n_rows if max_rows is None else min(max_rows, self.n_rows)
        out = torch.empty(rows, self.d, dtype=dtype or self.dtype)
        for first in range(0, rows, 8192):
            part = min(8192, rows - first)
            out[first : first + part] = self.shards.rows(first, part, out.dtype)
        return out

    def rows(
        self, first: int, count: int, *, columns: Sequence[str] = (), dtype: torch.dtype | None = None
    ) -> Labelled:
        """Rows `first` to `first + count` in storage order, with the label columns asked for."""
        names = self._check_columns(columns)
        count = max(0, min(count, self.n_rows - first))
        labels = self.shards.labels(names, [(first, count)])
        return Labelled(self.shards.rows(first, count, dtype or self.dtype), labels)

    def take(self, rows: Sequence[int] | np.ndarray, *, dtype: torch.dtype | None = None) -> Tensor:
        """The vectors of the given rows, in the given order."""
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.n_rows):
            raise DataError(f"{self.path} ({self.config}) has rows 0 to {self.n_rows - 1}, not all that were asked for")
        out = torch.empty(len(wanted), self.d, dtype=dtype or self.dtype)
        order = np.argsort(wanted, kind="stable")
        blocks = self.shards.blocks()
        edges = np.array([first for first, _ in blocks] + [self.n_rows])
        block = np.searchsorted(edges, wanted[order], side="right") - 1
        for number in np.unique(block):
            first, n = blocks[number]
            mine = order[block == number]
            stored = self.shards.buffer(n)
            self.shards.read(first, n, stored)
            out[torch.from_numpy(mine)] = self.shards.deliver(
                stored[torch.from_numpy(wanted[mine] - first)].contiguous(), out.dtype
            )
        return out

    def columns(self, names: Sequence[str] | str | None = None) -> dict[str, np.ndarray]:
        """Label columns of all rows in storage order; without names, all of them."""
        chosen = [names] if isinstance(names, str) else list(names if names is not None else self.label_names)
        return self.shards.labels(self._check_columns(chosen), [(0, self.n_rows)])

    # -- state, other forms --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the last `batches` stands: epoch, window, offset, and what the numbers refer to."""
        place = self._place or self._resume
        if place is None:
            return {}
        return {"epoch": place.epoch, "window": place.window, "offset": place.offset, **place.shape}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `batches` continue from `state`."""
        if not state:
            self._resume = None
            return
        shape = {k: v for k, v in state.items() if k not in ("epoch", "window", "offset")}
        self._resume = _Place(state["epoch"], state["window"], state["offset"], shape)

    def as_iterable(
        self, batch_size: int = 8192, *, columns: Sequence[str] | None = None, **options: Any
    ) -> ActivationIterable:
        """The batches as a `torch.utils.data.IterableDataset`; `DataLoader(it, batch_size=None)` takes it.

        With the label `columns` asked for, of which a `DataLoader` makes tensors. Worker processes share the rows
        between them; `set_epoch` changes the order.
        """
        batches = self.batches if columns is None else partial(self.labelled_batches, columns)
        return ActivationIterable(batches, batch_size, options)

    def verify(self) -> int:
        """Check header and checksum of every page; returns the number of pages checked."""
        return sum(source.check() for source in self.sources)


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
