"""All formats, found by themselves, and which of them read a path: told from content, never guessed.

A format is a `Format` object in a file of `formats/kinds/` (or the two that the library itself stands on, `native` and
`saelens`). Nothing else lists formats: what files make up an SAE, which suffixes may hold one and what stands for a
folder all follow from the objects.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hubsae.core.errors import AmbiguousFormatError, ConfigError, FormatError, nearest
from hubsae.formats import kinds, native, saelens
from hubsae.formats.base import Files, Format, Probe


def _found() -> Iterator[Format]:
    yield native.FORMAT
    yield saelens.FORMAT
    for module in sorted(pkgutil.iter_modules(kinds.__path__), key=lambda item: item.name):
        content = vars(importlib.import_module(f"{kinds.__name__}.{module.name}"))
        yield from (value for value in content.values() if isinstance(value, Format))


FORMATS: dict[str, Format] = {format.name: format for format in _found()}

FOLDERS: tuple[Files, ...] = tuple(files for format in FORMATS.values() for files in format.files)
"""What makes up one SAE, for every folder format."""
SUFFIXES: tuple[str, ...] = tuple(sorted({suffix for format in FORMATS.values() for suffix in format.suffixes}))
"""Suffixes of files that may be an SAE by themselves."""
BESIDE: tuple[str, ...] = tuple(sorted({name for format in FORMATS.values() for name in format.beside}))
"""Files that say more about a single-file SAE, from its folder; `{stem}` stands for its name without the suffix."""

MAPPED = "mapped"
"""The format of files whose tensors a person names with a key map."""

_WEIGHTS = tuple({*SUFFIXES, *(Path(name).suffix for files in FOLDERS for name in files.needed)} - {".json", ""})
_STANDS_FOR_FOLDER = frozenset(name for files in FOLDERS for name in files.needed if "/" not in name)


@dataclass(frozen=True)
class Reading:
    """One way a path can be read."""

    format: str
    why: str
    """What in the file or folder says so."""

    def __str__(self) -> str:
        return f"{self.format}: {self.why}"


def detect(path: str | os.PathLike[str]) -> list[Reading]:
    """Every reading that fits a file or folder, by its content; none is guessed.

    A reading that another one covers (a hubsae folder is also a SAELens folder) is left out.
    """
    return readings_of(probe_of(path))


def probe_of(path: str | os.PathLike[str]) -> Probe:
    """A look at a path; the weights or config file of a folder format stands for its folder."""
    file = Path(path)
    if file.name in _STANDS_FOR_FOLDER and file.is_file():
        folder = Probe(file.parent)
        if readings_of(folder):
            return folder
    return Probe(file)


def readings_of(probe: Probe) -> list[Reading]:
    """`detect` for a path that was looked at already."""
    readings = [Reading(f.name, why) for f in FORMATS.values() if (why := f.detect(probe))]
    covered = {name for reading in readings for name in FORMATS[reading.format].covers}
    return [reading for reading in readings if reading.format not in covered]


def choose(path: str | os.PathLike[str] | Probe, format: str | None = None) -> Format:
    """The one format a path is read with; more than one or none is an error that says how to go on."""
    if format is not None:
        return format_named(format, "read")
    probe = path if isinstance(path, Probe) else probe_of(path)
    readings = readings_of(probe)
    if len(readings) == 1:
        return FORMATS[readings[0].format]
    if readings:
        raise AmbiguousFormatError(
            f"{probe.path}: {len(readings)} readings fit\n" + "\n".join(f"  {reading}" for reading in readings),
            hint="choose one: format=" + " or format=".join(r.format for r in readings) + " (command line: --format)",
        )
    raise FormatError(probe.path, "an SAE in a known format", looks_like(probe), hint=_no_format_hint(probe))


def format_named(name: str, use: Literal["read", "write"]) -> Format:
    """A format by name that can be read, or written."""
    found = FORMATS.get(name)
    if found is None or getattr(found, use) is None:
        known = [f.name for f in FORMATS.values() if getattr(f, use)]
        done, other = ("read", "written") if use == "read" else ("written", "read")
        raise ConfigError(
            f"{name!r} is {f'only {other}, not {done}' if found else 'no format'}",
            hint=f"nearest: {nearest(name, known)}; formats that are {done}: {', '.join(known)}",
        )
    return found


def looks_like(probe: Probe) -> str:
    """What lies at a path that no format reads, in words."""
    if probe.is_dir:
        names = sorted(probe.names)
        if not names:
            return "an empty folder"
        return f"a folder with {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
    if probe.path.stat().st_size == 0:
        return "an empty file (0 bytes)"
    if header := probe.header():
        return f"tensors {', '.join(sorted(header)[:8])}"
    value = probe.pickle()
    if isinstance(value, dict):
        return f"a dict with {', '.join(str(k) for k in list(value)[:8])}"
    return f"{type(value).__name__}" if value is not None else f"a {probe.path.suffix or 'nameless'} file"


def may_hold_weights(file: Path) -> bool:
    """Whether a file's suffix is one of weights in any format."""
    return file.suffix in _WEIGHTS


def weight_files(folder: Path, most: int | None = None) -> list[Path]:
    """Files below a folder that may hold weights."""
    out: list[Path] = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if may_hold_weights(file) and file.is_file() and not hidden:
            out.append(file)
            if most is not None and len(out) >= most:
                break
    return out


def _no_format_hint(probe: Probe) -> str:
    if probe.is_dir and (inside := weight_files(probe.path, most=3)):
        return (
            f"it holds files such as {inside[0].name}: read one of them, or make a release of all with `hubsae package`"
        )
    return "`hubsae show PATH` lists what is in it; format=... forces a reading"
