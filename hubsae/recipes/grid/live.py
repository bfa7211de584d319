"""The table of cells while they train: who waits, how far each is, loss, FVU, L0, dead share.

It reads the logs that the groups write, so it shows the cells of every rank, and it costs training nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubsae.core.files import read_json
from hubsae.recipes.steps import StepContext

EVERY = 1.0
"""Seconds between two looks."""


class Live:
    """Shows the cells of a training step until it is left; silent where there is no terminal.

    >>> with Live.off():
    ...     pass
    """

    def __init__(self, ctx: StepContext | None, names: Sequence[str]):
        self._ctx, self._names = ctx, list(names)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._read: dict[Path, int] = {}
        self._lines: dict[str, dict[str, Any]] = {}
        self._total: dict[Path, int] = {}

    @classmethod
    def off(cls) -> Live:
        """Shows nothing."""
        return cls(None, [])

    def __enter__(self) -> Live:
        if self._ctx is not None:
            self._thread = threading.Thread(target=self._run, name="live-table", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._ctx is not None:
            self._ctx.show(None)

    def _run(self) -> None:
        assert self._ctx is not None
        while not self._stop.wait(EVERY):
            rows = self.rows(self._ctx.folder)
            done = sum(row["share"] for row in rows)
            self._ctx.progress(done, len(rows), f"{sum(r['state'] == 'done' for r in rows)} of {len(rows)} cells")
            self._ctx.show(as_table(rows))

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """How every cell stands, in order of the sweep."""
        for log in sorted(folder.glob("groups/*/log.jsonl")):
            self._follow(log)
        out = []
        for name in self._names:
            ended = folder / "cells" / f"{name}.json"
            row: dict[str, Any] = {"id": name, "state": "waiting", "share": 0.0}
            line = self._lines.get(name)
            if line is not None:
                row |= {"state": "training", **line}
            if ended.is_file():
                told = read_json(ended)
                row |= {key: told[key] for key in ("loss", "fvu", "l0", "dead") if told[key] is not None}
                row |= {"state": told["state"], "share": 1.0, "reason": told["reason"]}
            out.append(row)
        return out

    def _follow(self, log: Path) -> None:
        """Read what a group has logged since the last look."""
        try:
            total = self._steps(log)
            with log.open("rb") as file:
                file.seek(self._read.get(log, 0))
                fresh = file.read()
        except OSError:
            return  # the group has just finished and its folder is gone
        whole, _, _ = fresh.rpartition(b"\n")
        self._read[log] = self._read.get(log, 0) + (len(whole) + 1 if whole else 0)
        for text in whole.splitlines():
            line = json.loads(text)
            if line["event"] == "train":
                known = {key: line[key] for key in ("loss", "fvu", "l0", "dead") if key in line}
                self._lines[line["cell"]] = {"share": min(1.0, line["step"] / total) if total else 0.0, **known}

    def _steps(self, log: Path) -> int:
        """Steps of a group's run, from its config."""
        if log not in self._total:
            told = read_json(log.with_name("config.json"))
            first = told["cells"][0]
            self._total[log] = max(1, round(first["epochs"] * (told["rows"] // first["batch_size"])))
        return self._total[log]


def as_table(rows: Sequence[dict[str, Any]], most: int = 40) -> Any:
    """The rows as a rich table; of many cells those that are waiting are only counted."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("cell", "state", "done", "loss", "FVU", "L0", "dead"):
        table.add_column(column, justify="left" if column in ("cell", "state") else "right")
    shown = list(rows) if len(rows) <= most else [row for row in rows if row["state"] != "waiting"][:most]
    for row in shown:
        style = {"failed": "red", "done": "green", "waiting": "dim"}.get(row["state"])
        table.add_row(
            row["id"],
            row["state"] if row["state"] != "failed" else f"failed: {row.get('reason')}",
            f"{row['share']:.0%}",
            _text(row.get("loss"), ".4g"),
            _text(row.get("fvu"), ".3f"),
            _text(row.get("l0"), ".1f"),
            _text(row.get("dead"), ".1%"),
            style=style,
        )
    if len(shown) < len(rows):
        table.add_row(f"and {len(rows) - len(shown)} more")
    return table


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
