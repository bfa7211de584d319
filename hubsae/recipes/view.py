"""How a run is shown: one line per step, and a bar for the step that is running when there is a terminal."""

from __future__ import annotations

import sys
from typing import Any, Protocol


class View(Protocol):
    """Told what a run does."""

    def start(self, steps: int) -> None: ...
    def step_started(self, name: str, why: str) -> None: ...
    def step_skipped(self, name: str) -> None: ...
    def step_finished(self, name: str, seconds: float) -> None: ...
    def progress(self, done: float, total: float | None = None, text: str | None = None) -> None: ...
    def show(self, renderable: Any) -> None: ...
    def stop(self) -> None: ...


class SilentView:
    """Shows nothing.

    >>> SilentView().step_started("world", "")
    """

    def start(self, steps: int) -> None:
        """A run of this many steps begins."""

    def step_started(self, name: str, why: str) -> None:
        """A step begins; `why` says why it runs again."""

    def step_skipped(self, name: str) -> None:
        """A step was finished already."""

    def step_finished(self, name: str, seconds: float) -> None:
        """A step ended."""

    def progress(self, done: float, total: float | None = None, text: str | None = None) -> None:
        """The running step is this far."""

    def show(self, renderable: Any) -> None:
        """Something to show while the step runs."""

    def stop(self) -> None:
        """The run ended, well or not."""


class ConsoleView:
    """One line per step on stderr; a progress bar below it when stderr is a terminal.

    >>> ConsoleView().stop()
    """

    def __init__(self) -> None:
        from rich.console import Console

        terminal = sys.stderr.isatty()
        self._console = Console(stderr=True, highlight=False, soft_wrap=not terminal)
        self._terminal = terminal
        self._bar: Any = None
        self._task: Any = None
        self._below: Any = None
        self._number = 0
        self._steps = 0
        self._name = ""

    def start(self, steps: int) -> None:
        """A run of this many steps begins."""
        self._number, self._steps = 0, steps
        if self._terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            view = self

            class Bars(Progress):
                def get_renderables(self) -> Any:
                    yield from super().get_renderables()
                    if view._below is not None:
                        yield view._below

            self._bar = Bars(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True,
            )  # fmt: skip
            self._bar.start()

    def step_started(self, name: str, why: str) -> None:
        """A step begins; `why` says why it runs again."""
        self._number += 1
        self._name = name
        reason = f" ({why})" if why else ""
        if self._bar is None:
            self._line(f"{name}{reason} ...")
        else:
            self._task = self._bar.add_task(f"{name}{reason}", total=None)

    def step_skipped(self, name: str) -> None:
        """A step was finished already."""
        self._number += 1
        self._line(f"{name}: unchanged, skipped")

    def step_finished(self, name: str, seconds: float) -> None:
        """A step ended."""
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self._line(f"{name}: done in {seconds:.1f} s")

    def progress(self, done: float, total: float | None = None, text: str | None = None) -> None:
        """The running step is this far."""
        if self._bar is not None and self._task is not None:
            label = f"{self._name}: {text}" if text else self._name
            self._bar.update(self._task, completed=done, total=total, description=label)

    def show(self, renderable: Any) -> None:
        """Something of rich below the bar, until the next call."""
        self._below = renderable

    def stop(self) -> None:
        """The run ended, well or not."""
        self._below = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _line(self, text: str) -> None:
        self._console.print(f"[{self._number}/{self._steps}] {text}", markup=False)
