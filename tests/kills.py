"""Work killed at random moments, with a random bit of its folder flipped before each resume: what it must survive."""

from __future__ import annotations

import ast
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from hubsae.core.errors import HubSAEError


def flip_a_bit(folder: Path, rng: random.Random) -> Path:
    """One bit of one file."""
    file = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return file


def kill_and_flip(
    work: Callable[[Path], object],
    check: Callable[[Path], object],
    folder: Path,
    *,
    kills: int,
    longest: float,
    share: float,
    seed: int,
) -> dict[str, int]:
    """Work again and again; a `share` of its starts is killed within `longest` seconds, a bit flipped before the next.

    What ends well has to pass `check`; all else has to end with an error of ours. The process forks a worker at a
    time, so it has to be one of its own that imports PyTorch once: thirty kills a minute.
    """
    torch.set_num_threads(1)
    rng, outcomes, number = random.Random(seed), {"whole": 0, "typed error": 0, "kills": 0}, 0
    while outcomes["kills"] < kills:
        out, number = folder / f"run{number}", number + 1
        while (code := _once(work, out, rng.uniform(0.02, longest) if rng.random() < share else None)) is None:
            outcomes["kills"] += 1
            if any(p.is_file() and p.stat().st_size for p in out.rglob("*")):
                flip_a_bit(out, rng)
        assert code in (0, 3), f"{out} ended with {code}"
        if code == 0:
            try:
                check(out)
            except HubSAEError:  # a damaged file that says so when it is read is no silent damage
                code = 3
        outcomes["typed error" if code else "whole"] += 1
    return outcomes


def _once(work: Callable[[Path], object], out: Path, seconds: float | None) -> int | None:
    """The exit code of a fork that works, 3 for an error of ours; None where it was killed before it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            work(out)
        except HubSAEError:
            os._exit(3)
        except BaseException:
            traceback.print_exc()
            os._exit(4)
        os._exit(0)
    ends = float("inf") if seconds is None else time.monotonic() + seconds
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def in_a_process(test: str, call: str) -> dict[str, int]:
    """What `call` of a test module (its `__file__`) gives, evaluated in a process of its own."""
    file = Path(test)
    code = f"import sys; sys.path[:0] = [{str(file.parent)!r}, {str(Path(__file__).parent)!r}]; "
    code += f"from pathlib import Path, PosixPath; import {file.stem} as here; print(here.{call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    print(outcomes)
    return outcomes
