"""One optimiser step of every living SAE of a bank: forward, signals, update, and the counts that follow from it.

A loss that is no number takes its SAE out before any weight of it moves; the others go on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hubsae.core.errors import DataError, TrainingError
from hubsae.kernels import chosen
from hubsae.train import nowait, step, update
from hubsae.train.nowait import EXPLODED
from hubsae.train.parallel import Solo
from hubsae.train.state import Bank, Cell

BAD_DATA = "harvest again in float32 or bfloat16, or filter the data"


def learn(
    bank: Bank, x: Tensor, comm: Solo, rows: int, *, number: int, accumulate: int = 1, target: Tensor | None = None
) -> None:
    """Take step `number` on a batch x [tokens, d] in training space; `rows` counts the tokens of all ranks.

    `target` [tokens, d_out] is what transcoders predict.
    """
    for cell in bank.live:
        cell.now = {}
    if accumulate > 1 or comm.splits_rows or any(cell.config.clip is not None for cell in bank.live):
        fired, last = _with_stored_gradients(bank, x, target, comm, rows, number, accumulate)
        if last is None:
            return
        bank.count(comm.sum(fired.clone()) if comm.splits_rows else fired, rows)
    elif chosen() == "triton" and len(bank.cells) == 1:
        nowait.take(bank, x, target, comm, rows)
    else:
        f = _forward(bank, x, target, comm, rows, number)
        if f is None:
            return
        s = step.signals(bank, f, comm, rows)
        update.apply(bank, f, s)
        _note(bank, s)
        bank.count(s.fired, rows)
    for cell in bank.live:
        cell.sums = [a + b for a, b in zip(cell.sums, (cell.now["loss"], cell.now["l0"], 1.0), strict=True)]


def settle(bank: Bank) -> None:
    """Hear of losses that were not waited for: an SAE whose loss was no number at some step is out."""
    for cell in bank.live:
        if (broken := cell.settle()) is None:
            continue
        loss, number, bad = broken
        if bad:
            raise DataError(f"step {number}: the batch holds NaN or infinity", hint=BAD_DATA)
        _out(cell, loss, number)


def _with_stored_gradients(
    bank: Bank, x: Tensor, target: Tensor | None, comm: Solo, rows: int, number: int, accumulate: int
) -> tuple[Tensor, step.Signals | None]:
    """A step that needs whole gradients: clipping, accumulation, data-parallel ranks."""
    vectors: dict[int, dict[str, Tensor]] = {}
    fired = torch.zeros_like(bank.since_fired)
    moved = torch.zeros(bank.n, dtype=torch.bool, device=x.device)
    s = None
    size = math.ceil(x.shape[0] / accumulate)
    for i, part in enumerate(x.split(size)):
        wanted = None if target is None else target[i * size : (i + 1) * size]
        f = _forward(bank, part, wanted, comm, rows, number)
        if f is None:
            return fired, None
        s = step.signals(bank, f, comm, rows)
        update.collect(bank, f, s)
        _note(bank, s)
        fired += s.fired
        for cell, grads, extra in zip(bank.live, s.vectors, s.aux, strict=True):
            sums = vectors.setdefault(cell.index, {})
            for name, gradient in grads.items():
                sums[name] = sums[name] + gradient if name in sums else gradient
            if cell.config.architecture in ("jumprelu", "gated"):
                moved[cell.low : cell.high] = True  # gradients reach latents that did not fire
            if extra is not None:
                moved[cell.low + extra.ids] = True
    moved |= fired > 0
    update.apply_stored(bank, [vectors[cell.index] for cell in bank.live], moved, comm)
    return fired, s


def _forward(bank: Bank, x: Tensor, target: Tensor | None, comm: Solo, rows: int, number: int) -> step.Forward | None:
    while bank.live:
        f = step.forward(bank, x, comm, rows, target)
        losses = (comm.sum(f.losses.clone()) if comm.splits_rows else f.losses).tolist()
        bad = [(cell, loss) for cell, loss in zip(bank.live, losses, strict=True) if not _sane(cell, loss)]
        if not bad:
            for cell, loss, mse in zip(bank.live, losses, f.mse.tolist(), strict=True):
                _add(cell, loss=loss, mse=mse)
            return f
        for cell, loss in bad:
            _fail(cell, x if target is None else torch.cat([x, target], 1), loss, number)
    return None


def _sane(cell: Cell, loss: float) -> bool:
    if cell.first_loss is None:
        cell.first_loss = loss
    return math.isfinite(loss) and loss <= EXPLODED * max(cell.first_loss, 1e-12)


def _fail(cell: Cell, x: Tensor, loss: float, number: int) -> None:
    broken = (~torch.isfinite(x)).any(1)
    if bool(broken.any()):
        raise DataError(
            f"step {number}: row {int(broken.nonzero()[0])} of the batch holds NaN or infinity "
            f"({int(broken.sum())} of {x.shape[0]} rows)",
            hint=BAD_DATA,
        )
    _out(cell, loss, number)


def _out(cell: Cell, loss: float, number: int) -> None:
    cell.failed = TrainingError(
        f"{cell.config.name}: the loss became {loss:.4g} at step {number} (it was {cell.first_loss:.4g} at the start)",
        hint="lower lr, add a warm-up (schedule.warmup_steps) or clip",
    )


def _note(bank: Bank, s: step.Signals) -> None:
    for i, (cell, l0) in enumerate(zip(bank.live, s.l0.tolist(), strict=True)):
        _add(cell, l0=l0, aux_loss=s.aux_loss[i], sparsity_loss=s.penalty[i])


def _add(cell: Cell, **values: Tensor | float | None) -> None:
    """Add a part's statistics to those of the step; parts of an accumulated batch sum to the batch's."""
    for name, value in values.items():
        if value is not None:
            cell.now[name] = cell.now.get(name, 0.0) + value
