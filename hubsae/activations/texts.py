"""The texts to harvest from, by name: a file here (jsonl, json, csv, parquet, txt) or a dataset on the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hubsae.core.errors import DataError, NotFoundError
from hubsae.core.extras import require
from hubsae.core.files import sha256_file

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}


def load_texts(
    name: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    token: str | bool | None = None,
) -> tuple[Iterable[Any], dict[str, Any]]:
    """The rows of a dataset, and what to put on record about it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "questions.txt"
    ...     _ = path.write_text("one\\ntwo\\n")
    ...     [row["text"] for row in load_texts(path)[0]]
    ['one', 'two']
    """
    path = Path(name)
    if path.is_file() and path.suffix == ".txt":
        lines = [{"text": line} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return lines, {"dataset": path.name, "dataset_revision": sha256_file(path)[:12]}
    datasets = require("datasets", extra="train")
    record: dict[str, Any] = {"dataset": str(name), "dataset_config": config, "dataset_split": split}
    try:
        if path.is_file():
            if path.suffix not in LOADERS:
                raise DataError(f"{path}: no text format is known by that ending", hint=f"known: {', '.join(LOADERS)}")
            record |= {"dataset": path.name, "dataset_config": None, "dataset_revision": sha256_file(path)[:12]}
            found = datasets.load_dataset(
                LOADERS[path.suffix], data_files=str(path), split="train", streaming=streaming
            )
        elif (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(
                str(name), config, split=split, revision=revision, streaming=streaming, token=token
            )
            record["dataset_revision"] = revision
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise NotFoundError(
            f"dataset {name} cannot be loaded: {str(error).splitlines()[0]}",
            hint="give a .jsonl, .csv, .parquet or .txt file, a dataset id with --dataset-config and --split",
        ) from error
    return found, record
