"""Look at an index: features by number, by search, or by what they do on a prompt."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hubsae.core.errors import DataError, FormatError, NotFoundError
from hubsae.core.files import read_json
from hubsae.core.parquet import arrow
from hubsae.index import files

SHOWN = 5


@dataclass(frozen=True)
class Example:
    """A token on which a feature fires, in its context."""

    kind: str
    rank: int
    value: float
    quantile: float
    tokens: list[str]
    values: list[float]
    center: int
    sample_id: int
    position: int
    token_index: int
    role: str | None = None
    turn: int | None = None

    def _repr_html_(self) -> str:
        most = max(map(abs, self.values), default=0) or 1
        spans = []
        for number, (token, value) in enumerate(zip(self.tokens, self.values, strict=True)):
            shade = f"background:rgba(230,120,30,{0.75 * max(value, 0) / most:.2f})"
            weight = ";font-weight:bold" if number == self.center else ""
            text = html.escape(token.replace("\n", "↵"))
            spans.append(f'<span title="{value:.3g}" style="{shade}{weight}">{text}</span>')
        return f'<div style="font-family:monospace;white-space:pre-wrap">{self.value:8.3g}  {"".join(spans)}</div>'


@dataclass(frozen=True)
class Feature:
    """What is known of one feature."""

    number: int
    count: int
    density: float
    max: float
    mean: float
    position_0_share: float | None
    special_share: float | None
    purity: float | None
    histogram: list[int]
    every: list[Example] = field(repr=False)
    """Examples of every kind"""
    top_logits: list[tuple[str, float]] = field(repr=False)
    bottom_logits: list[tuple[str, float]] = field(repr=False)
    neighbours: list[tuple[int, float]] = field(repr=False)
    """Nearest decoder rows: feature and cosine"""
    cofiring: list[tuple[int, float]] = field(repr=False)
    labels: list[dict[str, Any]] = field(repr=False)

    @property
    def examples(self) -> list[Example]:
        """The strongest tokens."""
        return [e for e in self.every if e.kind == "token"]

    @property
    def prompts(self) -> list[Example]:
        """The strongest token of each of the strongest samples."""
        return [e for e in self.every if e.kind == "prompt"]

    @property
    def samples(self) -> list[Example]:
        """Firings drawn at random, strongest first."""
        return [e for e in self.every if e.kind == "sample"]

    @property
    def logits(self) -> dict[str, list[tuple[str, float]]]:
        """Tokens it promotes and suppresses."""
        return {"top": self.top_logits, "bottom": self.bottom_logits}

    @property
    def strength(self) -> float:
        """A strength for `steer(..., unit=False)` to begin with: the largest value seen, which is what the feature adds
        to the activations at its strongest."""
        return self.max

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        out = {k: v for k, v in vars(self).items() if k != "every"}
        return {**out, "examples": [vars(e) for e in self.every]}

    def _repr_html_(self) -> str:
        def listed(pairs: list[tuple[Any, float]]) -> str:
            return ", ".join(f"<code>{html.escape(repr(a) if isinstance(a, str) else str(a))}</code>" for a, _ in pairs)

        named = "; ".join(html.escape(str(label.get("text"))) for label in self.labels)
        rows = "".join(e._repr_html_() for e in self.examples[:SHOWN])
        promotes = f"<div>promotes {listed(self.top_logits)}</div>" if self.top_logits else ""
        near = f"<div>near {listed(self.neighbours)}</div>" if self.neighbours else ""
        head = f"<b>feature {self.number}</b> {named} density {self.density:.3g}, largest value {self.max:.3g}"
        return f"<div><div>{head}</div>{rows}{promotes}{near}</div>"


class FeatureIndex:
    """An index on disk, opened.

    `FeatureIndex.open("release/reverse-index/layers.15")[123].examples`
    """

    def __init__(self, folder: Path, summary: Mapping[str, Any]):
        self.folder, self.summary = folder, dict(summary)

    @staticmethod
    def open(folder: str | os.PathLike[str], sae: str | None = None) -> FeatureIndex:
        """Open an index: its folder, or a release with one index or that of the SAE named."""
        root = Path(folder)
        if (root / files.SUMMARY).is_file():
            summary = read_json(root / files.SUMMARY)
            if summary.get("format") != "hubsae-reverse-index":
                raise FormatError(root / files.SUMMARY, "an index of features", str(summary.get("format")))
            return FeatureIndex(root, summary)
        known = sorted(path.parent for path in root.glob(f"{files.FOLDER}/*/{files.SUMMARY}"))
        wanted = [path for path in known if sae is None or path.name == files.index_name(sae)]
        # a part of the id is enough where only one index has it
        wanted = wanted or [path for path in known if sae is not None and files.index_name(sae) in path.name]
        if len(wanted) != 1:
            have = ", ".join(path.name.replace("--", "/") for path in known) or "none"
            raise NotFoundError(
                f"{root} has {len(wanted)} indexes of {sae or 'any SAE'}",
                hint=f"make one with: hubsae index {root} --activations ACTS" if not known else f"name one: {have}",
            )
        return FeatureIndex.open(wanted[0])

    def __len__(self) -> int:
        return int(self.summary["sae"]["d_sae"])

    def __repr__(self) -> str:
        s = self.summary
        return f"FeatureIndex({s['sae'].get('id')!r}: {len(self):,} features, {s['n_tokens']:,} tokens, {s['scope']})"

    def _table(self, name: str) -> Any:
        path = self.folder / name
        return arrow().parquet.read_table(path) if path.is_file() else None

    @cached_property
    def metrics(self) -> Any:
        """The table of metrics, as an Arrow table."""
        return self._table(files.METRICS)

    @cached_property
    def logits(self) -> Any:
        """The tokens that features promote, as an Arrow table; None where no model was given."""
        return self._table(files.LOGITS)

    @cached_property
    def labels(self) -> list[dict[str, Any]]:
        """What people or models call features."""
        table = self._table(files.LABELS)
        return [] if table is None else table.to_pylist()

    def _rows(self, name: str, feature: int) -> list[dict[str, Any]]:
        """Rows of one feature; the files are sorted by it, so a reader looks at one part only."""
        path = self.folder / name
        if not path.is_file():
            return []
        parquet = arrow().parquet
        return parquet.read_table(path, filters=[("feature", "=", feature)]).to_pylist()

    def __getitem__(self, feature: int) -> Feature:
        if not 0 <= feature < len(self):
            raise DataError(f"no feature {feature}", hint=f"features run from 0 to {len(self) - 1}")
        row = {name: self.metrics[name][feature].as_py() for name in self.metrics.column_names}
        names = Example.__dataclass_fields__
        examples = [Example(**{k: v for k, v in r.items() if k in names}) for r in self._rows(files.PROMPTS, feature)]
        logits, near = self._rows(files.LOGITS, feature), self._rows(files.NEIGHBOURS, feature)
        kept = ("count", "density", "max", "mean", "position_0_share", "special_share", "purity", "histogram")
        return Feature(
            number=feature,
            **{name: row[name] for name in kept},
            every=examples,
            top_logits=[(r["token"], r["value"]) for r in logits if r["side"] == "top"],
            bottom_logits=[(r["token"], r["value"]) for r in logits if r["side"] == "bottom"],
            neighbours=[(r["neighbour"], r["value"]) for r in near if r["kind"] == "decoder"],
            cofiring=[(r["neighbour"], r["value"]) for r in near if r["kind"] == "cofiring"],
            labels=[label for label in self.labels if label["feature"] == feature],
        )

    def readable(self, at_least: int = 20, density: float = 0.02) -> list[int]:
        """Features that fire often enough to be read and seldom enough to mean something."""
        counts, densities = (self.metrics[name].to_numpy() for name in ("count", "density"))
        return ((counts >= at_least) & (densities < density)).nonzero()[0].tolist()

    def __iter__(self) -> Iterator[Feature]:
        return (self[feature] for feature in range(len(self)))

    def search(self, text: str, limit: int = 20) -> list[tuple[int, str]]:
        """Features whose label, promoted tokens, strongest token or contexts hold a text; and where it was found.

        Labels count first, then the strongest token, logits, contexts; within each by how often it was found.
        """
        wanted = text.lower().strip()
        found: dict[int, tuple[int, int, str]] = {}

        def put(order: int, feature: int, where: str) -> None:
            rank, times, shown = found.get(feature, (order, 0, where))
            found[feature] = (rank, times + 1, shown) if rank <= order else (order, 1, where)

        for label in self.labels:
            if wanted in (label["text"] or "").lower():
                put(0, label["feature"], f"label: {label['text']}")
        prompts = self._table(files.PROMPTS).select(["feature", "kind", "tokens", "center"])
        for row in prompts.to_pylist():
            if row["kind"] == "sample":
                continue
            center = row["tokens"][row["center"]]
            if wanted == center.lower().strip():
                put(1, row["feature"], f"fires on {center!r}")
            elif wanted in "".join(row["tokens"]).lower():
                put(3, row["feature"], "".join(row["tokens"]))
        if self.logits is not None:
            for row in self.logits.to_pylist():
                if row["side"] == "top" and wanted == row["token"].lower().strip():
                    put(2, row["feature"], f"promotes {row['token']!r}")
        ordered = sorted(found.items(), key=lambda item: (item[1][0], -item[1][1], item[0]))
        return [(feature, shown) for feature, (_, _, shown) in ordered[:limit]]

    def names(self, features: list[int]) -> dict[int, str]:
        """A few words for each of some features: its label, or its strongest tokens."""
        labels = {label["feature"]: label["text"] for label in self.labels}
        table = self._table("summary.parquet").select(["feature", "top_tokens"])
        tops = table.take(features).to_pylist() if features else []
        return {row["feature"]: labels.get(row["feature"]) or row["top_tokens"] or "" for row in tops}
