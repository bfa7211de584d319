"""Where the numbers of a run go beside its own files: trackio, wandb or tensorboard, installed and asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hubsae.core.errors import MissingExtraError
from hubsae.core.extras import require


def chosen(kind: str) -> str:
    """What `auto` means here; every other kind is itself.

    >>> chosen("tensorboard")
    'tensorboard'
    """
    if kind != "auto":
        return kind
    if find_spec("trackio") is not None:
        return "trackio"
    # wandb sends data away: take it unasked only where the user has set it up
    configured = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
    return "wandb" if configured and find_spec("wandb") is not None else "none"


def package(kind: str) -> ModuleType:
    """The package of a tracker, or an error that says how to install it."""
    try:
        return require(kind, extra="train")
    except MissingExtraError as error:
        # no extra brings the trackers: they are the user's choice
        raise MissingExtraError(f"tracker {kind!r}: {error.message}", hint=f"pip install -U {kind}") from error


class Tracker:
    """One run in one tracker; `none` takes everything and keeps nothing.

    `resumed_at` is the last step whose numbers stay, where a run is taken up again.

    >>> with Tracker("none", Path("run"), name="mine") as tracker:
    ...     tracker.log(1, {"reward": 0.5})
    """

    def __init__(
        self,
        kind: str,
        folder: Path | None,
        *,
        name: str,
        project: str = "hubsae",
        config: Mapping[str, Any] | None = None,
        resumed_at: int | None = None,
    ):
        kind = chosen(kind)
        self._run: Any = None
        self._writer: Any = None
        if kind == "none":
            return
        self._run = package(kind)
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # what an earlier process wrote behind its checkpoint is not shown
            behind = None if resumed_at is None else resumed_at + 1
            self._writer = SummaryWriter(str((folder or Path()) / "tensorboard"), purge_step=behind)
            return
        # wandb leaves its files in the working folder unless told otherwise
        place = {"dir": str(folder)} if kind == "wandb" and folder is not None else {}
        self._run.init(project=project, name=name, config=dict(config or {}), **place)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        elif self._run is not None and values:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Nothing more will come."""
        if self._writer is not None:
            self._writer.close()
        elif self._run is not None:
            self._run.finish()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
