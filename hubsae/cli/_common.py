"""What every verb shares: consoles, JSON, tables, questions."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from hubsae.core.errors import HubSAEError
from hubsae.core.text import printable

if TYPE_CHECKING:
    from rich.console import Console


def out() -> Console:
    """The console for results. Honours NO_COLOR; without a terminal it wraps at a width that fits logs."""
    return _console(stderr=False)


def err() -> Console:
    """The console for notes, progress and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, soft_wrap=not stream.isatty(), highlight=False)


def print_json(value: Any) -> None:
    """Print JSON for other programs: no colour, no wrapping."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows as a table; numbers are aligned to the right."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for i, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(
            *(
                "" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else escape(printable(cell))
                for cell in row
            )
        )
    console = out()
    if not sys.stdout.isatty():
        console.width = 200
    console.print(table)


def confirm(question: str, *, yes: bool) -> None:
    """Ask before doing; `--yes` skips. Without a terminal the answer is no, and the message says to pass --yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise HubSAEError(f"{question} (cannot ask: this is not a terminal)", hint="pass --yes to go ahead")
    typer.confirm(question, abort=True)
