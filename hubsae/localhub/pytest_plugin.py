"""pytest fixtures: a real Hub for the tests of any project.

Load with `-p hubsae.localhub.pytest_plugin`, or `pytest_plugins = ["hubsae.localhub.pytest_plugin"]` in the top
conftest.py.

- `local_hub`: a fresh hub with Xet for one test. Give `hub.env(tmp_path)` to a subprocess.
- `local_hub_factory`: make hubs with other switches: `local_hub_factory(xet=False, cdn=True)`.
- `--local-hub` (or `--local-hub=lfs`, `--local-hub=lfs+cdn`): one hub for the whole run, with `HF_ENDPOINT` and friends
  set before any test module can import huggingface_hub, so tests that use the client in this process talk to it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .server import LocalHub, running

_VARIABLES = [
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_XET_CACHE",
    "HF_DATASETS_CACHE",
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "NO_PROXY",
    "no_proxy",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--local-hub",
        nargs="?",
        const="xet",
        choices=("xet", "xet+cdn", "lfs", "lfs+cdn"),
        help="run against a local Hub server: Xet storage (default), or LFS, with or without a CDN redirect",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--local-hub")
    if not wanted:
        return
    if "huggingface_hub" in sys.modules:
        raise pytest.UsageError(
            "--local-hub: huggingface_hub was imported already; load this plugin with -p on the command line"
        )
    stack = contextlib.ExitStack()
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="local-hub-home-"))
    hub = stack.enter_context(running(xet="xet" in wanted, cdn="cdn" in wanted))
    env = hub.env(home)
    os.environ.update({name: env[name] for name in _VARIABLES})
    if "lfs" in wanted:
        os.environ["HF_HUB_DISABLE_XET"] = "1"
    config.stash[_HUB] = hub
    config.add_cleanup(stack.close)


_HUB = pytest.StashKey[LocalHub]()


@pytest.fixture(scope="session")
def session_hub(pytestconfig: pytest.Config) -> LocalHub:
    """The hub of `--local-hub`."""
    hub = pytestconfig.stash.get(_HUB, None)
    if hub is None:
        pytest.skip("needs --local-hub")
    return hub


@pytest.fixture
def local_hub_factory(tmp_path: Path) -> Iterator[Callable[..., LocalHub]]:
    """Hubs with given switches; all are stopped at the end of the test."""
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> LocalHub:
            settings.setdefault("root", tmp_path / f"hub{len(made)}")
            made.append(stack.enter_context(running(**settings)))
            return made[-1]

        made: list[LocalHub] = []
        yield make


@pytest.fixture
def local_hub(local_hub_factory: Callable[..., LocalHub]) -> LocalHub:
    """A fresh hub with Xet."""
    return local_hub_factory()
