"""The demo works: first time, again, after Ctrl-C, beside another, with spaces in its path, where it may not write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hubsae import HubSAE
from hubsae.formats import Release


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "hubsae.cli.main", "demo", "--fast", *args]


def demo(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args), capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=300
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo") / "a folder with spaces"
    return folder, demo("--keep", str(folder))


def test_the_whole_journey(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert "the same latents fire on every one" in done.stdout
    assert "(committed)" in done.stdout
    assert "steered" in done.stdout
    release = Release.open(folder / "release")
    release.verify()
    assert len(release) == 6
    assert len(release.plots) >= 4
    sae = release.load(layer=3, stage="ppo_step8")
    assert sae(torch.randn(4, 64)).shape == (4, 64)
    # it learned: far less of the variance is left than at the start of the chain
    fvu = [release.metadata(f"saes/{stage}/layer3").metric("fvu", "all") for stage in ("instruct_base", "ppo_step8")]
    assert fvu[1] < fvu[0] < 0.5


def test_a_second_run_repeats_nothing(finished):
    folder, _ = finished
    done = demo("--keep", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done by an earlier run") == 6
    assert "no commit made" in done.stdout


@pytest.mark.parametrize("moment", ["Harvest", "Train"])
def test_stopped_in_the_middle_it_continues(finished, tmp_path, moment):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("--keep", str(folder)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # a test run started in the background of a shell hands down an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(moment):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command continues" in out
    assert err.strip().endswith("stopped")
    assert "Traceback" not in err

    done = demo("--keep", str(folder))
    assert done.returncode == 0, done.stderr
    whole, _ = finished
    for stage in ("instruct_base", "ppo_step8"):
        one = HubSAE.from_pretrained(whole / "release" / "saes" / stage / "layer1")
        two = HubSAE.from_pretrained(folder / "release" / "saes" / stage / "layer1")
        assert torch.equal(one.W_dec, two.W_dec), "an interrupted run ends with other numbers"


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = demo("--keep", str(blocked / "run"))
    assert done.returncode == 1
    assert "cannot write to" in done.stderr
    assert "--keep" in done.stderr


@pytest.mark.slow
def test_two_at_the_same_time(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    pair = [
        subprocess.Popen(command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in "ab"
    ]
    for process in pair:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert "the same latents fire" in out
    assert len(list(tmp_path.glob("hubsae-fast*"))) == 2


def test_two_in_the_same_folder_refuse_politely(finished):
    import filelock

    folder, _ = finished
    with filelock.FileLock(folder / ".demo-lock"):
        done = demo("--keep", str(folder))
    assert done.returncode == 1
    assert "another process is running" in done.stderr
    assert "--keep" in done.stderr
