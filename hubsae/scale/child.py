"""One call in a process of its own, which may die alone: it travels pickled, over standard input."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from hubsae.core.extras import require


def in_child(call: Callable[[], object], **streams: Any) -> subprocess.CompletedProcess[bytes]:
    """Make a call in a process of its own; `streams` are those of `subprocess.run`."""
    dill = require("dill", extra="scale")
    command = [sys.executable, "-c", "from hubsae.scale.child import main; main()"]
    return subprocess.run(command, input=dill.dumps(call), **streams)


def main() -> None:
    """Make the call that stands on standard input."""
    require("dill", extra="scale").load(sys.stdin.buffer)()


def how_it_ended(code: int) -> str:
    """The exit code of a process in words.

    >>> how_it_ended(-9), how_it_ended(1)
    ('killed by signal 9', 'ended with code 1')
    """
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
