"""The report of a run: measured numbers beside published ones, with the natural spread and a verdict for each.

A verdict needs a band. Where the published work repeated a measurement, the band is the range of its replicates;
where it did not, there is no verdict, only the two numbers. A run on another model (the tiny profile) is never
judged against published numbers: the table shows both and says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hubsae.core.files import write_csv_atomic, write_text_atomic

Row = Mapping[str, Any]
Verdict = Literal["in band", "below band", "above band", "no band", "not measured", "another model"]


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
    same_model: bool = True,
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
                    "verdict": _verdict(value, band, same_model),
                }
            )
    return rows


def markdown_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table; numbers with four significant digits, None as a dash.

    >>> print(markdown_table([{"layer": 6, "mse": 0.0238123}]))
    | layer | mse |
    |---|---|
    | 6 | 0.02381 |
    """
    columns = list(columns or dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """One value as a table shows it.

    >>> cell(0.000123456), cell(None), cell(12), cell("0.9994623620295897")
    ('0.0001235', '-', '12', '0.9995')
    """
    if value is None or value == "":
        return "-"
    if isinstance(value, str) and re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", value):
        value = float(value)  # a number that came out of a CSV
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


@dataclass
class Report:
    """A report in the making: text, tables (each also a CSV) and figures, in the order they are added.

    >>> import tempfile
    >>> report = Report("A run")
    >>> report.table("Results", "results", [{"layer": 6, "mse": 0.02}])
    >>> report.write(tempfile.mkdtemp()).name
    'report.md'
    """

    title: str
    _parts: list[str] = field(default_factory=list)
    _tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(text)

    def heading(self, text: str) -> None:
        """A section."""
        self._parts.append(f"## {text}")

    def table(
        self,
        title: str,
        name: str,
        rows: Sequence[Row],
        *,
        columns: Sequence[str] | None = None,
        most: int | None = None,
    ) -> None:
        """A table, also written to `<name>.csv`; `columns` and `most` limit what the page shows, not the file."""
        self._tables[name] = [dict(row) for row in rows]
        shown = list(rows)[:most] if most else list(rows)
        more = f"\n\nThe other {len(rows) - len(shown)} rows are in `{name}.csv`." if len(shown) < len(rows) else ""
        self._parts.append(f"**{title}**\n\n{markdown_table(shown, columns)}{more}" if rows else f"**{title}**: none.")

    def figure(self, caption: str, path: str | Path) -> None:
        """A picture, by its path relative to the report."""
        self._parts.append(f"![{caption}]({Path(path).as_posix()})")

    def write(self, folder: str | Path) -> Path:
        """Write `report.md` and the CSVs into `folder`."""
        out = Path(folder)
        for name, rows in self._tables.items():
            if rows:
                write_csv_atomic(out / f"{name}.csv", rows)
        body = "\n\n".join([f"# {self.title}", *self._parts])
        return write_text_atomic(out / "report.md", body + "\n")


def summary_of(rows: Sequence[Row]) -> str:
    """How many verdicts of each kind, in one line.

    >>> summary_of([{"verdict": "in band"}, {"verdict": "in band"}, {"verdict": "no band"}])
    '2 in band, 1 no band'
    """
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing to compare"


def _verdict(value: Any, band: Band | None, same_model: bool) -> Verdict:
    if value in (None, ""):
        return "not measured"
    if not same_model:
        return "another model"
    return band.verdict(float(value)) if band else "no band"


def _key(row: Row, keys: Sequence[str]) -> tuple[str, ...]:
    # as text, because one side often comes from a CSV
    return tuple(str(row.get(key)) for key in keys)


def _matches(row: Row, where: Row) -> bool:
    return all(str(row.get(key)) == str(value) for key, value in where.items())
