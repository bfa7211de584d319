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


def test_ctrl_c_while_a_package_is_imported_ends_with_the_code_of_ctrl_c(tmp_path):
    (tmp_path / "stopped_here.py").write_text(
        "import hubsae.cli.main as main\n"
        "main.build = lambda: lambda **_: exec('raise KeyboardInterrupt')\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-m", "stopped_here"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "stopped\n"
