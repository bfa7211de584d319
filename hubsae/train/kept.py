"""What a training run has kept, finished or halted: its best checkpoints and its last state, each as an SAE."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hubsae.core.errors import NotFoundError
from hubsae.core.sae import SAE
from hubsae.train import checkpoint
from hubsae.train.config import TrainConfig
from hubsae.train.trainer import Run


class Kept(NamedTuple):
    """One checkpoint of a run."""

    step: int
    of: int
    """Steps the run was to have"""
    halted: int | None
    """The last state's step where the run stopped early, None where it went to its end"""
    rank: int | None
    """1 for the best by `metric`, and so on; None where it is kept as the last state alone"""
    metric: str | None
    value: float | None
    last: bool
    load: Callable[[], SAE]
    """The SAE on raw activations, its record saying which step it is and why it was kept"""

    @property
    def why(self) -> str:
        """Step and reason in words, as they go on record."""
        reasons = [f"number {self.rank} of the kept ones by {self.metric} ({self.value:.6g})"] if self.rank else []
        reasons += ["the last state"] if self.last else []
        ended = "" if self.halted is None else f"; training was halted at step {self.halted:,}"
        return f"step {self.step:,} of {self.of:,}: {' and '.join(reasons)}{ended}"


def kept_checkpoints(
    config: TrainConfig, activations: Any, folder: str | os.PathLike[str], *, val: Any = None
) -> list[Kept]:
    """The checkpoints in the folder of a run of `config` on `activations`, in the order of their steps.

    Nothing is trained, and a halted run can go on afterwards.

    >>> import tempfile, torch
    >>> from hubsae.train import train
    >>> x, out = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)), tempfile.mkdtemp()
    >>> config = TrainConfig(d_sae=16, k=2, batch_size=64, eval_every=4, keep_best=1, metric="train_loss")
    >>> _ = train(config, x, out=out, quiet=True)
    >>> [(one.step, one.of, one.last) for one in kept_checkpoints(config, x, out)]
    [(8, 8, True)]
    """
    folder = Path(folder)
    if checkpoint.latest(folder / "state") is None:
        raise NotFoundError(f"{folder} holds no checkpoint", hint="the run was stopped before it kept its first one")
    run = Run([config], activations, out=folder, val=val, quiet=True)
    cell, halted = run.cells[0], None if run.finished else run.step
    best = {entry["step"]: (rank, entry) for rank, entry in enumerate(cell.best.kept, 1)}

    def kept(step: int) -> Kept:
        rank, entry = best.get(step, (None, {}))

        def load() -> SAE:
            sae = run.exporter.sae(cell, cell.best.load(entry), entry) if entry else run.standing(cell)
            sae.metadata.training.selection = one.why
            return sae

        one = Kept(step, run.total, halted, rank, entry.get("metric"), entry.get("value"), step == run.step, load)
        return one

    return [kept(step) for step in sorted({*best, run.step})]


def choose(kept: list[Kept], wanted: str | int) -> Kept:
    """`best`, `last`, or the checkpoint of a step."""
    if str(wanted) == "last":
        return kept[-1]
    if str(wanted) == "best":
        ranked = [one for one in kept if one.rank]
        return min(ranked, key=lambda one: one.rank or 0) if ranked else kept[-1]
    for one in kept:
        if str(one.step) == str(wanted):
            return one
    raise NotFoundError(
        f"no checkpoint of step {wanted} was kept", hint=f"kept: {', '.join(str(one.step) for one in kept)}"
    )
