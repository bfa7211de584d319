"""The recipe's tables: the evaluation of every checkpoint, and how much an index keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.metadata import Metric
from hubsae.core.parquet import arrow
from hubsae.evals import bootstrap
from hubsae.evals.splice import SpliceResult
from hubsae.index.files import PROMPTS

from .normalised import DEFINITIONS

HEADLINES = (
    "fve_normalised", "mse_normalised", "fve", "mse", "dead_fraction", "frac_recovered_zero", "kl_score", "delta_ce",
)  # fmt: skip
INTERVAL = "95 % percentile bootstrap over conversations"


def all_rows(rows: Sequence[Mapping[str, Any]], inside: Mapping[str, SpliceResult], scope: str) -> list[dict[str, Any]]:
    """Rows of reconstruction with those of the loss inside the model, by checkpoint; each with its definition."""
    found = [dict(row) for row in rows]
    for name, result in inside.items():
        found += [{"sae": name, **row} for row in result.rows()]
        found.append(kl_score(name, result, scope))
    return [{**row, "definition": row.get("definition") or DEFINITIONS[str(row["metric"])]} for row in found]


def kl_score(name: str, result: SpliceResult, scope: str) -> dict[str, Any]:
    """1 - kl / kl_zero over the texts of a splice: the card's second score, with its interval over texts."""
    used = [row for row in result.per_text if row["scope"] == scope]
    sums = np.array([[row["kl"], row["kl_zero"]] for row in used])

    def of(s: np.ndarray) -> np.ndarray:
        return 1 - s[:, 0] / s[:, 1]

    low, high = bootstrap.interval(sums, of) or (None, None)
    value, n = float(of(sums.sum(0, keepdims=True))[0]), result.get("kl", scope).n_tokens
    return {"sae": name, "metric": "kl_score", "scope": scope, "value": value, "low": low, "high": high, "n_tokens": n}


def evaluation(rows: Sequence[Mapping[str, Any]], scope: str) -> list[dict[str, Any]]:
    """The headlines of each checkpoint in its own scope, as a card shows them."""
    order = {metric: place for place, metric in enumerate(HEADLINES)}
    wanted = [row for row in rows if row["metric"] in order and row["scope"] == scope]
    columns = ("value", "low", "high", "n_tokens")
    return [
        {"checkpoint": row["sae"], "metric": row["metric"], **{name: row[name] for name in columns}}
        for row in sorted(wanted, key=lambda row: (row["sae"], order[row["metric"]]))
    ]


def as_metric(row: Mapping[str, Any]) -> Metric:
    """A row as an entry of metadata.json."""
    interval = None if row["low"] is None else (row["low"], row["high"])
    return Metric(
        name=row["metric"], value=row["value"], definition=row["definition"], n_tokens=row["n_tokens"],
        scope=row["scope"], interval=interval, source="hubsae",
        interval_kind=(row.get("interval") or INTERVAL) if interval else None,
    )  # fmt: skip


def prompt_rows(folder: Path) -> int:
    """How many strongest conversations an index keeps, over all features."""
    kinds = arrow().parquet.read_table(folder / PROMPTS, columns=["kind"])["kind"]
    return int((kinds.to_numpy(zero_copy_only=False) == "prompt").sum())
