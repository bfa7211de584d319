"""Measured numbers beside published ones, with the natural spread and a verdict for each.

A verdict needs a band. Where the published work repeated a measurement, the band is the range of its replicates;
where it did not, there is no verdict, only the two numbers. A run on another model (the tiny profile) is not judged
against published numbers at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
Verdict = Literal["in band", "below band", "above band", "no band", "not measured"]


@dataclass(frozen=True)
class Band:
    """The range in which replicates of one published number lie.

    >>> Band({"layer": 6}, "mse", 0.0235, 0.0251).verdict(0.024)
    'in band'
    """

    where: Row
    """The key columns it applies to; a row matches when it agrees on all of them."""
    metric: str
    low: float
    high: float

    def verdict(self, value: float) -> Verdict:
        """Where `value` lies."""
        return "below band" if value < self.low else "above band" if value > self.high else "in band"


def compare(
    ours: Sequence[Row],
    published: Sequence[Row],
    *,
    keys: Sequence[str],
    metrics: Sequence[str],
    bands: Sequence[Band] = (),
) -> list[dict[str, Any]]:
    """One row per published number: published value, band, our value, verdict.

    >>> compare([{"layer": 6, "mse": 0.03}], [{"layer": "6", "mse": "0.0238"}], keys=["layer"], metrics=["mse"],
    ...         bands=[Band({"layer": 6}, "mse", 0.0235, 0.0251)])[0]["verdict"]
    'above band'
    """
    mine = {_key(row, keys): row for row in ours}
    rows = []
    for row in published:
        for metric in metrics:
            if row.get(metric) in (None, ""):
                continue
            band = next((b for b in bands if b.metric == metric and _matches(row, b.where)), None)
            value = mine.get(_key(row, keys), {}).get(metric)
            rows.append(
                {key: row[key] for key in keys}
                | {
                    "metric": metric,
                    "published": float(row[metric]),
                    "low": band.low if band else None,
                    "high": band.high if band else None,
                    "measured": None if value in (None, "") else float(value),
                    "verdict": _verdict(value, band),
                }
            )
    return rows


def summary_of(rows: Sequence[Row]) -> str:
    """How many verdicts of each kind, in one line.

    >>> summary_of([{"verdict": "in band"}, {"verdict": "in band"}, {"verdict": "no band"}])
    '2 in band, 1 no band'
    """
    counts = Counter(row["verdict"] for row in rows)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing to compare"


def _verdict(value: Any, band: Band | None) -> Verdict:
    if value in (None, ""):
        return "not measured"
    return band.verdict(float(value)) if band else "no band"


def _key(row: Row, keys: Sequence[str]) -> tuple[str, ...]:
    # as text, because one side often comes from a CSV
    return tuple(str(row.get(key)) for key in keys)


def _matches(row: Row, where: Row) -> bool:
    return all(str(row.get(key)) == str(value) for key, value in where.items())
