"""How long work shows itself, everywhere the same: a bar on a terminal, one line a minute elsewhere.

    with progress("harvest", total=200_000, unit="tokens") as task:
        task.advance(512)
        task.note("layer 15")          # what is going on now

On a terminal there is one display for the whole process, so tasks within tasks are lines of one picture. Without one
(a log file, a scheduler) a task says how far it is at most once a minute. Ranks other than the first say nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hubsae.core.text import format_bytes, format_count, format_time

EVERY = 60.0
"""Seconds between two lines where there is no terminal."""


class Task:
    """Work that is going on: how much is done of how much."""

    def __init__(self, name: str, total: float | None = None, unit: str = ""):
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self.text = ""
        self.started = time.monotonic()
        self.first: float | None = None
        """What was done already when the work (re)started; it does not count for the rate."""

    def advance(self, amount: float = 1) -> None:
        """That much more is done."""
        self.update(self.done + amount)

    def update(self, done: float, total: float | None = None) -> None:
        """This much is done in all."""
        self.done = done
        if total is not None:
            self.total = total
        self._changed()

    def resumed(self, done: float) -> None:
        """An earlier run had done this much."""
        self.first = done
        self.update(done)

    def report(self, done: float, total: float | None = None, text: str | None = None) -> None:
        """How far it is and what is going on, for those who are handed a plain function."""
        if text is not None:
            self.text = text
        self.update(done, total)

    def note(self, text: str) -> None:
        """What is going on at the moment, shown behind the name."""
        self.text = text
        self._changed()

    def line(self) -> str:
        """How far it is, in one line.

        >>> task = Task("harvest", 1000, "tokens"); task.done = 250; task.started = time.monotonic() - 10
        >>> task.line()
        'harvest: 250 of 1k tokens (25 %), 25 tokens/s, 30 s left'
        """
        rate, parts = self._rate(), self._amounts()
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"{format_time((self.total - self.done) / rate)} left")
        return f"{self.name}{f' ({self.text})' if self.text else ''}: {', '.join(parts)}"

    def _rate(self) -> float:
        return (self.done - (self.first or 0)) / max(time.monotonic() - self.started, 1e-9)

    def _amounts(self) -> list[str]:
        """How much is done, and how much in a second."""
        rate, unit = self._rate(), "" if self.unit in ("", "bytes") else f" {self.unit}"
        amount = f"{self._number(self.done)}{unit}"
        if self.total:
            share = 100 * self.done / self.total
            amount = f"{self._number(self.done)} of {self._number(self.total)}{unit} ({share:.0f} %)"
        return [amount, *([f"{self._number(rate)}{unit}/s"] if self.unit and rate else [])]

    def _number(self, value: float) -> str:
        return format_bytes(value) if self.unit == "bytes" else format_count(value)

    def _changed(self) -> None:
        """Show it."""


class _Lines(Task):
    """A line a minute on standard error."""

    said = 0.0

    def _changed(self) -> None:
        now = time.monotonic()
        if now - max(self.said, self.started) >= EVERY:
            self.said = now
            print(self.line(), file=sys.stderr, flush=True)


class _Bar(Task):
    """A line of the display."""

    display: _Display
    id: Any = None

    def _changed(self) -> None:
        text = "  ".join([*self._amounts(), *([self.text] if self.text else [])])
        self.display.bars.update(self.id, completed=self.done, total=self.total, description=self.name, text=text)


class _Display:
    """The one live picture of a process: a line per task."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.users = 0
        self.bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}", markup=False), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip


_lock = threading.RLock()
_display: _Display | None = None


def _first_rank() -> bool:
    return int(os.environ.get("RANK", "0") or 0) == 0


@contextmanager
def progress(name: str, total: float | None = None, unit: str = "", *, show: bool | None = None) -> Iterator[Task]:
    """Work that takes a while; `show=False` keeps it silent, True asks for a bar wherever it runs.

    >>> with progress("reading", total=2, show=False) as task:
    ...     task.advance()
    ...     task.done
    1.0
    """
    if show is False or not _first_rank():
        yield Task(name, total, unit)
    elif show or sys.stderr.isatty():
        with _bar(name, total, unit) as task:
            yield task
    else:
        yield _Lines(name, total, unit)


@contextmanager
def _bar(name: str, total: float | None, unit: str) -> Iterator[Task]:
    global _display
    with _lock:
        if _display is None:
            _display = _Display()
            _display.bars.start()
        display = _display
        display.users += 1
        task = _Bar(name, total, unit)
        task.display, task.id = display, display.bars.add_task(name, total=total, text="")
    try:
        yield task
    finally:
        with _lock:
            display.bars.remove_task(task.id)
            display.users -= 1
            if display.users == 0:
                display.bars.stop()
                _display = None


def say(text: str) -> None:
    """A line to the person who waits, above the bar where there is one; from the first rank only."""
    if not _first_rank():
        return
    if _display is not None:
        _display.bars.console.print(text, markup=False, highlight=False)
    else:
        print(text, file=sys.stderr, flush=True)
