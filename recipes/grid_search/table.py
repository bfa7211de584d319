"""Rows of a grid: a cell with its numbers, each with interval and token count; results.csv and results_full.csv.

Columns up to `Frac Rec %` mean what the published tables meant by them; `Frac Rec %` is L_base / L_sae and so no
fraction of anything recovered. Everything after them is named as in `hubsae.evals`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hubsae.core.errors import FormatError
from hubsae.core.files import write_csv_atomic

from .cells import KINDS, Cell

FULL = (
    "mse", "nmse_pooled", "fvu", "l0", "dead_fraction", "n_dead", "ce_clean", "ce_sae", "ce_mean", "ce_zero",
    "delta_ce", "frac_recovered_mean", "frac_recovered_zero", "kl",
)  # fmt: skip
"""Metrics of results_full.csv, each with its interval and the tokens it rests on."""
BOTH_WAYS = ("mse", "nmse_pooled", "fvu", "l0")
"""Those that are also given without the first position of each text, or with it where the SAEs are not for it."""
WITHOUT_FIRST, WITH_FIRST = "no_position_0", "all"
KEYS = (*FULL, *(f"{name}@{scope}" for scope in (WITHOUT_FIRST, WITH_FIRST) for name in BOTH_WAYS))
"""All of them: numbers are those of the SAE's own scope; `fvu@all` is fvu over all tokens."""


class Number(NamedTuple):
    """A measured value."""

    value: float
    low: float | None = None
    high: float | None = None
    n_tokens: int | None = None

    def text(self, digits: int = 3) -> str:
        """For people: value and interval.

        >>> Number(0.123456, 0.11, 0.14).text()
        '0.123 [0.11, 0.14]'
        """
        inside = "" if self.low is None or self.high is None else f" [{self.low:.{digits}g}, {self.high:.{digits}g}]"
        return f"{self.value:.{digits}g}{inside}"


@dataclass(frozen=True)
class GridRow:
    """One cell and its numbers, by metric; `fvu@no_position_0` is fvu in that scope.

    >>> GridRow(Cell("topk", 8, 64), {"l0": Number(64.0)}).value("l0")
    64.0
    """

    cell: Cell
    numbers: dict[str, Number] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The cell's id."""
        return self.cell.id

    def value(self, metric: str) -> float | None:
        """The value of a metric, None where it was not measured."""
        number = self.numbers.get(metric)
        return None if number is None else number.value

    @property
    def frac_rec(self) -> float | None:
        """What the published tables call so: loss of the model over loss with the SAE."""
        clean, sae = self.value("ce_clean"), self.value("ce_sae")
        return None if clean is None or sae is None or sae == 0 else clean / sae


def compact_row(row: GridRow) -> dict[str, Any]:
    """A row of results.csv: the published columns, then ours."""
    dead = row.value("dead_fraction")
    return {
        "Type": KINDS[row.cell.kind],
        "Expansion": f"{row.cell.expansion:g}",
        "K": row.cell.k,
        "Threshold": row.cell.threshold,
        "L0 target": None if row.cell.l0_target is None else f"{row.cell.l0_target:g}",
        **({"Seed": row.cell.seed} if row.cell.seed else {}),
        "Val MSE": _short(row.value("mse")),
        "NMSE": _short(row.value("nmse_pooled")),
        "L0": _short(row.value("l0")),
        "Dead %": None if dead is None else f"{100 * dead:.2f}",
        "FVU": _short(row.value("fvu")),
        "Delta CE": _short(row.value("delta_ce")),
        "Recovered (mean)": _short(row.value("frac_recovered_mean")),
    }


def full_row(row: GridRow) -> dict[str, Any]:
    """A row of results_full.csv: everything, with intervals and token counts."""
    dead, ratio = row.value("dead_fraction"), row.frac_rec
    out: dict[str, Any] = {
        "id": row.id,
        "Type": KINDS[row.cell.kind],
        "Expansion": f"{row.cell.expansion:g}",
        "K": row.cell.k,
        "Threshold": row.cell.threshold,
        "L0 target": row.cell.l0_target,
        "Seed": row.cell.seed,
        "Val MSE": row.value("mse"),
        "NMSE": row.value("nmse_pooled"),
        "L0": row.value("l0"),
        "Dead %": None if dead is None else 100 * dead,
        "Delta Loss": row.value("delta_ce"),
        "Frac Rec %": None if ratio is None else 100 * ratio,
    }
    for metric in KEYS:
        number = row.numbers.get(metric)
        out[metric] = None if number is None else number.value
        out[f"{metric}_low"] = None if number is None else number.low
        out[f"{metric}_high"] = None if number is None else number.high
        out[f"{metric}_n_tokens"] = None if number is None else number.n_tokens
    return out


def write_results(folder: str | Path, rows: Sequence[GridRow]) -> tuple[Path, Path]:
    """Write results.csv and results_full.csv; rows come out by kind, expansion and number."""
    root, ordered = Path(folder), in_order(rows)
    return (
        write_csv_atomic(root / "results.csv", _aligned([compact_row(row) for row in ordered])),
        write_csv_atomic(root / "results_full.csv", _aligned([full_row(row) for row in ordered])),
    )


def read_results(path: str | Path) -> list[GridRow]:
    """Read a results_full.csv back."""
    file = Path(path)
    rows = []
    with file.open(encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            if "id" not in line:
                raise FormatError(file, "a results_full.csv with the column id", f"columns {', '.join(line)}")
            rows.append(_read_row(line))
    return rows


def in_order(rows: Iterable[GridRow]) -> list[GridRow]:
    """By kind as in KINDS, then expansion, number and seed."""
    kinds = list(KINDS)
    return sorted(rows, key=lambda r: (kinds.index(r.cell.kind), r.cell.expansion, r.cell.number, r.cell.seed))


def _read_row(line: dict[str, str]) -> GridRow:
    from .cells import parse_id

    numbers = {}
    for metric in KEYS:
        value = _number(line.get(metric))
        if value is not None:
            tokens = _number(line.get(f"{metric}_n_tokens"))
            numbers[metric] = Number(
                value,
                _number(line.get(f"{metric}_low")),
                _number(line.get(f"{metric}_high")),
                None if tokens is None else int(tokens),
            )
    return GridRow(parse_id(line["id"]), numbers)


def _aligned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows with the same columns; columns that are empty in every row are left out."""
    columns: list[str] = []
    for row in rows:
        for position, name in enumerate(row):
            if name not in columns:
                columns.insert(position, name)
    kept = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    return [{name: row.get(name) for name in kept} for row in rows]


def _short(value: float | None) -> str | None:
    return None if value is None or not math.isfinite(value) else f"{value:.5g}"


def _number(text: str | None) -> float | None:
    return float(text) if text not in (None, "") else None
