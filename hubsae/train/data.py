"""Where batches come from: a matrix in memory, or anything that yields batches and can say where it stands.

A source has `d`, `n_rows`, `batches(batch_size, *, seed, epoch, rank, world_size)` and `state_dict` /
`load_state_dict`; one with labels has `label_names` and `labelled_batches(columns, batch_size, ...)` too.
`hubsae.activations.ActivationDataset` is one. A plain tensor [rows, d] becomes a `TensorSource`. One that has `d_out`
gives pairs (`hubsae.activations.PairedActivations`): a transcoder is trained on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hubsae.activations.activation_set import Batch
from hubsae.core.errors import ConfigError, DataError
from hubsae.core.normalizer import Normalizer
from hubsae.core.scopes import NORM, Scope, excluding
from hubsae.train.config import TrainConfig

MASSIVE = 10.0
"""`exclude: massive` leaves out tokens whose norm is above this many times the median, unless max_norm_factor says."""


class Source(Protocol):
    """What a trainer needs of its data."""

    d: int
    n_rows: int

    def batches(
        self, batch_size: int, *, seed: int = 0, epoch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Any]:
        """One epoch of batches [batch_size, d] of this rank, in an order that seed and epoch decide."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the last `batches` stands."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next `batches` continues there."""
        ...


class TensorSource:
    """A matrix in memory. Ranks take consecutive parts of one global batch, so their number changes nothing.

    >>> source = TensorSource(torch.arange(8.0).reshape(4, 2))
    >>> [b.shape for b in source.batches(2)]
    [torch.Size([2, 2]), torch.Size([2, 2])]
    """

    def __init__(self, rows: Tensor):
        if rows.ndim != 2:
            raise DataError(
                f"activations must be a matrix [tokens, d], found shape {tuple(rows.shape)}",
                hint="flatten batch and sequence: x.reshape(-1, x.shape[-1])",
            )
        self.rows = rows
        self.n_rows, self.d = rows.shape
        self._next = 0
        self._epoch = 0

    def __len__(self) -> int:
        return self.n_rows

    def batches(
        self, batch_size: int, *, seed: int = 0, epoch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Tensor]:
        """One epoch in a random order; a last short batch is left out."""
        start, self._next, self._epoch = (self._next if epoch == self._epoch else 0), 0, epoch
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 62))
        order = torch.randperm(self.n_rows, generator=generator)
        whole = batch_size * world_size
        for number in range(start, self.n_rows // whole):
            low = number * whole + rank * batch_size
            x = self.rows[order[low : low + batch_size].to(self.rows.device)]
            self._next = number + 1
            yield x
        self._next, self._epoch = 0, epoch + 1

    def take(self, rows: Tensor) -> Tensor:
        """The given rows."""
        return self.rows[torch.as_tensor(rows).to(self.rows.device)]

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batch."""
        return {"epoch": self._epoch, "batch": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there."""
        self._epoch, self._next = int(state["epoch"]), int(state["batch"])


def as_source(activations: Any) -> Source:
    """A tensor or array as a source; a source as it is."""
    if isinstance(activations, Tensor):
        return TensorSource(activations)
    if hasattr(activations, "batches") and hasattr(activations, "d"):
        return cast(Source, activations)
    if hasattr(activations, "__array__"):
        return TensorSource(torch.as_tensor(activations))
    raise DataError(
        f"cannot train on {type(activations).__name__}",
        hint="pass a tensor [tokens, d], or hubsae.activations.ActivationDataset.open(...)",
    )


def split(source: Source, val: Any, fraction: float) -> tuple[Source, Source | None]:
    """Training and validation source; the tail of a matrix where a fraction is asked for and no `val` is given."""
    if val is not None:
        return source, as_source(val)
    if not fraction:
        return source, None
    if not isinstance(source, TensorSource):
        raise ConfigError(
            "val_fraction cuts the tail of an in-memory tensor; this source is read from files",
            hint="pass its validation split: train(..., val=ActivationDataset.open(..., split='validation'))",
        )
    held = max(1, int(source.n_rows * fraction))
    return TensorSource(source.rows[:-held]), TensorSource(source.rows[-held:])


@dataclass(frozen=True)
class TokenSelection:
    """Which tokens take part in training: all but the groups of `exclude` and those of a norm above `massive_above`."""

    exclude: tuple[str, ...] = ()
    massive_above: float | None = None

    @staticmethod
    def of(config: TrainConfig, massive_above: float | None) -> TokenSelection:
        """What a config leaves out, with the bound that was found for `massive`."""
        groups = dict.fromkeys((*config.exclude, *(("massive",) if config.max_norm_factor is not None else ())))
        return TokenSelection(tuple(groups), massive_above)

    @cached_property
    def scope(self) -> Scope:
        """The tokens that are left."""
        return excluding(self.exclude, self.massive_above)

    @property
    def columns(self) -> list[str]:
        """Label columns to read for it."""
        return [column for column in self.scope.columns if column != NORM]

    def batches(self, source: Source, size: int, **options: Any) -> Iterator[Batch]:
        """Batches of a source with the labels it needs, nothing left out yet."""
        if self.columns:
            return (Batch(*found) for found in cast(Any, source).labelled_batches(self.columns, size, **options))
        return (x if isinstance(x, Batch) else Batch(x, {}) for x in source.batches(size, **options))

    def kept(self, batch: Batch) -> Batch:
        """The rows of a batch that take part."""
        scope = self.scope
        if not scope.terms:
            return batch
        labels = dict(batch.labels)
        if NORM in scope.columns:
            labels[NORM] = batch.x.float().norm(dim=1).cpu().numpy()
        chosen = torch.from_numpy(scope.mask(labels, len(batch))).to(batch.x.device)
        return batch if bool(chosen.all()) else batch.part(chosen)


def select_tokens(config: TrainConfig, source: Source) -> TokenSelection:
    """What a config leaves out of a source; the bound for massive tokens is a multiple of the median norm."""
    selection = TokenSelection.of(config, None)
    if "massive" not in selection.exclude:
        return selection
    median = float(sample(source, 65_536, 0).x.norm(dim=1).median())
    return TokenSelection(selection.exclude, (config.max_norm_factor or MASSIVE) * median)


def sample(source: Source, rows: int, seed: int, selection: TokenSelection | None = None) -> Batch:
    """Random rows in float32, the same for the same seed; all rows where there are no more.

    With a selection, those of them that take part.
    """
    selection = selection or TokenSelection()
    rows = min(rows, source.n_rows)
    if (reserve := getattr(source, "reserve", None)) is not None:
        places = torch.randperm(len(reserve), generator=torch.Generator().manual_seed(seed))[:rows]
        return selection.kept(reserve.part(places).mapped(Tensor.float))
    take = getattr(source, "take", None)
    if take is None:
        return head(source, rows, seed, selection)
    generator = torch.Generator().manual_seed(seed)
    if rows == source.n_rows:
        chosen = torch.arange(rows)
    elif source.n_rows <= 1 << 24:
        chosen = torch.randperm(source.n_rows, generator=generator)[:rows]
    else:
        # with replacement beyond a million rows: no permutation of the whole data set for a small sample
        chosen = torch.randint(source.n_rows, (rows,), generator=generator)
    found = take(chosen if isinstance(source, TensorSource) else chosen.numpy())
    found = found if isinstance(found, Batch) else Batch(found, {})
    labels = {}
    if selection.columns:
        columns = cast(Any, source).columns(selection.columns)
        labels = {name: column[chosen.numpy()] for name, column in columns.items()}
    return selection.kept(Batch(found.x, labels, found.target).mapped(Tensor.float))


def head(source: Source, rows: int, seed: int, selection: TokenSelection) -> Batch:
    """The first rows of an epoch, without moving the source's place."""
    state = source.state_dict()
    parts: list[Batch] = []
    have = 0
    for batch in selection.batches(source, min(rows, 8192), seed=seed, epoch=0):
        parts.append(selection.kept(batch).part(slice(rows - have)).mapped(Tensor.float))
        have += len(parts[-1])
        if have >= rows:
            break
    if state:
        source.load_state_dict(state)
    if not parts:
        raise DataError("the source gave no batch")
    return Batch.joined(parts)


def spaces(config: TrainConfig, source: Any, selection: TokenSelection) -> tuple[Normalizer | None, Normalizer | None]:
    """Statistics of the space the config asks for, and of pairs that of what is predicted.

    Over the tokens that take part (at most 2^20), or as the source knows them of all.
    """
    if config.normalize == "none":
        return None, None
    if not selection.exclude and (stats := getattr(source, "stats", None)) is not None:
        return normalizer(config, stats.mean.double(), stats.std.double(), stats.mean_norm, stats.count), None
    rows = sample(source, 1 << 20, 0, selection)
    return _of_rows(config, rows.x), None if rows.target is None else _of_rows(config, rows.target)


def _of_rows(config: TrainConfig, x: Tensor) -> Normalizer:
    check_finite(x, "the activations")
    d = x.shape[1]
    total, squares, norms = torch.zeros(d).double(), torch.zeros(d).double(), 0.0
    for part in x.split(8192):
        total += part.double().sum(0)
        norms += float(part.norm(dim=1).double().sum())
    mean = total / x.shape[0]
    for part in x.split(8192):
        squares += (part.double() - mean).square().sum(0)
    return normalizer(config, mean, (squares / x.shape[0]).sqrt(), norms / x.shape[0], x.shape[0])


def normalizer(config: TrainConfig, mean: Tensor, std: Tensor, mean_norm: float, count: int) -> Normalizer:
    """The normaliser that a config asks for, from what is known of the activations."""
    d = len(mean)
    if config.normalize == "mean_std":
        std = torch.where(std > 0, std, 1.0)
    elif config.normalize == "center_scalar":
        std = std.square().mean().sqrt().clamp_min(1e-12).expand(d).clone()
    else:
        mean, std = torch.zeros_like(mean), torch.full_like(std, mean_norm / d**0.5)
    return Normalizer(mean.float(), std.float(), count)


def check_finite(x: Tensor, what: str) -> None:
    """Raise where rows hold NaN or infinity."""
    bad = (~torch.isfinite(x)).any(1)
    if bool(bad.any()):
        raise DataError(
            f"{what} hold NaN or infinity in {int(bad.sum())} of {x.shape[0]} rows looked at "
            f"(first: row {int(bad.nonzero()[0])} of them)",
            hint="harvest again in float32 or bfloat16, or filter with x[torch.isfinite(x).all(1)]",
        )
