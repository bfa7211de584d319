"""What a process is asked while it trains, Ctrl-C above all, and how its arithmetic is set meanwhile."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Signals:
    """Ctrl-C, or the SIGTERM of a scheduler: the run ends after the step it is in; a second one ends it at once."""

    number = 0

    def __enter__(self) -> Signals:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Denormal moments of silent latents make fused Adam 1.35 times slower on the CPU."""
    flushed = torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(False)
