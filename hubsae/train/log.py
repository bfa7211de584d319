"""What a run says while it goes: a JSONL log always, a progress bar on a terminal, other loggers when asked.

Every line has `event`, `step` and `cell`. Events: `train` (loss, mse, fvu, l0, dead, lr, tokens_per_s), `eval`,
`before` (chains), `resample`, `checkpoint`, `failed`, `done`. A resumed run first drops the lines behind its
checkpoint, so the log reads as if nothing had happened.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from hubsae.core.errors import HubSAEError
from hubsae.core.extras import require
from hubsae.core.files import write_csv_atomic, write_text_atomic
from hubsae.train.config import TrainConfig


class Log:
    """Lines of a run, in memory and on disk."""

    def __init__(self, run: Path | None, configs: list[TrainConfig], total_steps: int, *, quiet: bool = False):
        self.path = run / "log.jsonl" if run is not None else None
        self.lines: list[dict[str, Any]] = []
        self.total, self.quiet = total_steps, quiet
        self.start = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None
        self._others = [_open(kind, run, configs[0]) for kind in configs[0].loggers]

    def resume(self, step: int) -> None:
        """Keep the lines up to a checkpoint's step."""
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line a kill cut short
            if entry["step"] <= step:
                kept.append(entry)
        self.lines = kept
        write_text_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def fresh(self) -> None:
        """Start an empty log."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def add(self, event: str, step: int, cell: str, **values: Any) -> None:
        """Append a line."""
        entry = {"event": event, "step": step, "cell": cell, **values}
        self.lines.append(entry)
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise HubSAEError(
                    f"cannot write {self.path}: {error}", hint="free some space and start again"
                ) from error
        for other in self._others:
            other(entry)

    def progress(self, step: int, text: str) -> None:
        """Move the bar; nothing where stderr is not a terminal."""
        if self.quiet or not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            from rich.console import Console

            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("training", total=self.total)
        self._bar.update(self._task, completed=step, description=text)

    def close(self) -> None:
        """Finish the bar and write the CSV."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self.path is not None:
            train = [line for line in self.lines if line["event"] in ("train", "eval")]
            write_csv_atomic(self.path.with_suffix(".csv"), train)
        for other in self._others:
            other(None)


def _open(kind: str, run: Path | None, config: TrainConfig) -> Any:
    """A function that sends a line to another logger; None closes it."""
    if kind == "tensorboard":
        require("tensorboard", extra="train")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str((run or Path()) / "tensorboard"))

        def to_tensorboard(entry: dict[str, Any] | None) -> None:
            if entry is None:
                writer.close()
                return
            for name, value in _numbers(entry).items():
                writer.add_scalar(f"{entry['cell']}/{entry['event']}/{name}", value, entry["step"])

        return to_tensorboard
    package = require(kind, extra="train")
    package.init(project=config.project_name, name=config.name, config=config.model_dump(mode="json"))

    def send(entry: dict[str, Any] | None) -> None:
        if entry is None:
            package.finish()
            return
        values = {f"{entry['cell']}/{entry['event']}/{name}": value for name, value in _numbers(entry).items()}
        if values:
            package.log(values, step=entry["step"])

    return send


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in entry.items() if isinstance(v, (int, float)) and k != "step"}
