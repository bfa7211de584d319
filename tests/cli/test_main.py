"""The command line answers: help, version, wrong verbs, one-line errors, exit codes."""

from __future__ import annotations

import subprocess
import sys


def hubsae(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hubsae.cli.main", *args], capture_output=True, text=True, check=False)


def test_help_lists_every_verb():
    from hubsae.cli.main import verbs

    done = hubsae("--help")
    assert done.returncode == 0
    for verb in verbs():
        assert verb.replace("_", "-") in done.stdout


def test_version():
    from hubsae import __version__

    assert hubsae("--version").stdout.strip() == f"hubsae {__version__}"


def test_a_wrong_verb_is_a_usage_error():
    done = hubsae("frobnicate")
    assert done.returncode == 2
    assert "frobnicate" in done.stderr
    assert "Traceback" not in done.stderr
