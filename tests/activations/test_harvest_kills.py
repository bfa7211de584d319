"""A harvest killed at random, with a random bit of its folder flipped before each resume: never other values."""

from __future__ import annotations

import ast
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

SAMPLES = 120


def flip_a_bit(folder: Path, rng: random.Random) -> None:
    """One bit of one file."""
    file = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def kill_and_flip(folder: Path, kills: int) -> dict[str, int]:
    """Runs in a process of its own, which imports PyTorch once and forks a harvest at a time."""
    from test_harvest import assert_same_dataset, in_process

    from hubsae.core.errors import HubSAEError

    torch.set_num_threads(1)
    started = time.monotonic()
    in_process(folder / "whole", SAMPLES)
    usual = time.monotonic() - started
    rng, outcomes, number = random.Random(7), {"same values": 0, "typed error": 0, "kills": 0}, 0
    while outcomes["kills"] < kills:
        out, number = folder / f"run{number}", number + 1
        while True:
            pid = os.fork()
            if pid == 0:
                try:
                    in_process(out, SAMPLES)
                except HubSAEError:
                    os._exit(3)
                except BaseException:
                    traceback.print_exc()
                    os._exit(4)
                os._exit(0)
            ends = time.monotonic() + rng.uniform(0.02, usual) if rng.random() < 0.7 else float("inf")
            done = (0, 0)
            while done[0] == 0 and time.monotonic() < ends:
                done = os.waitpid(pid, os.WNOHANG)
                time.sleep(0.001)
            if done[0] == 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                outcomes["kills"] += 1
                if any(p.is_file() and p.stat().st_size for p in out.rglob("*")):
                    flip_a_bit(out, rng)
                continue
            code = os.waitstatus_to_exitcode(done[1])
            assert code in (0, 3), f"{out} ended with {code}"
            if code == 0:
                try:
                    assert_same_dataset(folder / "whole", out)
                except HubSAEError:  # a damaged file that says so when it is read is no silent damage
                    code = 3
            outcomes["typed error" if code else "same values"] += 1
            break
    return outcomes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_with_a_random_bit_flipped_before_each_resume(tmp_path):
    """Every harvest ends with the values of an undisturbed one, or with an error of ours that says what is damaged."""
    kills = int(os.environ.get("HUBSAE_KILLS", "300"))
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_harvest_kills import kill_and_flip
print(kill_and_flip(Path({str(tmp_path)!r}), {kills}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    print(outcomes)
    assert outcomes["same values"] > 0 and outcomes["kills"] >= kills
