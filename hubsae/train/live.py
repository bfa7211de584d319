"""Live training: activations go from the model to the trainer through a mixing buffer; none are kept on disk.

    texts -> harvested batches -> chunks -> buffer -> mixed rows -> training batches of every layer

Mixing `even`: a chunk is a quarter of the buffer; a row waits between zero and three chunks, by a draw of its own, and
what leaves with a chunk is shuffled: neighbours of one text end up in different batches. Mixing `half`: a chunk is half
the buffer, and whatever is in it leaves with the next chunk with probability one half, as if the buffer were shuffled,
half of it given out and refilled; no row stays for more than eight chunks. What leaves with chunk r depends on the
chunks r - 3 (r - 7) to r alone, so a run that goes on harvests those again, from the place in the texts where the first
of them began, and continues to the bit. All layers see the same tokens in the same order, from one pass of the model;
so do the two hook points of a pair, from which a transcoder is trained. When the texts end they begin again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.activation_set import Batch, PairedActivations
from hubsae.activations.dataset import ActivationDataset
from hubsae.activations.stream import HarvestBatch, Place, Stream
from hubsae.core.errors import ConfigError, DataError

Mixing = Literal["even", "half"]
CHUNKS: dict[Mixing, tuple[int, int]] = {"even": (4, 4), "half": (2, 8)}
"""Chunks that make up the buffer, and those whose rows may be in it."""


class Mark(NamedTuple):
    """A place in the texts: how often they were read through before, and where in them."""

    times: int = 0
    window: int = 0
    batch: int = 0


class Chunk(NamedTuple):
    """Rows as they were harvested."""

    vectors: dict[str, Tensor]
    """[rows, d] by hook point."""
    labels: dict[str, np.ndarray]
    begin: Mark
    end: Mark

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(next(iter(self.labels.values())))

    def take(self, places: np.ndarray) -> Chunk:
        """Some of its rows."""
        chosen = torch.from_numpy(places)
        vectors = {name: x[chosen] for name, x in self.vectors.items()}
        return self._replace(vectors=vectors, labels={name: v[places] for name, v in self.labels.items()})


class LiveActivations:
    """What a model makes of texts, as training data for one SAE per hook point: `live["layers.8"]` is a source.

    With `targets` (hook points by the one that they are predicted from, `{"layers.8.mlp_in": "layers.8.mlp_out"}`) the
    source of the first gives pairs, as `PairedActivations` does; both are hook points of the stream.

    `texts` gives the texts from their beginning each time it is called. The first `val_rows` tokens are kept for
    validation and never trained on; statistics, starts, thresholds and new starts of dead latents look at the first
    `buffer_rows` tokens behind them.
    """

    def __init__(
        self,
        stream: Stream,
        texts: Callable[[], Iterable[Any]],
        *,
        tokens: int,
        buffer_rows: int = 65_536,
        mixing: Mixing = "even",
        val_rows: int = 8_192,
        seed: int = 0,
        info: Mapping[str, Any] | None = None,
        targets: Mapping[str, str] | None = None,
    ):
        self.stream, self.texts, self.tokens, self.seed = stream, texts, tokens, seed
        self.mixing: Mixing = mixing
        parts, self.span = CHUNKS[mixing]
        self.chunk_rows = max(1, buffer_rows // parts)
        self.names, targets = [hook.name for hook in stream.hooks], dict(targets or {})
        if missing := [name for pair in targets.items() for name in pair if name not in self.names]:
            raise ConfigError(f"{missing[0]} is of a pair and no hook point of the stream: {', '.join(self.names)}")
        self.begin, self.validation = Mark(), None
        if val_rows:
            self.validation = next(self._chunks(self.begin, val_rows))
            self.begin = self.validation.end
        self.reserve = next(self._chunks(self.begin, buffer_rows))
        every = {hook.name: LiveLayer(self, hook.name, dict(info or {})) for hook in stream.hooks}
        for hook in stream.hooks:
            where = {"layer": hook.layer, "kind": hook.kind, "transformer_lens": hook.transformer_lens}
            every[hook.name].info |= {"hook_point": hook.module_path(stream.model), **where}
        predicted = set(targets.values()) - set(targets)
        self.layers = {name: layer for name, layer in every.items() if name not in predicted}
        for name, target in targets.items():
            self.layers[name].predicts(every[target])
        self._held: deque[tuple[Chunk, dict[str, Any]]] = deque()
        self._first = 0
        self._mixed: Iterator[tuple[Chunk, dict[str, Any]]] | None = None
        self.batch_rows: int | None = None

    def __getitem__(self, name: str) -> LiveLayer:
        return self.layers[name]

    # ---- harvested, mixed, cut ----------------------------------------------------------------------------

    def _batches(self, start: Mark) -> Iterator[tuple[HarvestBatch, Mark]]:
        """Harvested batches with a token in them, from a place on, through the texts again and again."""
        times, place, first = start.times, Place(*start[1:]), Place(*self.begin[1:])
        while True:
            found = 0
            for batch in self.stream.batches(self.texts(), start=place):
                if batch.vectors:
                    found += 1
                    yield batch, Mark(times, *batch.place)
            if not found and place == first:
                raise DataError("the texts hold no token to train on", hint="see --mode, --select and the columns")
            times, place = times + 1, first

    def _chunks(self, start: Mark, rows: int) -> Iterator[Chunk]:
        """Harvested batches joined until they have `rows` rows."""
        parts: list[HarvestBatch] = []
        have, begin = 0, start
        for batch, end in self._batches(start):
            parts.append(batch)
            have += len(next(iter(batch.labels.values())))
            if have >= rows:
                vectors = {name: torch.cat([p.vectors[name] for p in parts]) for name in self.names}
                labels = {name: np.concatenate([p.labels[name] for p in parts]) for name in parts[0].labels}
                yield Chunk(vectors, labels, begin, end)
                parts, have, begin = [], 0, end

    def _rounds(self, number: int, start: Mark) -> Iterator[tuple[int, Mark, Chunk]]:
        """What leaves with each chunk from `number` on; `start` is where the first chunk it depends on begins."""
        held: deque[tuple[int, Chunk, np.ndarray]] = deque(maxlen=self.span)
        for index, chunk in enumerate(self._chunks(start, self.chunk_rows), number - self.span + 1):
            held.append((index, chunk, self._waits(index, chunk.rows)))
            if index < number:
                continue
            if index == self.span - 1:  # the buffer is full for the first time: what would have left before goes now
                leaving = [c.take(np.flatnonzero(waits <= index - i)) for i, c, waits in held]
            else:
                leaving = [c.take(np.flatnonzero(waits == index - i)) for i, c, waits in held]
            whole = _joined(leaving)
            yield index, held[0][1].begin, whole.take(self._generator(index, 1).permutation(whole.rows))
            for place, (i, chunk_, waits) in enumerate(held):
                stay = np.flatnonzero(waits > index - i)
                held[place] = i, chunk_.take(stay), waits[stay]

    def _waits(self, index: int, rows: int) -> np.ndarray:
        """With how many later chunks each row of a chunk leaves [rows]."""
        draw = self._generator(index, 0)
        if self.mixing == "half":
            return np.minimum(draw.geometric(0.5, rows) - 1, self.span - 1)
        return draw.integers(0, self.span, rows)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def _cut(self, batch: int, state: Mapping[str, Any] | None) -> Iterator[tuple[Chunk, dict[str, Any]]]:
        """Mixed rows in batches, each with the state behind it."""
        number, start, skip = self.span - 1, self.begin, 0
        if state is not None:
            number, start, skip = int(state["round"]), Mark(*state["begin"]), int(state["offset"])
        done, rest = 0 if state is None else int(state["batch"]), None
        for index, begin, rows in self._rounds(number, start):
            offset = skip
            if rest is not None:
                rows, offset = _joined([rest, rows]), 0
            before = 0 if rest is None else rest.rows
            while rows.rows - offset >= batch:
                done += 1
                part = rows.take(np.arange(offset, offset + batch))
                offset += batch
                yield part, {"batch": done, "round": index, "begin": list(begin), "offset": offset - before}
            rest, skip = rows.take(np.arange(offset, rows.rows)), 0

    def batch(self, number: int, rows: int) -> tuple[Chunk, dict[str, Any]]:
        """Training batch `number` (from 0) of `rows` rows of every layer, and the state behind it."""
        if self.batch_rows not in (None, rows):
            raise ConfigError(f"one live source gives batches of one size, not of {self.batch_rows} and {rows}")
        self.batch_rows = rows
        if self._mixed is None or number < self._first:
            # begin at the place of whoever is furthest behind
            states = [layer.state for layer in self.layers.values() if layer.started]
            behind = min(states, key=lambda s: -1 if s is None else s["batch"])
            self._mixed = self._cut(rows, behind)
            self._held.clear()
            self._first = 0 if behind is None else int(behind["batch"])
        while number >= self._first + len(self._held):
            self._held.append(next(self._mixed))
        found = self._held[number - self._first]
        needed = min(layer.next for layer in self.layers.values() if layer.started)
        while self._first < needed and self._held:
            self._held.popleft()
            self._first += 1
        return found


class LiveLayer:
    """One hook point of live activations, as a trainer reads it, or two, of which one is predicted from the other."""

    def __init__(self, live: LiveActivations, name: str, info: dict[str, Any]):
        self.live, self.name, self.path, self.info = live, name, str(info.get("dataset", "texts")), info
        self.config, self.target, self.d_out = name, None, None
        self.d, self.n_rows = live.reserve.vectors[name].shape[1], live.tokens
        self.label_names = tuple(live.reserve.labels)
        self.state: dict[str, Any] | None = None
        self.next, self.started = 0, False

    def predicts(self, target: LiveLayer) -> None:
        """Give pairs from now on, with the rows of `target` as what is to be predicted."""
        self.target, self.d_out, self.config = target, target.d, f"{self.name} -> {target.name}"

    def _rows(self, chunk: Chunk, columns: Iterable[str]) -> Batch:
        """The rows of this hook point, with those that are predicted."""
        target = None if self.target is None else chunk.vectors[self.target.name]
        return Batch(chunk.vectors[self.name], {name: chunk.labels[name] for name in columns}, target)

    @property
    def reserve(self) -> Batch:
        """Rows that stand for all of them, for statistics and starts."""
        return self._rows(self.live.reserve, self.label_names)

    @property
    def validation(self) -> ActivationDataset | PairedActivations | None:
        """The rows held out."""
        if self.live.validation is None:
            return None
        x, labels, target = self._rows(self.live.validation, self.label_names)
        if target is not None:
            return PairedActivations.from_tensors(x, target, **labels)
        return ActivationDataset.from_tensor(x, name="tensor", **labels)

    def batches(
        self, batch_size: int, *, seed: int = 0, epoch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Tensor | Batch]:
        """The batches of this rank, of a pair with its target; every rank harvests all rows and takes its part."""
        found = self.labelled_batches((), batch_size, rank=rank, world_size=world_size)
        return found if self.target is not None else map(attrgetter("x"), found)

    def labelled_batches(
        self,
        columns: Iterable[str],
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """The batches with the label columns asked for."""
        self.started = True
        if self.state is not None and (int(self.state["batch"]) + 1) * batch_size * world_size > self.n_rows:
            self.state = None  # another run over the same texts
        self.next = 0 if self.state is None else int(self.state["batch"])
        names = list(columns)
        while (self.next + 1) * batch_size * world_size <= self.n_rows:
            rows, self.state = self.live.batch(self.next, batch_size * world_size)
            self.next += 1
            yield self._rows(rows, names).part(slice(rank * batch_size, (rank + 1) * batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Where the last batch ended."""
        return dict(self.state or {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next batches come from there."""
        self.state = dict(state) or None
        self.started = True
        self.next = 0 if self.state is None else int(self.state["batch"])


def _joined(chunks: list[Chunk]) -> Chunk:
    vectors = {name: torch.cat([c.vectors[name] for c in chunks]) for name in chunks[0].vectors}
    labels = {name: np.concatenate([c.labels[name] for c in chunks]) for name in chunks[0].labels}
    return chunks[-1]._replace(vectors=vectors, labels=labels)
