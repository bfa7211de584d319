"""A world: a model with everything a recipe, the demo or a person needs around it, made on this machine and kept.

    world.model, world.tokenizer         an ordinary checkpoint folder, loaded
    world.train_chats / test_chats       [{"messages": [...]}]
    world.train_problems / test_problems question and answer, in the layout of GSM8K
    world.train_texts / test_texts       [{"text": ...}]
    world.provenance                     where all of it comes from, under which licence

A world is cached in a folder named by a hash of what it depends on. A build happens in a folder beside it that is
renamed into place, under a lock: an interrupted build leaves nothing, and two processes build once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hubsae.core.errors import FormatError, NotFoundError, nearest
from hubsae.core.extras import require
from hubsae.core.files import read_json, sha256_file, write_json_atomic, write_text_atomic
from hubsae.core.parquet import arrow, write_table
from hubsae.core.quiet import quiet
from hubsae.recipes.tiny_problems import Problem
from hubsae.rl.problems import PromptStyle

RECORD = "world.json"
"""Written last: what the world is and the sha256 of every file."""


def cache_root() -> Path:
    """Where worlds are kept: `$HUBSAE_HOME` (or `$HUBSAE_CACHE`), `hubsae` in `$HF_HOME`, or in the user's cache."""
    if chosen := os.environ.get("HUBSAE_HOME") or os.environ.get("HUBSAE_CACHE"):
        return Path(chosen).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hubsae"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hubsae"


class World:
    """What every world has. `model_id` says what the model is; it is what records should call it."""

    folder: Path
    model_id: str
    base_model: str | None
    """The published model it is a form of, where it is one."""
    train_problems: list[Problem]
    test_problems: list[Problem]
    train_chats: list[dict[str, Any]]
    test_chats: list[dict[str, Any]]
    train_texts: list[dict[str, str]]
    test_texts: list[dict[str, str]]

    @property
    def stages(self) -> dict[str, Path]:
        """Checkpoint folders by name, in order of training."""
        raise NotImplementedError

    @property
    def provenance(self) -> dict[str, Any]:
        """Sources with versions and licences."""
        raise NotImplementedError

    @property
    def model_path(self) -> Path:
        """The checkpoint folder of the finished model."""
        return list(self.stages.values())[-1]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, as `AutoTokenizer` loads it, padding on the left."""
        transformers = require("transformers", extra="train")
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model_path)
        tokenizer.padding_side = "left"
        return tokenizer

    @cached_property
    def model(self) -> Any:
        """The finished model in float32, in evaluation mode."""
        return self.load_stage(list(self.stages)[-1])

    def load_stage(self, name: str) -> Any:
        """The model as it was at one stage."""
        transformers = require("transformers", extra="train")
        if name not in self.stages:
            raise NotFoundError(f"this world has no stage {name!r}", hint=f"nearest: {nearest(name, self.stages)}")
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(self.stages[name], dtype=torch.float32)
        return model.eval()

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The conversation that asks `problem`."""
        return PromptStyle().messages(problem.question)

    def prompt_ids(self, problem: Problem) -> list[int]:
        """The rendered prompt as token ids, ending where the answer begins."""
        return prompt_ids(self.tokenizer, problem)

    def repos(self, scratch: Path) -> dict[str, tuple[str, Path]]:
        """Repositories a Hub can serve, id -> (type, folder); what lies in no folder yet is written to `scratch`."""
        name, kinds = self.folder.name.partition("-")[0], self.kinds()
        rows = {f"local/{name}-{kind}": ("dataset", self.rows_folder(kind, scratch / kind)) for kind in kinds}
        return {self.model_id: ("model", self.model_path), **rows}

    def kinds(self) -> tuple[str, ...]:
        """Which rows there are."""
        return "chats", "problems", "texts"

    def rows_folder(self, kind: str, scratch: Path) -> Path:
        """`chats`, `problems` or `texts` as a dataset repository."""
        train, test = getattr(self, f"train_{kind}"), getattr(self, f"test_{kind}")
        rows = [[p.record() if isinstance(p, Problem) else p for p in part] for part in (train, test)]
        return write_rows(scratch, *rows, config="main" if kind == "problems" else None)


def prompt_ids(tokenizer: Any, problem: Problem) -> list[int]:
    """`problem` rendered with the chat template of `tokenizer`, as token ids."""
    return tokenizer(PromptStyle().render(tokenizer, problem.question), add_special_tokens=False).input_ids


def write_rows(
    folder: str | os.PathLike[str],
    train: Sequence[dict[str, Any]],
    test: Sequence[dict[str, Any]],
    *,
    config: str | None = None,
    front: str = "",
    words: str = "",
) -> Path:
    """Write two splits as a dataset repository that `load_dataset` reads; `config="main"` is the layout of GSM8K."""
    out, inside = Path(folder), config or "data"
    (out / inside).mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        write_table(out / inside / f"{split}-00000-of-00001.parquet", arrow().Table.from_pylist(list(rows)))
    files = "".join(f"  - split: {split}\n    path: {inside}/{split}-*\n" for split in ("train", "test"))
    front = f"{front}configs:\n- config_name: {config or 'default'}\n  data_files:\n{files}"
    write_text_atomic(out / "README.md", f"---\n{front}---\n\n{words or 'Made by hubsae.'}\n")
    return out


def read_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of one split of `write_rows`."""
    return arrow().parquet.read_table(next(folder.rglob(f"{split}-*.parquet"))).to_pylist()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder` with a whole world in it: as it lies there, or made by `build` and renamed into place.

    Where the cache cannot be written, the world is built in a temporary folder for this process alone.
    """
    filelock = require("filelock", extra="train")
    if complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(str(folder) + ".lock")
        lock.acquire()
    except OSError:
        private = Path(tempfile.mkdtemp(prefix="hubsae-world-"))
        build(private)
        return private
    try:
        if complete(folder):
            return folder
        for stale in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            build(building)
            building.chmod(0o755)
            if folder.exists():  # a world with a damaged file
                shutil.rmtree(folder)
            os.replace(building, folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return folder
    finally:
        lock.release()


def write_record(folder: Path, about: dict[str, Any]) -> None:
    """Write the record with size and sha256 of every file; a folder that has it is whole."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != RECORD)
    files = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in paths}
    write_json_atomic(folder / RECORD, {**about, "files": files})


def complete(folder: Path) -> bool:
    """Whether a world lies in a folder, every file with its size."""
    if not (folder / RECORD).is_file():
        return False
    files = read_json(folder / RECORD).get("files", {})
    return all((folder / name).is_file() and (folder / name).stat().st_size == f["size"] for name, f in files.items())


def verify(folder: Path) -> int:
    """Hash every file of a world again; returns their number."""
    files = read_json(folder / RECORD).get("files", {})
    for name, facts in files.items():
        if (found := sha256_file(folder / name)) != facts["sha256"]:
            raise FormatError(
                folder / name, f"sha256 {facts['sha256']}", found, hint=f"remove {folder}: it is made again"
            )
    return len(files)
