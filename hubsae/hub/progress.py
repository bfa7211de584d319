"""Progress of an upload or download: files, bytes and rate on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What long transfers report to."""

    def start(self, what: str, files: int, size: int) -> None:
        """A transfer of `files` files and `size` bytes begins."""
        ...

    def advance(self, files: int, size: int) -> None:
        """That much more is done."""
        ...


class Silent:
    """Reports to nobody."""

    def start(self, what: str, files: int, size: int) -> None:
        """Nothing to show."""

    def advance(self, files: int, size: int) -> None:
        """Nothing to show."""


class Bar:
    """A rich progress bar on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[files]} files"),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = None
        self.done = 0

    def start(self, what: str, files: int, size: int) -> None:
        """Show a bar for this transfer."""
        self.done = 0
        self.task = self.progress.add_task(what, total=size, done=0, files=files)

    def advance(self, files: int, size: int) -> None:
        """Move the bar."""
        self.done += files
        if self.task is not None:
            self.progress.update(self.task, advance=size, done=self.done)


@contextmanager
def shown(enabled: bool | None = None) -> Iterator[Progress]:
    """A bar if somebody watches (standard error is a terminal), else silence.

    The client library's own bars are off meanwhile: two live displays garble each other, and logs want none.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        if sys.stderr.isatty() if enabled is None else enabled:
            bar = Bar()
            with bar.progress:
                yield bar
        else:
            yield Silent()
    finally:
        if not were_disabled:
            enable_progress_bars()
