"""Chromium without a driver: load a page, let its scripts work, hand back its DOM and what it said on the console."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Seen(NamedTuple):
    """A page as Chromium left it. `text` is the DOM with all markup taken away."""

    dom: str
    console: list[str]

    @property
    def text(self) -> str:
        body = self.dom.split("<body", 1)[1]
        return html.unescape(re.sub(r"<script.*?</script>|<[^>]*>", "", body, flags=re.DOTALL))


def look(url: str, *flags: str) -> Seen:
    """Open an address, let its scripts work for up to 20 s of page time, and read the result."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=20000", *flags, "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(done.stdout, console)
