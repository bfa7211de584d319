"""Labels: what people and models call a feature. A table beside the index, as CSV out and in, and on the pages."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from hubsae.core.errors import HubSAEError
from hubsae.core.files import write_text_atomic
from hubsae.core.parquet import arrow, arrow_type, table_of, write_table
from hubsae.index import page, site

FILE = "labels.parquet"
TYPES = {
    "feature": "int32", "text": "string", "author": "string", "method": "string", "score": "float32", "low": "float32",
    "high": "float32", "n": "int32", "date": "string",
}  # fmt: skip


@dataclass(frozen=True)
class Label:
    """One name of one feature, by one author with one method.

    >>> Label(3, "closing brackets", "ann").date is None
    True
    """

    feature: int
    text: str
    author: str = ""
    method: str = "by hand"
    score: float | None = None
    low: float | None = None
    """Lower end of the score's interval"""
    high: float | None = None
    n: int | None = None
    """Number of judgements behind the score"""
    date: str | None = None

    @property
    def key(self) -> tuple[int, str, str]:
        """Who says so: a new label by the same author with the same method takes the place of the old one."""
        return self.feature, self.author, self.method


def read(index: str | Path) -> list[Label]:
    """The labels of an index (`reverse-index/NAME`), the best of each feature first; none where there is no table."""
    path = Path(index) / FILE
    if not path.is_file():
        return []
    names = {field.name for field in fields(Label)}
    rows = arrow().parquet.read_table(path).to_pylist()
    return [Label(**{name: value for name, value in row.items() if name in names}) for row in rows]


def merge(old: Iterable[Label], new: Iterable[Label]) -> list[Label]:
    """Both, the new ones in place of old ones with the same key; by feature, then score, then text.

    >>> merge([Label(1, "old", "a")], [Label(1, "new", "a"), Label(0, "other")])[1].text
    'new'
    """
    found = {label.key: label for label in old} | {label.key: label for label in new}
    return sorted(
        found.values(), key=lambda one: (one.feature, -(one.score if one.score is not None else -1), one.text)
    )


def write(index: str | Path, labels: Iterable[Label]) -> list[Label]:
    """Add labels to an index: its table, its pages' tables, and the page itself where the release has one.

    The answer is all labels that the index has now.
    """
    index = Path(index)
    pa = arrow()
    d_sae = pa.parquet.read_metadata(index / site.SUMMARY).num_rows
    new = list(labels)
    for label in new:
        if not 0 <= label.feature < d_sae or not label.text.strip():
            raise HubSAEError(f"a label for feature {label.feature}: {label.text!r}", hint=f"features 0 to {d_sae - 1}")
    merged = merge(read(index), new)
    rows = [asdict(one) for one in merged]
    write_table(index / FILE, table_of({name: [row[name] for row in rows] for name in TYPES}, TYPES))
    named = site.named_by_feature(d_sae, rows)
    first = pa.array([some[0]["text"] if some else None for some in named], pa.string())
    _replace(index / site.SUMMARY, "label", first, d_sae)
    _replace(index / site.FEATURES, "labels", pa.array(named, arrow_type(site.LABELS)), None)
    release = index.parent.parent
    if (release / "index.html").is_file():
        page.build(release)
    return merged


def _replace(path: Path, name: str, column: Any, group: int | None) -> None:
    """Write a table anew with another column, in row groups of the same size."""
    with arrow().parquet.ParquetFile(path) as file:
        rows = group or (file.metadata.row_group(0).num_rows if file.metadata.num_row_groups else 1)
        table = file.read()
    table = table.set_column(table.schema.get_field_index(name), name, column)
    write_table(path, table, row_group_size=max(1, rows), **site.OPTIONS)


def to_csv(labels: Iterable[Label], path: str | Path) -> int:
    """Write labels as CSV with a header; how many."""
    text = io.StringIO()
    sheet = csv.DictWriter(text, list(TYPES), lineterminator="\n")
    sheet.writeheader()
    rows = [asdict(label) for label in labels]
    sheet.writerows(rows)
    write_text_atomic(path, text.getvalue())
    return len(rows)


def from_csv(path: str | Path, *, author: str = "") -> list[Label]:
    """Read labels from CSV. Columns `feature` and `text` are needed; an error names the line.

    A missing date is today's, a missing author is `author`.
    """
    found = []
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        sheet = csv.DictReader(file)
        if not {"feature", "text"} <= set(sheet.fieldnames or ()):
            raise HubSAEError(f"{path}: the first line must name the columns, feature and text among them")
        for row in sheet:
            value = {name: (row.get(name) or "").strip() or None for name in TYPES}
            try:
                numbers = {
                    name: None if value[name] is None else float(str(value[name])) for name in ("score", "low", "high")
                }
                label = Label(
                    int(str(value["feature"])), value["text"] or "", value["author"] or author,
                    value["method"] or "by hand", **numbers, n=None if value["n"] is None else int(str(value["n"])),
                    date=value["date"] or date.today().isoformat(),
                )  # fmt: skip
            except ValueError as why:
                raise HubSAEError(f"{path}, line {sheet.line_num}: {why}") from why
            found.append(label)
    return found
