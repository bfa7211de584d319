"""Chains of stages: the same SAE carried along the checkpoints of a model, and a control that stays at the first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hubsae.core.errors import ConfigError
from hubsae.core.files import write_csv_atomic
from hubsae.core.options import pass_on
from hubsae.core.sae import SAE
from hubsae.core.settings import merge
from hubsae.train.config import TrainConfig
from hubsae.train.result import TrainResult
from hubsae.train.trainer import Run


@dataclass
class StageResult:
    """One stage of a chain."""

    stage: str
    """Name of the stage whose activations were trained on."""
    result: TrainResult
    before: dict[str, float]
    """Metrics of the SAE the stage started from, on this stage's validation data; for the first, of its start."""
    after: dict[str, float]

    @property
    def sae(self) -> SAE:
        """The SAE after this stage."""
        assert self.result.sae is not None
        return self.result.sae


@dataclass
class ChainResult:
    """A chain and its control."""

    stages: list[StageResult]
    control: list[StageResult] = field(default_factory=list)
    """As many stages, all on the first stage's activations; empty where it was not asked for."""

    def table(self) -> list[dict[str, Any]]:
        """One row per stage: metrics before and after, and the control's after, to be subtracted."""
        rows = []
        for number, stage in enumerate(self.stages):
            row: dict[str, Any] = {"number": number, "stage": stage.stage}
            row |= {f"{k}_before": v for k, v in stage.before.items() if k != "val_rows"}
            row |= {f"{k}_after": v for k, v in stage.after.items() if k != "val_rows"}
            if self.control:
                row |= {f"{k}_control": v for k, v in self.control[number].after.items() if k != "val_rows"}
            rows.append(row)
        return rows


def train_chain(
    config: TrainConfig,
    stages: Mapping[str, Any] | Sequence[tuple[str, Any]],
    *,
    out: str | os.PathLike[str] | None = None,
    init: Any = None,
    val: Mapping[str, Any] | None = None,
    control: bool = True,
    resume: bool = True,
    device: str | torch.device = "cpu",
    quiet: bool = False,
) -> ChainResult:
    """Train an SAE through stages in order, each warm-started from the one before, optimiser fresh.

    Metrics are taken before and after each stage's training, on its validation data. A warm start trains longer with
    each stage, so part of what changes along a chain is just that; `control` runs the same number of stages all on the
    first stage's activations, for the comparison.

    >>> g = torch.Generator().manual_seed(0)
    >>> stages = {"base": torch.randn(256, 8, generator=g), "step10": torch.randn(256, 8, generator=g)}
    >>> chain = train_chain(TrainConfig(d_sae=16, k=2, batch_size=64), stages)
    >>> [s.stage for s in chain.stages], len(chain.control)
    (['base', 'step10'], 2)
    """
    steps = list(stages.items()) if isinstance(stages, Mapping) else list(stages)
    folder, val = None if out is None else Path(out), dict(val or {})
    names = [name for name, _ in steps]
    if not steps or len(set(names)) < len(names):
        raise ConfigError(f"a chain needs stages with names of their own, found {names}")
    unknown = sorted(set(val) - set(names))
    if unknown:
        raise ConfigError(
            f"validation data for {', '.join(unknown)}, which is no stage", hint=f"stages: {', '.join(names)}"
        )
    given = locals()

    def walk(stages: list[tuple[str, str, Any]], start: Any, prefix: str = "", seed: int = 0) -> list[StageResult]:
        """Train through (name, stage, activations); each has another order of its data, from `seed` on."""
        done: list[StageResult] = []
        for number, (name, stage, rows) in enumerate(stages):
            changed: dict[str, Any] = {
                "name": f"{config.name}_{prefix.replace('/', '_')}{name}",
                "record": merge(config.record, {"base_model": {"stage": stage}}),
                "data_seed": config.data_seed + seed + number,
            }
            own, place = config.model_copy(update=changed), f"{prefix}{number:02d}_{name}"
            options = {"out": None if folder is None else folder / place, "starts": [start], "val": val.get(stage)}
            run = pass_on(Run, given, configs=[own], activations=rows, **options)
            before = _measure(run)
            (result,) = run.fit()
            if result.error is not None:
                raise result.error
            # without validation data the stage's own rows stand in
            after = {k: v for k, v in result.metrics.items() if k.startswith("val_")} or run.validate_now()
            done.append(StageResult(stage, result, before, after))
            start = result.sae
        return done

    chain = ChainResult(walk([(name, name, rows) for name, rows in steps], init))
    if control:  # it differs from the chain in nothing but the data
        first, rows = steps[0]
        again = [(f"control_{number:02d}", first, rows) for number in range(1, len(steps))]
        chain.control = [chain.stages[0], *walk(again, chain.stages[0].sae, "control/", seed=1)]
    if folder is not None:
        write_csv_atomic(folder / "chain.csv", chain.table())
    return chain


def _measure(run: Run) -> dict[str, float]:
    """Metrics of what a stage starts from; recorded once, so that a resumed chain reports the same."""
    for line in run.log.lines:
        if line["event"] == "before":
            return {k: v for k, v in line.items() if k.startswith("val_")}
    if run.step > 0:
        return {}
    values = run.validate_now()
    run.log.add("before", 0, run.first.name, **values)
    return values
