"""Measure every cell on held-out prompts: reconstruction in one pass, then the model's loss with each SAE in place.

Next to each number with its interval, the values are kept apart by prompt, so that cells can be compared in pairs:
squared error by group of whole prompts, added loss by text.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubsae.core.files import atomic_path
from hubsae.core.sae import SAE
from hubsae.evals import reconstruction
from hubsae.evals.accumulate import NOT_FIRST
from hubsae.evals.definitions import Measure, to_metrics
from hubsae.evals.splice import splice_many
from hubsae.recipes.standard import Measures, in_parts

from .analysis import FailedCell
from .cells import Cell, parse_id
from .paired import Units
from .table import BOTH_WAYS, FULL, WITH_FIRST, WITHOUT_FIRST, GridRow, Number


@dataclass
class Measured:
    """Everything measured of a grid."""

    rows: list[GridRow] = field(default_factory=list)
    units: dict[str, dict[Cell, Units]] = field(default_factory=lambda: {"mse": {}, "delta_ce": {}})
    measures: Measures = field(default_factory=Measures)
    failed: list[FailedCell] = field(default_factory=list)


def measure(
    saes: Mapping[str, Callable[[], SAE]],
    activations: Any,
    model: Any,
    tokenizer: Any,
    texts: Sequence[Any],
    hook: str,
    *,
    max_length: int | None = None,
    done: Callable[[int, str], None] | None = None,
) -> Measured:
    """Measure SAEs, given by id as functions that load them; `activations` are held-out rows with labels.

    An SAE with weights that are not finite is reported in `failed` and measured no further.
    """
    out = Measured()
    for part in in_parts(saes):
        broken = [name for name, sae in part.items() if not _is_finite(sae)]
        out.failed += [FailedCell(name, "its weights are not finite") for name in broken]
        part = {name: sae for name, sae in part.items() if name not in broken}
        if not part:
            continue
        found = reconstruction(part, activations)
        spliced = splice_many(
            model, tokenizer, {name: (sae, hook) for name, sae in part.items()}, texts, max_length=max_length
        )  # fmt: skip
        for name in part:
            cell, ours, loss = parse_id(name), found[name], spliced[name]
            out.units["mse"][cell] = Units(ours.by_group[:, 0], ours.by_group[:, 1])
            texts_ = [row for row in loss.per_text if row["scope"] == ours.own_scope]
            added = np.array([row["ce_sae"] - row["ce_clean"] for row in texts_])
            out.units["delta_ce"][cell] = Units(added, np.array([row["n"] for row in texts_]))
            chosen = _chosen(ours.measures, ours.own_scope) | _chosen(loss.measures, ours.own_scope)
            out.rows.append(GridRow(cell, {k: _number(m) for k, m in chosen.items() if m.value is not None}))
            out.measures.metrics[name] = to_metrics(list(chosen.values()))
            out.measures.density[name] = ours.features.log10_density()
            if done is not None:
                done(len(out.rows), name)
        for title, rows in (
            ("reconstruction", found.rows()),
            ("norm_deciles", found.decile_rows()),
            ("density_histogram", found.histogram_rows()),
            ("splice", [row for result in spliced.values() for row in result.rows()]),
        ):
            out.measures.tables.setdefault(title, []).extend(rows)
        del part, found, spliced
        gc.collect()
    return out


def _is_finite(sae: SAE) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in sae.tensors().values())


def _chosen(measures: Sequence[Measure], own: str) -> dict[str, Measure]:
    """What a grid reports of each SAE: everything in its own scope, and a few with (or without) position 0."""
    found = {m.name: m for m in measures if m.name in FULL and m.scope == own}
    other, suffix = ("all", WITH_FIRST) if own == NOT_FIRST else (NOT_FIRST, WITHOUT_FIRST)
    found |= {f"{m.name}@{suffix}": m for m in measures if m.scope == other and m.name in BOTH_WAYS}
    return found


def _number(measure: Measure) -> Number:
    low, high = measure.interval or (None, None)
    assert measure.value is not None
    return Number(measure.value, low, high, measure.n_tokens)


def save_units(path: str | Path, units: Mapping[str, Mapping[Cell, Units]]) -> Path:
    """Keep the values by prompt, for comparisons later."""
    arrays = {
        f"{metric}/{cell.id}/{part}": values
        for metric, by_cell in units.items()
        for cell, pair in by_cell.items()
        for part, values in zip(Units._fields, pair, strict=True)
    }
    target = Path(path)
    with atomic_path(target) as scratch, open(scratch, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return target


def load_units(path: str | Path) -> dict[str, dict[Cell, Units]]:
    """The inverse of `save_units`."""
    found: dict[str, dict[Cell, dict[str, np.ndarray]]] = {}
    with np.load(Path(path), allow_pickle=False) as file:
        for key in file.files:
            metric, name, part = key.split("/")
            found.setdefault(metric, {}).setdefault(parse_id(name), {})[part] = file[key]
    return {metric: {c: Units(**parts) for c, parts in by_cell.items()} for metric, by_cell in found.items()}
