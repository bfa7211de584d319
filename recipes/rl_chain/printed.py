"""Tables as they were published: found, read as text so that the printed digits are kept, and reported on."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.errors import FormatError
from hubsae.core.files import write_csv_atomic, write_json_atomic
from hubsae.evals.rates import Series, make_series

HERE = Path(__file__).parent
BUNDLED = {
    "chains_reconstruction.csv": HERE / "published_reconstruction.csv",
    "chains_accuracy.csv": HERE / "published_accuracy.csv",
    "chains_decoder_cosine.csv": HERE / "published_decoder_cosine.csv",
    "instruct_reconstruction.csv": HERE.parent / "fast" / "published.csv",
    "grid_layer12.csv": HERE.parent / "grid_search" / "published.csv",
}
"""Tables that come with the recipes, by the names they are known under."""
RESAMPLES = 2000

Row = Mapping[str, str]


@dataclass
class TableReport:
    """The analysis of one table."""

    kind: str
    source: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Tidy tables by name."""
    findings: list[dict[str, Any]] = field(default_factory=list)
    """What the numbers say in words, with the numbers: keys `finding`, `holds`, and what it rests on."""

    def add(self, finding: str, holds: bool | None = None, **evidence: Any) -> None:
        """Note a finding; `holds` is None where it is a caution and not a claim."""
        self.findings.append({"finding": finding, "holds": holds, **evidence})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kind": self.kind, "source": self.source, "findings": self.findings, "tables": self.tables}

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write one CSV per table and the findings as JSON."""
        root = Path(folder)
        written = [write_csv_atomic(root / f"{name}.csv", rows) for name, rows in self.tables.items() if rows]
        return [*written, write_json_atomic(root / "findings.json", self.to_dict())]


def find_table(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the bundled table of that name."""
    given = Path(path)
    if given.is_file():
        return given
    if (bundled := BUNDLED.get(given.name)) is not None and bundled.is_file():
        return bundled
    have = ", ".join(sorted(BUNDLED))
    raise FormatError(given, "a CSV table", "no such file", hint=f"bundled tables: {have}")


def read_table(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Rows of a CSV file as text, so that the printed digits are kept."""
    file = find_table(path)
    with open(file, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise FormatError(file, "a CSV table with rows", "an empty one")
    return rows


def half_unit(text: str) -> float:
    """Half a unit of the last printed place: 5e-07 for "0.003844"."""
    mantissa, _, exponent = text.lower().partition("e")
    places = len(mantissa.partition(".")[2])
    return float(f"5e{int(exponent or 0) - places - 1}")


def printed_series(points: Sequence[tuple[int, str]], seed: int) -> Series:
    """A series of printed numbers, its draws within their rounding."""
    ordered = sorted(points)
    values = np.array([float(text) for _, text in ordered])
    room = np.array([half_unit(text) for _, text in ordered])
    generator = np.random.default_rng(seed)
    draws = values + generator.uniform(-1, 1, (RESAMPLES, values.size)) * room
    return make_series([step for step, _ in ordered], values.tolist(), draws)
