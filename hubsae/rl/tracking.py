"""Sends metrics to trackio or wandb where one is installed and asked for; the CSV is written either way."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hubsae.core.extras import require


class Tracker:
    """Logs rows of numbers to the chosen tracker.

    >>> with Tracker("none", Path("run")) as tracker:
    ...     tracker.log(1, {"reward": 0.5})
    """

    def __init__(self, kind: str, folder: Path):
        self._kind = _chosen(kind)
        self._name = folder.parent.name or "run"
        # wandb leaves its files in the working folder unless told otherwise
        self._options = {"dir": str(folder)} if self._kind == "wandb" else {}
        self._run: Any = None

    def __enter__(self) -> Tracker:
        if self._kind != "none":
            module = require(self._kind, extra="train")
            self._run = module.init(project="hubsae", name=self._name, **self._options)
        return self

    def log(self, step: int, row: dict[str, float]) -> None:
        """One row of metrics."""
        if self._run is not None:
            require(self._kind, extra="train").log({"step": step, **row})

    def __exit__(self, *_: object) -> None:
        if self._run is not None:
            require(self._kind, extra="train").finish()


def _chosen(kind: str) -> str:
    if kind != "auto":
        return kind
    if find_spec("trackio") is not None:
        return "trackio"
    # wandb sends data away: take it unasked only where the user has set it up
    configured = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
    return "wandb" if configured and find_spec("wandb") is not None else "none"
