"""`python -m hubsae.scale.child`: one pickled call from standard input, in a process that may die alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from hubsae.core.extras import require


def in_child(call: Callable[[], object], **streams: Any) -> subprocess.CompletedProcess[bytes]:
    """Make a call in a process of its own; `streams` are those of `subprocess.run`."""
    dill = require("dill", extra="scale")
    return subprocess.run([sys.executable, "-m", "hubsae.scale.child"], input=dill.dumps(call), **streams)


def how_it_ended(code: int) -> str:
    """The exit code of a process in words.

    >>> how_it_ended(-9), how_it_ended(1)
    ('killed by signal 9', 'ended with code 1')
    """
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}"


if __name__ == "__main__":
    require("dill", extra="scale").load(sys.stdin.buffer)()
