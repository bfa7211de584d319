"""Saved state of a run: whole or not at all, the last one and the best ones, resumable to the bit.

    RUN/config.json                      the settings of every cell
    RUN/log.jsonl                        one line per event
    RUN/state/step_00001000/             everything a resume needs: NAME.safetensors per cell, state.json
    RUN/best/NAME/step_00001000.safetensors + .json      weights and metric of the best ones

A state is written beside its place, synced, and renamed; then older ones are removed. A kill leaves the old or the
new one, never half of either.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hubsae.core.errors import FormatError, TrainingError
from hubsae.core.files import atomic_path, read_json, write_json_atomic
from hubsae.train.state import Cell

_STEP = re.compile(r"step_(\d{8})")


def save(run: Path, cells: list[Cell], step: int, state: dict[str, Any], *, suffix: str = "") -> Path:
    """Write the state of `step` and remove older ones."""
    folder = run / f"state{suffix}"
    target = folder / f"step_{step:08d}"
    scratch: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".writing_", dir=folder))
        for cell in cells:
            tensors = {name: t.contiguous().cpu() for name, t in cell.tensors().items()}
            _save_synced(tensors, scratch / f"cell{cell.index}.safetensors")
        state = {**state, "step": step, "cells": [cell.scalars() for cell in cells]}
        with open(scratch / "state.json", "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
        _sync_folder(folder)
    except OSError as error:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        last = latest(run, suffix=suffix)
        raise TrainingError(
            f"cannot write the checkpoint of step {step} into {folder}: {error}",
            hint=(f"the state of {last.name} is whole; " if last else "")
            + "free some space and start the same command again: it goes on from the last checkpoint",
        ) from error
    for old in _states(folder):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _save_synced(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _STEP.fullmatch(p.name))


def latest(run: Path, *, suffix: str = "") -> Path | None:
    """The newest whole state of a run; leavings of a kill are cleared."""
    folder = run / f"state{suffix}"
    if folder.is_dir():
        for leaving in folder.glob(".writing_*"):
            shutil.rmtree(leaving, ignore_errors=True)
    found = _states(folder)
    return found[-1] if found else None


def load(path: Path, cells: list[Cell]) -> dict[str, Any]:
    """Fill cells from a state; the rest of it is returned."""
    state = read_json(path / "state.json")
    if len(state["cells"]) != len(cells):
        raise FormatError(path, f"a state of {len(cells)} SAEs", f"one of {len(state['cells'])}")
    for cell, scalars in zip(cells, state["cells"], strict=True):
        file = path / f"cell{cell.index}.safetensors"
        tensors = load_file(file)
        expected = {name: tuple(t.shape) for name, t in cell.tensors().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if expected != found:
            wrong = sorted(n for n in set(expected) | set(found) if expected.get(n) != found.get(n))
            raise FormatError(
                file, f"tensors of the same run ({wrong[0]} {expected.get(wrong[0])})", str(found.get(wrong[0]))
            )
        cell.load(tensors, scalars)
    return state


class Best:
    """The best few checkpoints of one cell by a metric that should be low."""

    def __init__(self, folder: Path | None, keep: int):
        self.folder, self.keep = folder, keep
        self.kept: list[dict[str, Any]] = []
        self.memory: dict[int, dict[str, Tensor]] = {}

    def offer(self, weights: dict[str, Tensor], entry: dict[str, Any]) -> bool:
        """Keep these weights if they are among the best; `entry` has `step` and `value`."""
        if self.keep == 0:
            return False
        ranked = sorted([*self.kept, entry], key=lambda e: (e["value"], e["step"]))
        if entry not in ranked[: self.keep]:
            return False
        weights = {name: t.detach().clone().cpu() for name, t in weights.items()}
        if self.folder is None:
            self.memory[entry["step"]] = weights
        else:
            name = f"step_{entry['step']:08d}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_path(self.folder / f"{name}.safetensors") as temporary:
                    save_file(weights, temporary)
                write_json_atomic(self.folder / f"{name}.json", entry)
            except OSError as error:
                raise TrainingError(
                    f"cannot write the checkpoint of step {entry['step']} into {self.folder}: {error}",
                    hint="free some space and start the same command again: it goes on from the last checkpoint",
                ) from error
        for dropped in ranked[self.keep :]:
            self._drop(dropped["step"])
        self.kept = ranked[: self.keep]
        return True

    def _drop(self, step: int) -> None:
        self.memory.pop(step, None)
        if self.folder is not None:
            for suffix in (".json", ".safetensors"):
                (self.folder / f"step_{step:08d}{suffix}").unlink(missing_ok=True)

    def load(self, entry: dict[str, Any]) -> dict[str, Tensor]:
        """The weights of a kept entry."""
        if self.folder is None:
            return self.memory[entry["step"]]
        return load_file(self.folder / f"step_{entry['step']:08d}.safetensors")

    def restore(self, kept: list[dict[str, Any]]) -> None:
        """After a resume: what was kept at that step; files written later are dropped."""
        self.kept = list(kept)
        if self.folder is not None and self.folder.is_dir():
            known = {f"step_{entry['step']:08d}" for entry in kept}
            for file in self.folder.iterdir():
                if file.stem not in known:
                    file.unlink()
