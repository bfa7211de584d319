"""A list of SAEs as a table: the few columns by which one is chosen, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from hubsae.core.extras import require
from hubsae.core.text import format_bytes, printable

COLUMNS = ("id", "layer", "stage", "architecture", "d_sae", "k", "scope")
HEADLINE = ("fvu", "l0", "dead_fraction", "frac_recovered_mean", "kl", "delta_ce")
"""Metrics that are shown first, in the scope that the SAE is for, which is named where it is not all tokens."""
NOT_METRICS = frozenset({*COLUMNS, "d_in", "hook_point", "bytes", "format", "file"})
MOST_METRICS = 6


class SAETable(list[dict[str, Any]]):
    """A list of rows (dicts with everything that is known) that prints as a table, in a terminal and in a notebook.

    >>> print(SAETable([{"id": "layer6", "layer": 6, "k": 64, "hook_point": "model.layers.6", "bytes": 51_416_064}]))
    id      layer   k     size
    layer6      6  64  51.4 MB
    """

    def columns(self, all: bool = False) -> list[str]:
        """Columns in which any row says something: the few that are shown, or all."""
        names = dict.fromkeys(key for row in self for key in row)
        told = [name for name in names if any(row.get(name) is not None for row in self)]
        if all:
            return told
        wanted = [name for name in COLUMNS if name in told] + self._metrics(told)
        return wanted + [name for name in ("file", "format", "bytes") if name in told]

    def _metrics(self, told: Sequence[str]) -> list[str]:
        """Metrics that any row has in its own scope, the telling ones first."""
        names = [name for name in told if name not in NOT_METRICS]
        plain = dict.fromkeys(name.partition("@")[0] for name in names)
        order = [name for name in HEADLINE if name in plain] or list(plain)
        return [name for name in order if any(headline(row, name) is not None for row in self)][:MOST_METRICS]

    def cell(self, row: dict[str, Any], name: str, all: bool = False) -> str:
        """What stands in a column, as text; a headline metric is that of the row's own scope."""
        value = row.get(name) if all or name in NOT_METRICS else headline(row, name)
        if value is None:
            return ""
        if name == "bytes":
            return format_bytes(value)
        return f"{value:.4g}" if isinstance(value, float) else printable(value)

    def text(self, all: bool = False) -> str:
        """As lines, with the few columns or with all."""
        names = self.columns(all)
        lines = [[_title(name) for name in names], *([self.cell(row, name, all) for name in names] for row in self)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        right = [any(isinstance(row.get(name), int | float) for row in self) for name in names]
        return "\n".join(
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
            for line in lines
        )

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        names = self.columns()
        return html_table([_title(name) for name in names], [[self.cell(row, name) for name in names] for row in self])

    def to_pandas(self) -> Any:
        """A pandas DataFrame with all columns."""
        return require("pandas", extra="train").DataFrame(list(self))


def headline(row: dict[str, Any], name: str) -> Any:
    """A metric of a row in the scope that its SAE is for."""
    return row.get(f"{name}@{row['scope']}" if row.get("scope") else name)


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; every cell is text."""
    top = "".join(f"<th>{escape(printable(name))}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(printable(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _title(name: str) -> str:
    return "size" if name == "bytes" else printable(name)
