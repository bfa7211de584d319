"""A step that the host does not wait for, with Triton kernels, and the CUDA graph of it where all shapes are fixed.

The loss stays on the device. Where it is no number, or explodes, nothing moves from that step on; the host hears of it
when it next looks at the numbers (`Cell.settle`). What still waits within a step: AuxK (how many latents are dead),
batch_topk and jumprelu (how many entries there are), several SAEs in one bank, and clipping, accumulation and
data-parallel ranks.
"""

from __future__ import annotations

import math
import os
import warnings

import torch
from torch import Tensor

from hubsae.train import step, update
from hubsae.train.parallel import Solo
from hubsae.train.state import Bank, Cell

# a loss this many times the first one is an explosion, not a fluctuation
EXPLODED = 1e4
# steps before a graph is taken: kernels are compiled by then
EAGER = 3


def take(bank: Bank, x: Tensor, target: Tensor | None, comm: Solo, rows: int) -> None:
    """Take one step of a bank of one SAE; its statistics stay tensors."""
    (cell,) = bank.live
    if cell.watch is None:
        first = math.nan if cell.first_loss is None else cell.first_loss
        cell.watch = torch.tensor([first, math.nan, -1.0, 0.0], dtype=torch.float64, device=bank.device)
    found = _graph(bank, cell, x, target, comm, rows)
    cell.now = on_device(bank, x, target, comm, rows) if found is None else found.replay(cell, x, target)
    bank.count_tokens(rows)


def on_device(bank: Bank, x: Tensor, target: Tensor | None, comm: Solo, rows: int) -> dict[str, Tensor]:
    """The part of a step that is the device's; the statistics."""
    (cell,) = bank.live
    f = step.forward(bank, x, comm, rows, target)
    moves = _watch(cell, f.losses[0], x if target is None else torch.cat([x, target], 1))
    s = step.signals(bank, f, comm, rows)
    update.apply(bank, f, s, moves)
    bank.count_fired(s.fired, rows)
    now = {
        "loss": f.losses[0],
        "mse": f.mse[0],
        "l0": s.l0[0],
        "aux_loss": s.aux_loss[0],
        "sparsity_loss": s.penalty[0],
    }
    return {name: value for name, value in now.items() if value is not None}


def _watch(cell: Cell, loss: Tensor, data: Tensor) -> Tensor:
    """Whether this step may move the weights; notes the first loss, and the first that is insane."""
    watch = cell.watch
    assert watch is not None
    loss, (first, insane, at, bad) = loss.double(), watch.unbind()
    first = torch.where(first.isnan(), loss, first)
    before = at < 0
    moves = before & torch.isfinite(loss) & (loss <= EXPLODED * first.clamp_min(1e-12))
    broken = before & ~moves
    unclean = ~torch.isfinite(data).all()
    noted = (first, torch.where(broken, loss, insane), torch.where(broken, cell.step, at))
    watch.copy_(torch.stack([*noted, torch.where(broken, unclean.double(), bad)]))
    return moves


class StepGraph:
    """The step on batches of one shape, as one launch in place of about a hundred."""

    def __init__(self, bank: Bank, cell: Cell, x: Tensor, target: Tensor | None, comm: Solo, rows: int):
        self.x, self.target = x.clone(), None if target is None else target.clone()
        self.lr = torch.full((), float(cell.lr), device=x.device)
        self.graph = torch.cuda.CUDAGraph()
        lr, cell.lr = cell.lr, self.lr
        try:
            with torch.cuda.graph(self.graph):
                self.now = on_device(bank, self.x, self.target, comm, rows)
        finally:
            cell.lr = lr

    def replay(self, cell: Cell, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Take the step on a batch; the statistics, which the next replay writes over."""
        self.x.copy_(x)
        if self.target is not None and target is not None:
            self.target.copy_(target)
        self.lr.fill_(cell.lr)
        self.graph.replay()
        return self.now


def _graph(bank: Bank, cell: Cell, x: Tensor, target: Tensor | None, comm: Solo, rows: int) -> StepGraph | None:
    """The graph of a step, taken when a few steps ran without; None where there is none."""
    c = cell.config
    fixed = c.architecture == "topk" and c.aux is None and not c.matryoshka and comm.world == 1
    if not (x.is_cuda and fixed and len(x) == c.batch_size) or os.environ.get("HUBSAE_CUDA_GRAPH") == "0":
        return None
    if isinstance(bank.graph, int):
        if bank.graph < EAGER:
            bank.graph += 1
            return None
        try:
            bank.graph = StepGraph(bank, cell, x, target, comm, rows)
        except RuntimeError as error:
            warnings.warn(f"the step is not taken as a CUDA graph: {error}", stacklevel=2)
            bank.graph = None
    return bank.graph
