"""How the demo shows its steps: a title, the command that does the same, and one line when it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hubsae.recipes.view import SilentView

if TYPE_CHECKING:
    from rich.console import Console


class DemoView(SilentView):
    """Prints a heading per step; on a terminal a spinner with the step's progress below it."""

    def __init__(
        self, console: Console, titles: dict[str, str], commands: dict[str, str], outcome: Callable[[str], str]
    ):
        self.console, self.titles, self.commands, self.outcome = console, titles, commands, outcome
        self._status: Any = None

    def step_started(self, name: str, why: str) -> None:
        """A step begins."""
        self._heading(name)
        if self.console.is_terminal:
            self._status = self.console.status("working")
            self._status.start()

    def step_skipped(self, name: str) -> None:
        """A step was finished by an earlier run."""
        self._heading(name)
        self._done(name, "done by an earlier run")

    def step_finished(self, name: str, seconds: float) -> None:
        """A step ended."""
        self.stop()
        self._done(name, f"{seconds:.0f} s")

    def progress(self, done: float, total: float | None = None, text: str | None = None) -> None:
        """The running step is this far."""
        if self._status is not None:
            share = f"{100 * done / total:.0f} %" if total else ""
            self._status.update(" ".join(part for part in (text, share) if part))

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _done(self, name: str, how: str) -> None:
        came_of_it = self.outcome(name)
        self.console.print(f"  {came_of_it} ({how})" if came_of_it else f"  {how}", highlight=False, markup=False)

    def _heading(self, name: str) -> None:
        self.console.print(f"\n[bold]{self.titles.get(name, name)}[/]")
        for line in self.commands.get(name, "").splitlines():
            self.console.print(f"  [dim]$ {line}[/]", highlight=False)
