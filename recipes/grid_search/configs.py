"""From cells to training configs: what a cell of each kind is trained as, said once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hubsae.core.normalizer import Normalizer
from hubsae.core.scopes import excluding
from hubsae.train import (
    AuxConfig,
    DeadConfig,
    InitConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainConfig,
)

from .cells import LABELS, Cell
from .settings import TrainSettings

SAMPLE = 8192
"""Rows the first threshold of a trained JumpReLU is taken from."""


def train_configs(
    cells: Sequence[Cell],
    settings: TrainSettings,
    activations: Any,
    *,
    seed: int = 0,
    record: dict[str, Any] | None = None,
) -> list[TrainConfig]:
    """One training config per cell; all share the stream, so that they can be trained in one pass.

    >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    >>> [c.architecture for c in train_configs([Cell("jumprelu_fixed", 2, 0.5), Cell("topk", 2, 4)],
    ...                                        TrainSettings(batch_size=64), x)]
    ['jumprelu', 'topk']
    """
    from hubsae.train.data import as_source, sample, spaces

    source = as_source(activations)
    steps = max(1, round(settings.epochs * (source.n_rows // settings.batch_size)))
    shared: dict[str, Any] = {
        "batch_size": settings.batch_size,
        **({"exclude": settings.exclude} if settings.exclude else {}),
        "epochs": settings.epochs,
        "data_seed": seed,
        "normalize": settings.normalize,
        "project": settings.project,
        "lr": settings.lr,
        "schedule": ScheduleConfig(shape="cosine", floor=settings.floor),
        "aux": AuxConfig(coefficient=settings.aux) if settings.aux else None,
        "dead": DeadConfig(tokens=settings.dead_tokens),
        # the last state, not the best on held-out prompts: those are what the release is measured on
        "select": "last",
        "keep_best": 0,
        # whole cells are what is spread over ranks
        "parallel": "none",
        "exports": (),
        "checkpoint_every": max(1, steps // settings.checkpoints),
        "log_every": max(1, min(50, steps // 20)),
    }
    rows: Tensor | None = None
    out = []
    for cell in cells:
        mine = {**shared, "name": cell.id, "expansion": cell.expansion, "seed": seed + cell.seed}
        training: dict[str, Any] = {"kind": LABELS[cell.kind]}
        init: dict[str, Any] = {"encoder": settings.init, "decoder": "torch" if settings.init == "torch" else "random"}
        init["bias"] = settings.bias
        if cell.kind in ("topk", "batch_topk"):
            mine |= {"architecture": cell.kind, "k": cell.k}
        elif cell.kind == "jumprelu_fixed":
            training["threshold_rule"] = f"fixed at {cell.number:g} for every latent, not trained; no sparsity penalty"
            init["threshold"] = cell.number
            mine |= {
                "architecture": "jumprelu",
                "sparsity": SparsityConfig(train_threshold=False, bandwidth=cell.number),
            }
        else:
            jump = settings.jumprelu
            if rows is None:
                taken = excluding(settings.exclude)
                space, _ = spaces(TrainConfig(d_sae=1, k=1, normalize=settings.normalize), source, taken)
                rows = _centred(sample(source, SAMPLE, seed, taken).x, space)
            start = first_threshold(rows, cell.number / cell.d_sae(source.d), seed + cell.seed)
            training["threshold_rule"] = (
                f"trained by a straight-through estimator towards an L0 of {cell.number:g}; start {start:.4g}"
            )
            init["threshold"] = start
            sparsity = SparsityConfig(
                l0=jump.coefficient,
                l0_target=cell.l0_target,
                bandwidth=jump.bandwidth * start,
                threshold_lr=jump.lr,
                warmup_steps=int(jump.warmup * steps),
            )
            mine |= {"architecture": "jumprelu", "sparsity": sparsity}
        sections = dict(record or {})
        sections["training"] = {**sections.get("training", {}), **training}
        out.append(TrainConfig(**mine, init=InitConfig(**init), record=sections))
    return out


def first_threshold(rows: Tensor, density: float, seed: int = 0) -> float:
    """The threshold at which random unit directions fire on a share `density` of the rows [n, d].

    A JumpReLU that starts with its L0 near the target needs no long search for it: in log space a threshold moves
    by about the learning rate per step.

    >>> x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    >>> 1.5 < first_threshold(x, 0.05) < 1.8
    True
    """
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(1024, rows.shape[1], generator=generator), dim=1)
    pre = (rows.float().cpu() @ W.T).flatten()
    kept = max(1, round(min(density, 0.5) * pre.numel()))
    return max(float(pre.topk(kept, sorted=False).values.min()), 1e-4)


def _centred(raw: Tensor, space: Normalizer | None) -> Tensor:
    x = raw.float() if space is None else space.apply(raw.float())
    return x - x.mean(0)
