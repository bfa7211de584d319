"""What a run writes down while it goes: a JSONL log always, other loggers when asked.

Every line has `event`, `step` and `cell`. Events: `train` (loss, mse, fvu, l0, dead, lr, tokens_per_s), `eval`,
`before` (chains), `resample`, `checkpoint`, `failed`, `done`. A resumed run first drops the lines behind its
checkpoint, so the log reads as if nothing had happened; trackio and wandb then get a new run of the same name
that begins with the lines kept.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hubsae.core.files import write_csv_atomic, write_text_atomic, writing
from hubsae.core.progress import say
from hubsae.core.tracking import Tracker, package
from hubsae.train.config import TrainConfig


class Log:
    """Lines of a run, in memory and on disk."""

    def __init__(self, run: Path | None, config: TrainConfig):
        self.path = run / "log.jsonl" if run is not None else None
        self.lines: list[dict[str, Any]] = []
        self._config, self._run = config, run
        self._trackers: list[Tracker] | None = None
        for kind in config.loggers:
            package(kind)  # said at once where it is missing; opened when there is a line to send

    def mark(self) -> dict[str, Any] | None:
        """The lines so far, for a state: their size and sha256."""
        if self.path is None:
            return None
        text = self.path.read_bytes()
        return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}

    def resume(self, mark: dict[str, Any] | None) -> None:
        """Keep the lines of a mark; those that were damaged are left out, and said to be."""
        if self.path is None or mark is None:
            return
        content = self.path.read_bytes()[: mark["bytes"]] if self.path.exists() else b""
        lines = content.decode(errors="replace").splitlines()
        if hashlib.sha256(content).hexdigest() == mark["sha256"]:
            self.lines = [json.loads(line) for line in lines]
        else:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self.lines.append({**entry, "event": str(entry["event"]), "cell": str(entry["cell"])})
            say(f"{self.path} was damaged: {len(self.lines)} of its {len(lines)} lines are kept, some may be wrong")
        write_text_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in self.lines))

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
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if self._trackers is None:
            self._trackers = [self._tracker(kind, self.lines[:-1]) for kind in self._config.loggers]
        for tracker in self._trackers:
            tracker.log(step, _numbers(entry))

    def _tracker(self, kind: str, before: list[dict[str, Any]]) -> Tracker:
        """A tracker, opened; `before` are lines of a run taken up again, which tensorboard has and others get anew."""
        config = self._config
        settings = {"name": config.name, "project": config.project_name, "config": config.model_dump(mode="json")}
        tracker = Tracker(kind, self._run, resumed_at=before[-1]["step"] if before else None, **settings)
        for entry in before if kind != "tensorboard" else []:
            tracker.log(entry["step"], _numbers(entry))
        return tracker

    def close(self) -> None:
        """Write the CSV, and close the trackers."""
        if self.path is not None:
            train = [line for line in self.lines if line["event"] in ("train", "eval")]
            write_csv_atomic(self.path.with_suffix(".csv"), train)
        for tracker in self._trackers or []:
            tracker.close()
        self._trackers = None


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by `cell/event/name`."""
    numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float)) and k != "step"}
    return {f"{entry['cell']}/{entry['event']}/{name}": value for name, value in numbers.items()}
