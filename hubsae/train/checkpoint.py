"""Saved states of a run: whole or not at all, provably as written, the last two of them, resumable to the bit.

    RUN/config.json                      the settings of every SAE
    RUN/log.jsonl                        one line per event
    RUN/state/step_00001000/             everything a resume needs: a safetensors file per SAE, state.json

A state is written beside its place, synced, and renamed; a kill leaves the old or the new one, never half of either.
`state.json` holds the sha256 of every file that belongs to the state (the log's lines up to it and the best
checkpoints too) and of itself. A state that is not what was written is put aside and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from hubsae.core.errors import FormatError
from hubsae.core.files import read_json, sha256_file, writing
from hubsae.core.progress import say
from hubsae.train.state import Cell

_STEP = re.compile(r"step_(\d{8})")


def save(folder: Path, cells: list[Cell], step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the state of `step` into a folder of states; afterwards the newest `keep` are left."""
    target = folder / f"step_{step:08d}"
    tensors = {cell: {name: t.contiguous().cpu() for name, t in cell.tensors().items()} for cell in cells}
    need = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    remove(states(folder)[: 1 - keep] if keep > 1 else [])  # room for the new one
    last = next((s.name for s in reversed(states(folder)) if s != target), None)
    scratch: Path | None = None
    with writing(target, need, f"the state of {last} is whole" if last else "no state was written before"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".writing_", dir=folder))
            for cell in cells:
                save_file(tensors[cell], scratch / f"cell{cell.index}.safetensors")
            files = {path.name: sha256_file(path) for path in sorted(scratch.iterdir())}
            found = {**state, "step": step, "cells": [cell.scalars() for cell in cells], "files": files}
            (scratch / "state.json").write_text(json.dumps({**found, "sha256": digest(found)}), encoding="utf-8")
            for path in scratch.iterdir():
                _sync(path)
            if target.exists():
                shutil.rmtree(target)
            os.replace(scratch, target)
            _sync(folder)
        except BaseException:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
    remove(states(folder)[:-keep])
    return target


def digest(state: dict[str, Any]) -> str:
    """sha256 of JSON data, however its keys are ordered."""
    text = json.dumps(json.loads(json.dumps(state)), sort_keys=True)  # keys as they will be read
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system syncs folders
            os.fsync(handle)
    finally:
        os.close(handle)


def remove(folders: Iterable[Path]) -> None:
    """Remove states."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def states(folder: Path) -> list[Path]:
    """The states in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _STEP.fullmatch(p.name))


def latest(folder: Path) -> Path | None:
    """The newest state in a folder; leavings of a kill are cleared."""
    if folder.is_dir():
        remove(list(folder.glob(".writing_*")))
    return next(reversed(states(folder)), None)


def newest_whole(
    folder: Path, check: Callable[[dict[str, Any]], None], *, at_most: int | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that is as it was written, and its state.json; None where there is no state at all.

    `check` looks at what a state names outside its folder, and raises a `FormatError` where that was damaged. A damaged
    state is named, and the one before it is taken; where none is left the error is raised.
    """
    latest(folder)
    damage: FormatError | None = None
    for path in reversed(states(folder)):
        if at_most is not None and path.name > f"step_{at_most:08d}":
            continue
        try:
            state = verify(path)
            check(state)
        except FormatError as error:
            say(f"the state {path.name} is damaged, so it is not used: {error.message}")
            damage = damage or error
            continue
        return path, state
    if damage is not None:
        hint = "no whole state is left: start over with resume=False (--fresh)"
        raise FormatError(damage.path, damage.expected, damage.found, hint)
    return None


def verify(path: Path) -> dict[str, Any]:
    """state.json of a state, after every file in it was compared with its sha256."""
    file = path / "state.json"
    state = read_json(file)
    said = state.pop("sha256", None) if isinstance(state, dict) else None
    if said is None or digest(state) != said:
        raise FormatError(file, "a state that matches its own sha256", "one that does not")
    for name, sha256 in state["files"].items():
        if not (path / name).is_file() or sha256_file(path / name) != sha256:
            raise FormatError(path / name, f"the file of sha256 {sha256[:12]}", "another or none")
    return state


def load(path: Path, cells: list[Cell], state: dict[str, Any]) -> None:
    """Fill cells from a state."""
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
