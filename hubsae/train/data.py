"""Where batches come from: a matrix in memory, or anything that yields batches and can say where it stands.

A source has `d`, `n_rows`, `batches(batch_size, *, seed, epoch, rank, world_size)` and `state_dict` /
`load_state_dict`, and `take(rows)`, or rows that stand for all as `reserve`, for statistics and starts; one with labels
has `label_names` and `labelled_batches(columns, batch_size, ...)` too.
`hubsae.activations.ActivationDataset` is one. A plain tensor [rows, d] becomes a `TensorSource`. One that has `d_out`
gives pairs (`hubsae.activations.PairedActivations`): a transcoder is trained on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hubsae.activations.activation_set import Batch
from hubsae.activations.stats import ActivationStats
from hubsae.core.errors import ConfigError, DataError
from hubsae.core.normalizer import Normalizer
from hubsae.core.scopes import ALL, NORM, Scope, excluding
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
    if all(hasattr(activations, name) for name in ("d", "n_rows", "batches", "state_dict", "load_state_dict")) and (
        hasattr(activations, "take") or hasattr(activations, "reserve")
    ):
        return cast(Source, activations)
    if hasattr(activations, "__array__"):
        return TensorSource(torch.as_tensor(activations))
    raise DataError(
        f"cannot train on {type(activations).__name__}",
        hint="pass a tensor [tokens, d], hubsae.activations.ActivationDataset.open(...), or what has d, n_rows, "
        "batches, state_dict, load_state_dict and take",
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


def columns_of(scope: Scope) -> list[str]:
    """Label columns to read for a scope."""
    return [column for column in scope.columns if column != NORM]


def batches(source: Source, scope: Scope, size: int, **options: Any) -> Iterator[Batch]:
    """Batches of a source with the labels that a scope needs, nothing left out yet."""
    if columns := columns_of(scope):
        return (Batch(*found) for found in cast(Any, source).labelled_batches(columns, size, **options))
    return (x if isinstance(x, Batch) else Batch(x, {}) for x in source.batches(size, **options))


def kept(batch: Batch, scope: Scope) -> Batch:
    """The rows of a batch that take part."""
    if not scope.terms:
        return batch
    labels = dict(batch.labels)
    if NORM in scope.columns:
        labels[NORM] = batch.x.float().norm(dim=1).cpu().numpy()
    chosen = torch.from_numpy(scope.mask(labels, len(batch))).to(batch.x.device)
    return batch if bool(chosen.all()) else batch.part(chosen)


def scope_of(config: TrainConfig, source: Source) -> Scope:
    """The tokens that take part; the bound for massive ones is a multiple of the median norm."""
    if "massive" not in config.excluded:
        return excluding(config.excluded)
    median = float(sample(source, 65_536, 0).x.norm(dim=1).median())
    return excluding(config.excluded, (config.max_norm_factor or MASSIVE) * median)


def sample(source: Source, rows: int, seed: int, scope: Scope = ALL) -> Batch:
    """Random rows in float32, the same for the same seed; all rows where there are no more.

    Of these the ones in the scope.
    """
    rows = min(rows, source.n_rows)
    if (reserve := getattr(source, "reserve", None)) is not None:
        places = torch.randperm(len(reserve), generator=torch.Generator().manual_seed(seed))[:rows]
        return kept(reserve.part(places).mapped(Tensor.float), scope)
    generator = torch.Generator().manual_seed(seed)
    if rows == source.n_rows:
        chosen = torch.arange(rows)
    elif source.n_rows <= 1 << 24:
        chosen = torch.randperm(source.n_rows, generator=generator)[:rows]
    else:
        # with replacement beyond a million rows: no permutation of the whole data set for a small sample
        chosen = torch.randint(source.n_rows, (rows,), generator=generator)
    found = cast(Any, source).take(chosen.numpy())
    found = found if isinstance(found, Batch) else Batch(found, {})
    labels = {}
    if columns := columns_of(scope):
        labels = {name: column[chosen.numpy()] for name, column in cast(Any, source).columns(columns).items()}
    return kept(Batch(found.x, labels, found.target).mapped(Tensor.float), scope)


def spaces(config: TrainConfig, source: Any, scope: Scope) -> tuple[Normalizer | None, Normalizer | None]:
    """Statistics of the space the config asks for, and of pairs that of what is predicted.

    Over the tokens that take part (at most 2^20), or as the source knows them of all.
    """
    if config.normalize == "none":
        return None, None
    stats = getattr(source, "stats", None)
    if not scope.terms and isinstance(stats, ActivationStats):
        return normalizer(config, stats.mean.double(), stats.std.double(), stats.mean_norm, stats.count), None
    rows = sample(source, 1 << 20, 0, scope)
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
