"""Where batches come from: a matrix in memory, or anything that yields batches and can say where it stands.

A source has `d`, `n_rows`, `batches(batch_size, *, seed, epoch, rank, world_size)` and `state_dict` /
`load_state_dict`; `hubsae.activations.ActivationDataset` is one. A plain tensor [rows, d] becomes a `TensorSource`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from hubsae.core.errors import ConfigError, DataError
from hubsae.core.normalizer import Normalizer
from hubsae.train.config import TrainConfig


@runtime_checkable
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


def every_row(source: Source, size: int) -> Iterator[Tensor]:
    """All rows once, short last batch included; for validation."""
    if isinstance(source, TensorSource):
        yield from source.rows.split(size)
    else:
        yield from source.batches(size, seed=0, epoch=0)


def sample(source: Source, rows: int, seed: int) -> Tensor:
    """Random rows in float32, the same for the same seed; all rows where there are no more."""
    rows = min(rows, source.n_rows)
    generator = torch.Generator().manual_seed(seed)
    take = getattr(source, "take", None)
    if take is None:
        return head(source, rows, seed)
    if rows == source.n_rows:
        chosen = torch.arange(rows)
    else:
        # with replacement beyond a million rows: no permutation of the whole data set for a small sample
        small = source.n_rows <= 1 << 24
        chosen = torch.randperm(source.n_rows, generator=generator)[:rows] if small else None
        if chosen is None:
            chosen = torch.randint(source.n_rows, (rows,), generator=generator)
    return take(chosen if isinstance(source, TensorSource) else chosen.numpy()).float()


def head(source: Source, rows: int, seed: int) -> Tensor:
    """The first rows of an epoch, without moving the source's place."""
    state = source.state_dict()
    parts, have = [], 0
    stream = source.batches(min(rows, 8192), seed=seed, epoch=0)
    for batch in stream:
        parts.append(batch[: rows - have].float())
        have += parts[-1].shape[0]
        if have >= rows:
            break
    if state:
        source.load_state_dict(state)
    if not parts:
        raise DataError("the source gave no batch")
    return torch.cat(parts)


def normalizer(config: TrainConfig, source: Source) -> Normalizer | None:
    """Statistics of the input space the config asks for, over the training data (at most 2^20 rows of it)."""
    if config.normalize == "none":
        return None
    stats = getattr(source, "stats", None)
    if stats is not None and hasattr(stats, "mean") and hasattr(stats, "std"):
        mean = torch.as_tensor(stats.mean, dtype=torch.float64)
        std = torch.as_tensor(stats.std, dtype=torch.float64)
        count = int(getattr(stats, "count", source.n_rows))
        second = float((std.square() + mean.square()).sum())
        mean_norm = float(getattr(stats, "mean_norm", second**0.5))
    else:
        x = sample(source, 1 << 20, 0)
        _check_finite(x, "the activations")
        total, squares, norms = torch.zeros(source.d).double(), torch.zeros(source.d).double(), 0.0
        for part in x.split(8192):
            total += part.double().sum(0)
            norms += float(part.norm(dim=1).double().sum())
        mean = total / x.shape[0]
        for part in x.split(8192):
            squares += (part.double() - mean).square().sum(0)
        std = (squares / x.shape[0]).sqrt()
        mean_norm, count = norms / x.shape[0], x.shape[0]
    if config.normalize == "mean_std":
        std = torch.where(std > 0, std, 1.0)
    elif config.normalize == "center_scalar":
        std = std.square().mean().sqrt().clamp_min(1e-12).expand(source.d).clone()
    else:
        mean, std = torch.zeros_like(mean), torch.full_like(std, mean_norm / source.d**0.5)
    return Normalizer(mean.float(), std.float(), count)


def norm_limit(config: TrainConfig, source: Source) -> float | None:
    """Largest token norm that takes part in training."""
    if config.max_norm_factor is None:
        return None
    x = sample(source, 65_536, 0)
    return config.max_norm_factor * float(x.norm(dim=1).median())


def _check_finite(x: Tensor, what: str) -> None:
    bad = (~torch.isfinite(x)).any(1)
    if bool(bad.any()):
        raise DataError(
            f"{what} hold NaN or infinity in {int(bad.sum())} of {x.shape[0]} rows looked at "
            f"(first: row {int(bad.nonzero()[0])} of them)",
            hint="harvest again in float32 or bfloat16, or filter with x[torch.isfinite(x).all(1)]",
        )
