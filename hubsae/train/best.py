"""The best few checkpoints of one SAE by a metric that should be low: weights on disk, or in memory without a folder.

    RUN/best/NAME/step_00001000.safetensors + .json

Files are only removed when no state that a run could go on from speaks of them (`prune`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import atomic_path, json_text, sha256_file, write_json_atomic, writing


class Best:
    """What is kept of one SAE, best first."""

    def __init__(self, folder: Path | None, keep: int):
        self.folder, self.keep = folder, keep
        self.kept: list[dict[str, Any]] = []
        self.memory: dict[int, dict[str, Tensor]] = {}

    def offer(self, weights: dict[str, Tensor], entry: dict[str, Any], *, written: bool = False) -> bool:
        """Keep these weights if they are among the best; `entry` has `step` and `value`.

        `written` says that another rank has written them already.
        """
        if self.keep == 0:
            return False
        ranked = sorted([*self.kept, entry], key=lambda e: (e["value"], e["step"]))
        if entry not in ranked[: self.keep]:
            return False
        weights = {name: t.detach().clone().cpu() for name, t in weights.items()}
        if self.folder is None:
            self.memory[entry["step"]] = weights
        else:
            file = self._file(entry["step"])
            if not written:
                self._write(file, weights, entry)
            elif file.is_file():
                entry["sha256"] = sha256_file(file)
            else:
                hint = "give all ranks one folder: out= on a disk that they share"
                raise ConfigError(f"{file} is not here, where the first rank wrote it", hint=hint)
        self.kept = ranked[: self.keep]
        if self.folder is None:
            self.memory = {e["step"]: self.memory[e["step"]] for e in self.kept}
        return True

    def _write(self, file: Path, weights: dict[str, Tensor], entry: dict[str, Any]) -> None:
        need = sum(t.numel() * t.element_size() for t in weights.values())
        with writing(file, need, "the last state of the run is whole"):
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as temporary:
                save_file(weights, temporary)
            entry["sha256"] = sha256_file(file)
            write_json_atomic(file.with_suffix(".json"), entry)

    def load(self, entry: dict[str, Any]) -> dict[str, Tensor]:
        """The weights of a kept entry."""
        if self.folder is None:
            return self.memory[entry["step"]]
        return load_file(self.check(entry))

    def check(self, entry: dict[str, Any]) -> Path:
        """The file of a kept entry; an error where it is not what was written."""
        file = self._file(entry["step"])
        if not file.is_file() or sha256_file(file) != entry["sha256"]:
            raise FormatError(file, f"the checkpoint of sha256 {entry['sha256'][:12]}", "another or none")
        # the record beside it says what the state says; a damaged one is written anew
        record = file.with_suffix(".json")
        if not record.is_file() or record.read_bytes() != json_text(entry).encode():
            write_json_atomic(record, entry)
        return file

    def prune(self, steps: Iterable[int]) -> None:
        """Remove the files of all but these steps."""
        if self.folder is not None and self.folder.is_dir():
            known = {self._file(step).stem for step in steps}
            for file in self.folder.iterdir():
                if file.stem not in known:
                    file.unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step_{step:08d}.safetensors"
