"""Several configs of one dataset together: all of a folder as a harvest returns them, or two as input and target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.dataset import ActivationDataset
from hubsae.activations.layout import configs_in
from hubsae.core.errors import DataError


class ActivationSet(Mapping[str, ActivationDataset]):
    """The configs of a dataset folder, opened when asked for: `harvested["layers.6"]`."""

    def __init__(self, path: str | Path, configs: Sequence[str] | None = None):
        self.path = Path(path)
        self.configs = list(configs) if configs is not None else configs_in(self.path)

    def __getitem__(self, config: str) -> ActivationDataset:
        return self.open(config)

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    def __repr__(self) -> str:
        return f"ActivationSet({str(self.path)!r}, {self.configs})"

    def open(self, config: str, split: str = "train", **options: Any) -> ActivationDataset:
        """One config and split."""
        return ActivationDataset.open(self.path, config, split, **options)

    def pair(self, source: str, target: str, split: str = "train") -> PairedActivations:
        """Two configs as input and target: `harvested.pair("layers.3.mlp_in", "layers.3.mlp_out")`."""
        return PairedActivations(self.open(source, split), self.open(target, split))

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish the folder."""
        return cast(Any, self[self.configs[0]]).push_to_hub(repo_id, **options)


class Batch(NamedTuple):
    """Rows of one hook point, or of two: what is read, its labels, and what is to be predicted from it."""

    x: Tensor
    """[rows, d]"""
    labels: Mapping[str, np.ndarray]
    """[rows] each"""
    target: Tensor | None = None
    """[rows, d_out]; None for activations of one hook point"""

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def expected(self) -> Tensor:
        """What an SAE is to give back: the target, or the rows themselves."""
        return self.x if self.target is None else self.target

    def part(self, rows: slice | Tensor) -> Batch:
        """Some of the rows."""
        places = rows if isinstance(rows, slice) else rows.cpu().numpy()
        labels = {name: value[places] for name, value in self.labels.items()}
        return Batch(self.x[rows], labels, None if self.target is None else self.target[rows])

    def mapped(self, x: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor] | None = None) -> Batch:
        """The rows with a function on them; the same on the target where there is no other for it."""
        return Batch(x(self.x), self.labels, None if self.target is None else (target or x)(self.target))

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """Rows one behind another."""
        labels = {name: np.concatenate([part.labels[name] for part in parts]) for name in parts[0].labels}
        targets = [part.target for part in parts if part.target is not None]
        return Batch(torch.cat([part.x for part in parts]), labels, torch.cat(targets) if targets else None)


class PairedActivations:
    """Two hook points of the same tokens, such as an MLP's input and output: what a transcoder is trained on.

    >>> x = torch.arange(12.0).reshape(6, 2)
    >>> one, other = ActivationDataset.from_tensor(x), ActivationDataset.from_tensor(2 * x)
    >>> batch = next(PairedActivations(one, other).batches(4))
    >>> bool((batch.target == 2 * batch.x).all())
    True
    """

    def __init__(self, source: ActivationDataset, target: ActivationDataset):
        """`source` is what is read, `target` what is to be predicted: the same tokens at another hook point."""
        self.source, self.target = source, target
        labels = [n for n in ("sample_id", "position") if n in source.label_names and n in target.label_names]
        same = len(source) == len(target) and all(
            np.array_equal(source.columns(name)[name], target.columns(name)[name]) for name in labels
        )
        if not same:
            raise DataError(
                f"{source.config} and {target.config} do not hold the same tokens in the same order",
                hint="harvest both hook points in one run: harvest(model, data, ['3.mlp_in', '3.mlp_out'], ...)",
            )
        self.d, self.d_out, self.n_rows = source.d, target.d, source.n_rows
        self.label_names, self.info, self.split = source.label_names, source.info, source.split
        self.path, self.config = source.path, f"{source.config} -> {target.config}"

    @classmethod
    def from_tensors(cls, x: Tensor, target: Tensor, **labels: Any) -> PairedActivations:
        """Pairs of rows in memory, with label columns if given."""
        one = ActivationDataset.from_tensor(x, name="input", **labels)
        return cls(one, ActivationDataset.from_tensor(target, name="target"))

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        return f"PairedActivations({self.source!r} -> {self.target!r})"

    def batches(
        self,
        batch_size: int = 8192,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        columns: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        drop_last: bool | None = None,
        window_bytes: int | None = None,
    ) -> Iterator[Batch]:
        """One epoch of batches with the labels asked for, rows in step."""
        row, other = (data.d * data.stored_dtype.itemsize for data in (self.source, self.target))
        # windows of as many rows on both sides, so that both are permuted alike
        window_rows = max(1, (window_bytes or self.source.window_bytes) // row)
        options: dict[str, Any] = {
            "shuffle": shuffle, "seed": seed, "epoch": epoch, "rank": rank, "world_size": world_size,
            "drop_last": drop_last,
        }  # fmt: skip
        left = self.source.labelled_batches(columns, batch_size, dtype=dtype, window_bytes=window_rows * row, **options)
        right = self.target.batches(batch_size, dtype=dtype, window_bytes=window_rows * other, **options)
        for (x, labels), target in zip(left, right, strict=True):
            yield Batch(x, labels, target)

    def labelled_batches(self, columns: Sequence[str], batch_size: int = 8192, **options: Any) -> Iterator[Batch]:
        """As `batches`, called as other data are."""
        return self.batches(batch_size, columns=columns, **options)

    def rows(self, first: int, count: int, *, columns: Sequence[str] = ()) -> Batch:
        """Consecutive rows of both, with the labels asked for."""
        return Batch(*self.source.rows(first, count, columns=columns), self.target.rows(first, count).x)

    def take(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows of both, without labels."""
        return Batch(self.source.take(rows), {}, self.target.take(rows))

    def columns(self, names: Sequence[str] | str | None = None) -> dict[str, np.ndarray]:
        """Label columns."""
        return self.source.columns(names)

    def state_dict(self) -> dict[str, Any]:
        """Where the last `batches` stands."""
        return {"source": self.source.state_dict(), "target": self.target.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `batches` continue from `state`."""
        self.source.load_state_dict(state.get("source", {}))
        self.target.load_state_dict(state.get("target", {}))
