"""One progress display: a bar on a terminal, a line a minute elsewhere, silence when asked."""

import pty
import subprocess
import sys
import time

from hubsae.core import progress as module
from hubsae.core.progress import progress, say

CODE = """
import time
from hubsae.core.progress import progress, say
with progress("outer", total=4, unit="tokens") as outer:
    for _ in range(4):
        with progress("inner [layer]", total=2) as inner:
            inner.advance(2)
            time.sleep(0.1)
        outer.advance()
    say("half [way]")
"""


def test_without_a_terminal_there_is_a_line_a_minute_and_no_bar(capsys, monkeypatch):
    with progress("harvest", total=100, unit="tokens") as task:
        task.advance(10)
        assert capsys.readouterr().err == ""
        task.started = time.monotonic() - 61
        task.advance(10)
        task.advance(10)
    assert capsys.readouterr().err.splitlines() == ["harvest: 20 of 100 tokens (20 %), 0.328 tokens/s, 4 min 4 s left"]


def test_what_an_earlier_run_did_does_not_count_for_the_rate():
    task = module.Task("harvest", 100, "tokens")
    task.resumed(50)
    task.started = time.monotonic() - 10
    task.advance(10)
    assert task.line() == "harvest: 60 of 100 tokens (60 %), 1 tokens/s, 40 s left"


def test_other_ranks_and_show_false_say_nothing(capsys, monkeypatch):
    for show, rank in ((False, "0"), (None, "1")):
        monkeypatch.setenv("RANK", rank)
        with progress("x", total=2, show=show) as task:
            task.started -= 100
            task.advance()
            say("hello" if rank == "1" else "")
    assert capsys.readouterr().err.strip() == ""


def test_tasks_within_tasks_share_one_display_on_a_terminal():
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", CODE], stderr=theirs, timeout=60)
    import os

    shown = os.read(ours, 1 << 20).decode()
    assert done.returncode == 0
    assert "outer" in shown and "inner [layer]" in shown and "half [way]" in shown
    assert module._display is None
