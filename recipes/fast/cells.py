"""A cell: one SAE of one method. What it is trained as, what it is called, and what its record says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hubsae.train import DeadConfig, InitConfig, ScheduleConfig, SparsityConfig, TrainConfig

from .settings import LABELS, Config, Kind, Train

ARCHITECTURES = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
_ID = re.compile(r"(?P<kind>[a-z]+)-x(?P<expansion>[\d.]+)-(?P<letter>[lk])(?P<number>[\d.e+-]+?)-s(?P<seed>\d+)")


@dataclass(frozen=True, order=True)
class Cell:
    """An SAE, whatever the method.

    >>> Cell("standard", 8, 5, 42).id, Cell.of("topk-x4-k32-s0").number
    ('standard-x8-l5-s42', 32.0)
    """

    kind: str
    expansion: float
    number: float
    """The coefficient of the penalty, or k."""
    seed: int

    @property
    def id(self) -> str:
        """Its name within a method."""
        letter = "k" if self.kind == "topk" else "l"
        return f"{self.kind}-x{self.expansion:g}-{letter}{self.number:g}-s{self.seed}"

    @staticmethod
    def of(name: str) -> Cell:
        """The cell of a name."""
        found = _ID.fullmatch(name)
        assert found is not None, name
        return Cell(found["kind"], float(found["expansion"]), float(found["number"]), int(found["seed"]))


def cells(train: Train) -> list[Cell]:
    """Every cell, in a fixed order."""
    kinds: tuple[Kind, ...] = train.kinds
    return [
        Cell(kind, float(expansion), float(number), seed)
        for kind in kinds
        for expansion in train.expansions
        for number in getattr(train, kind)
        for seed in train.seeds
    ]


def train_configs(config: Config, method: str, place: dict[str, Any]) -> list[TrainConfig]:
    """One training config per cell; `place` is what records say of model and hook point."""
    t = config.train
    steps = max(1, t.tokens // t.batch_size)
    shared: dict[str, Any] = {
        "batch_size": t.batch_size, "tokens": t.tokens, "data_seed": config.seed, "exclude": t.exclude,
        "loss": "sum", "pre_bias": "none", "lr": t.lr, "unit_norm": True, "project": False,
        "schedule": ScheduleConfig(shape="cosine", floor=t.floor, warmup_steps=t.warmup_steps,
                                   cooldown_steps=t.cooldown_steps),
        "dead": DeadConfig(tokens=t.dead_tokens), "select": "last", "keep_best": 0, "exports": (),
        "checkpoint_every": max(1, steps // t.states), "log_every": max(1, min(200, steps // 20)),
    }  # fmt: skip
    init = InitConfig(encoder="kaiming", decoder="kaiming", bias="geometric_median", rows=t.init_rows)
    made = []
    for cell in cells(t):
        own: dict[str, Any] = {"architecture": ARCHITECTURES[cell.kind], "init": init}
        if cell.kind == "topk":
            own["k"] = int(cell.number)
        elif cell.kind == "standard":
            own["sparsity"] = SparsityConfig(l1=cell.number, warmup_steps=t.sparsity_warmup_steps)
        else:
            own["init"] = init.model_copy(update={"threshold": t.threshold})
            own["sparsity"] = SparsityConfig(
                l0=cell.number, bandwidth=t.bandwidth, threshold_lr=t.threshold_lr, warmup_steps=t.sparsity_warmup_steps
            )
        about = {**place, "activations": {**place["activations"], "mode": mode_in_words(config, method)}}
        about["training"] = {"method": LABELS[method], "kind": cell.kind}
        made.append(
            TrainConfig(name=cell.id, expansion=cell.expansion, seed=cell.seed, record=about, **shared, **own)
        )  # fmt: skip
    return made


def mode_in_words(config: Config, method: str) -> str:
    """What of the texts stood together when the model ran."""
    data = config.data
    if method == "fast":
        return f"FAST: each chat alone in its template, cut at {data.max_length:,} tokens"
    if method == "bt-f":
        return f"BT(F): chats in their template, packed into blocks of {data.block:,} tokens"
    return f"BT(P): plain texts, packed into blocks of {data.block:,} tokens"
