"""Files on disk: written whole or not at all, hashed, never outside their folder; and what a safetensors file holds."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from hubsae.core.errors import FormatError, WriteError
from hubsae.core.text import format_bytes

MAX_HEADER = 100 << 20
"""Bytes: what the safetensors format allows."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed into place.

    On an error, and after a kill, the old file is as it was.

    >>> with tempfile.TemporaryDirectory() as d:
    ...     with atomic_path(Path(d) / "a.txt") as tmp:
    ...         _ = tmp.write_text("whole")
    ...     (Path(d) / "a.txt").read_text()
    'whole'
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; a release should be as readable as any other file
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, final)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def writing(path: str | os.PathLike[str], need: int | None = None, still_good: str = "") -> Iterator[None]:
    """Whatever goes wrong with a write in here (a full disk above all) is one `WriteError`.

    `need` is the room in bytes that the write takes; `still_good` says what the failure did not touch.

    >>> with writing("/nowhere/x"):
    ...     open("/nowhere/x", "w")
    Traceback (most recent call last):
    ...
    hubsae.core.errors.WriteError: cannot write /nowhere/x: No such file or directory
      -> free some room and start the same command again
    """
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else _io_reason(error)
        if reason is None:
            raise
        text = f"cannot write {path}: {reason}"
        if need is not None:
            text += f"; it needs {format_bytes(need)}{_free(Path(path))}"
        hint = f"{still_good}; " * bool(still_good) + "free some room and start the same command again"
        raise WriteError(text, hint=hint) from error


def _io_reason(error: Exception) -> str | None:
    """What safetensors and torch say about a failed write, in types of their own."""
    text = str(error)
    if type(error).__name__ != "SafetensorError" and not isinstance(error, RuntimeError):
        return None
    known = ("No space left", "I/O error", "quota", "PytorchStreamWriter failed", "unexpected pos")
    return text if any(sign in text for sign in known) else None


def _free(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    with suppress(OSError):
        return f", {format_bytes(shutil.disk_usage(path).free)} are free"
    return ""


def write_text_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def json_text(value: Any) -> str:
    """Readable JSON, as `write_json_atomic` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as readable JSON, whole or not at all; NaN and infinity are refused."""
    return write_text_atomic(path, json_text(value))


def write_csv_atomic(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as CSV; the columns are the union of the keys in order of first appearance."""
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_text_atomic(path, text.getvalue())


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, every value as text.

    >>> with tempfile.TemporaryDirectory() as d:
    ...     read_csv(write_csv_atomic(Path(d) / "a.csv", [{"k": 8}]))
    [{'k': '8'}]
    """
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON, or say which file is broken and where."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(path, "a JSON file", "no such file") from None
    except (ValueError, RecursionError) as error:  # ValueError: bad text, bad JSON, integers of ten thousand digits
        raise FormatError(path, "JSON", f"text that does not parse ({error})") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StoredTensor(NamedTuple):
    """One tensor as a safetensors header lists it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin, from the start of the file."""
    stop: int


class SafetensorsHeader(NamedTuple):
    """What a safetensors file says of itself at its beginning."""

    tensors: dict[str, StoredTensor]
    notes: dict[str, str]


def safetensors_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Names, types, shapes and places of the tensors in a safetensors file, without their data.

    >>> from safetensors.numpy import save_file
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as d:
    ...     save_file({"b": np.zeros(3, dtype="float32")}, Path(d) / "a.safetensors")
    ...     safetensors_header(Path(d) / "a.safetensors").tensors["b"].shape
    (3,)
    """
    file = Path(path)
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise FormatError(
                file,
                "a safetensors file",
                f"{size} bytes whose header claims {length}",
                hint="the file is truncated or of another kind; download it again",
            )
        text = handle.read(length)
    try:
        header = json.loads(text)
        notes = header.pop("__metadata__", None) or {}
        tensors = {
            name: StoredTensor(
                str(item["dtype"]),
                tuple(int(n) for n in item["shape"]),
                *(8 + length + int(n) for n in item["data_offsets"]),
            )
            for name, item in header.items()
        }
        return SafetensorsHeader(tensors, {str(k): str(v) for k, v in notes.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(file, "a safetensors header", f"one that does not parse ({error})") from error


def safe_join(root: str | os.PathLike[str], *parts: str) -> Path:
    """Join and refuse whatever would leave `root`: absolute parts, `..`, drive letters, odd slashes.

    >>> safe_join("release", "saes/layer6").as_posix()
    'release/saes/layer6'
    >>> safe_join("release", "../secret")
    Traceback (most recent call last):
    ...
    hubsae.core.errors.FormatError: ../secret: expected a path inside the folder, found one that leaves it
    """
    for part in parts:
        pure = PurePosixPath(part)
        drive = len(part) > 1 and part[1] == ":"
        if "\\" in part or "\0" in part or drive or pure.is_absolute() or ".." in pure.parts:
            raise FormatError(part, "a path inside the folder", "one that leaves it")
    return Path(root).joinpath(*parts)
