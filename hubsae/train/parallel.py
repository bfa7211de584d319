"""What ranks tell each other during a step. `Solo` is one process: every method is the identity.

Two ways to split the work under torchrun, both with the loss curve of one process at the same global batch:

- `DataParallel`: each rank takes its share of the rows; gradients are summed, and only the rows of latents that
  fired anywhere travel. Batch-wide selection uses one threshold over all ranks.
- `LatentParallel`: each rank holds a share of the latents and sees every row; the k best of each row are merged from
  the ranks' candidates, and the partial reconstructions are summed. Weights and optimiser state never travel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hubsae.core.errors import ConfigError
from hubsae.train.config import TrainConfig


class Solo:
    """One process."""

    rank, world = 0, 1
    splits_rows = splits_latents = False

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a statistic over ranks that hold different rows."""
        return value

    def sum_latents(self, value: Tensor) -> Tensor:
        """Sum over ranks that hold different latents."""
        return value

    def keep_topk(self, values: Tensor, k: int) -> Tensor | None:
        """Which of the candidates [rows, c] belong to the k largest of the row over all ranks; None: all."""
        return None

    def batch_threshold(self, values: Tensor, count: int) -> Tensor | None:
        """Which candidates [m] belong to the `count` largest over all ranks; None: decide alone."""
        return None

    def lowest(self, value: Tensor) -> float:
        """The least of a number over all ranks."""
        return float(value)

    def gather(self, value: Tensor) -> list[Tensor]:
        """A tensor of every rank, of one shape."""
        return [value]

    def gather_counts(self, value: int) -> list[int]:
        """A number of every rank."""
        return [value]

    def reduce_rows(self, fired: Tensor, *matrices: Tensor) -> None:
        """Sum matrices [n, d] over ranks, in place; rows where `fired` is false everywhere are zero."""

    def barrier(self) -> None:
        """Wait for the others."""


class _Group(Solo):
    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def _sum(self, value: Tensor) -> Tensor:
        value = value.contiguous()
        dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> list[Tensor]:
        out = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(out, value.contiguous())
        return out

    def _gather_ragged(self, value: Tensor) -> list[Tensor]:
        sizes = [int(s) for s in self.gather(torch.tensor([value.numel()], device=value.device))]
        padded = value.new_zeros(max(sizes))
        padded[: value.numel()] = value
        return [part[:size] for part, size in zip(self.gather(padded), sizes, strict=True)]

    def batch_threshold(self, values: Tensor, count: int) -> Tensor | None:
        parts = self._gather_ragged(values)
        everything = torch.cat(parts)
        keep = torch.ones_like(everything, dtype=torch.bool)
        if everything.numel() > count:
            # stable, so that ties fall to the lowest rank and every rank agrees
            order = torch.sort(everything, descending=True, stable=True).indices
            keep.zero_()
            keep[order[:count]] = True
        start = sum(part.numel() for part in parts[: self.rank])
        return keep[start : start + values.numel()]

    def gather_counts(self, value: int) -> list[int]:
        return [int(v) for v in self.gather(torch.tensor([value]))]

    def lowest(self, value: Tensor) -> float:
        value = value.detach().clone()
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
        return float(value)

    def barrier(self) -> None:
        dist.barrier()


class DataParallel(_Group):
    """Rows are split."""

    splits_rows = True

    def sum(self, value: Tensor) -> Tensor:
        return self._sum(value)

    def reduce_rows(self, fired: Tensor, *matrices: Tensor) -> None:
        anywhere = fired.to(torch.int32)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        rows = anywhere.nonzero().view(-1)
        for matrix in matrices:
            packed = matrix[rows]
            dist.all_reduce(packed)
            matrix[rows] = packed


class LatentParallel(_Group):
    """Latents are split."""

    splits_latents = True

    def sum_latents(self, value: Tensor) -> Tensor:
        return self._sum(value)

    def keep_topk(self, values: Tensor, k: int) -> Tensor | None:
        parts = self.gather(values)  # world x [rows, c]
        everything = torch.cat(parts, dim=1)
        keep = torch.zeros_like(everything, dtype=torch.bool)
        order = torch.sort(everything, dim=1, descending=True, stable=True).indices[:, :k]
        keep.scatter_(1, order, True)
        width = values.shape[1]
        return keep[:, self.rank * width : (self.rank + 1) * width]


def connect(split: str) -> Solo:
    """The group of this process: Solo unless launched by torchrun or accelerate with several processes."""
    if split == "none":
        return Solo()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized():
        # what torchrun and accelerate launch set is all that is needed; counts on the host travel by gloo
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Solo()
    return LatentParallel() if split == "latent" else DataParallel()


def shares(configs: Sequence[TrainConfig], d: int, comm: Solo) -> list[tuple[int, int]] | None:
    """Which latents of each SAE this rank holds, where ranks split them."""
    if not comm.splits_latents:
        return None
    found = []
    for config in configs:
        if config.architecture == "gated":
            raise ConfigError(f"{config.name}: gated SAEs cannot be split by latents", hint="use parallel: data")
        width = config.width(d)
        if width % comm.world or (config.k or 0) > width // comm.world:
            raise ConfigError(
                f"{config.name}: d_sae={width} does not split into {comm.world} ranks of equal width above k",
                hint="choose d_sae as a multiple of the number of ranks, or parallel: data",
            )
        found.append((comm.rank * width // comm.world, (comm.rank + 1) * width // comm.world))
    return found


def pick_device(name: str = "auto") -> str:
    """`auto` takes the GPU of this rank where there is one.

    >>> pick_device("cpu")
    'cpu'
    """
    if name != "auto":
        return name
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
