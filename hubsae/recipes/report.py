"""The report of a run: text, tables that are files too, and figures, in the order they are added."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubsae.core.files import write_csv_atomic, write_text_atomic

Row = Mapping[str, Any]


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
