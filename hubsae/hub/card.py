"""Model cards, rendered from the record of a release and from nothing else.

A card template is a Jinja file in `cards/`; it is a sequence of blocks (`{% call block("contents") %}`), each of
which the reader's own words survive around (see `readme.py`). A number on a card is a number in metadata.json, in
the manifest or in `results/*.csv`; what is not recorded is said to be not recorded.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hubsae.core import readme
from hubsae.core.bundled import bundled
from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import safe_join
from hubsae.core.metadata import Metadata
from hubsae.formats.manifest import Manifest, SAEEntry
from hubsae.hub import cardtext

KINDS = ("single", "chain", "grid", "release")
HEADLINES = ("nmse_pooled", "fve", "fvu", "mse", "l0", "dead_fraction", "delta_ce", "frac_recovered_mean", "ce_sae")
MAX_RESULT_ROWS, MAX_RESULT_COLUMNS = 24, 12


@dataclass
class Record:
    """One SAE of the release."""

    id: str
    path: str
    metadata: Metadata
    size: int
    weights_sha256: str | None = None

    @property
    def stage(self) -> str | None:
        """Checkpoint of the base model."""
        return self.metadata.base_model.stage

    @property
    def layer(self) -> int | None:
        """Block of the base model."""
        return self.metadata.hook.layer


@dataclass
class MetricMeaning:
    """One definition of a metric, over all SAEs of a release."""

    name: str
    definition: str | None
    source: str | None
    tokens: dict[str, set[int | None]] = field(default_factory=dict)
    """Token counts by scope."""

    @property
    def scopes(self) -> str:
        """Scopes with their token counts, as one cell."""
        return "; ".join(f"{scope}: {self._count(counts)}" for scope, counts in self.tokens.items())

    @staticmethod
    def _count(counts: set[int | None]) -> str:
        known = sorted(n for n in counts if n is not None)
        if not known:
            return "–"
        return cardtext.number(known[0]) + (f" to {cardtext.number(known[-1])}" if known[-1] > known[0] else "")


@dataclass
class ResultTable:
    """One CSV of `results/`; without rows where it is too long or too wide for a card."""

    path: str
    columns: list[str]
    rows: list[list[str]]
    total: int


@dataclass
class Card:
    """What a card is rendered from."""

    repo_id: str
    records: list[Record]
    kind: str = "release"
    title: str | None = None
    description: str | None = None
    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    results: list[ResultTable] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    extra_files: list[tuple[str, int]] = field(default_factory=list)
    citation: str | None = None
    limitations: list[str] = field(default_factory=list)
    revision: str | None = None
    endpoint: str | None = None

    # -- derived facts -------------------------------------------------------------------------------------

    @cached_property
    def base_models(self) -> list[str]:
        """Every base model, in order of appearance."""
        return cardtext.unique(r.metadata.base_model.id for r in self.records)

    @cached_property
    def layers(self) -> list[int]:
        """Every layer, ascending."""
        return sorted(cardtext.unique(r.layer for r in self.records))

    @cached_property
    def stages(self) -> list[str]:
        """Every stage in training order: by step where known, else in order of appearance."""
        steps: dict[str, int] = {}
        order: dict[str, int] = {}
        for record in self.records:
            if record.stage is not None:
                order.setdefault(record.stage, len(order))
                step = record.metadata.base_model.step
                steps[record.stage] = step if step is not None else cardtext.step_of(record.stage)
        return sorted(order, key=lambda stage: (steps[stage], order[stage]))

    @cached_property
    def architectures(self) -> list[str]:
        """Every selection rule."""
        return cardtext.unique(r.metadata.config.architecture for r in self.records)

    @cached_property
    def headline_metrics(self) -> list[str]:
        """Names of the metrics worth a column: the usual ones first, then others, at most five."""
        present = cardtext.unique(m.name for r in self.records for m in r.metadata.metrics)
        usual = [name for name in HEADLINES if name in present]
        return (usual + [name for name in present if name not in usual])[:5]

    @cached_property
    def metric_meanings(self) -> list[MetricMeaning]:
        """Each metric with its definition, and the scopes and token counts it was taken on."""
        found: dict[tuple[str, str | None, str | None], MetricMeaning] = {}
        for record in self.records:
            for m in record.metadata.metrics:
                key = (m.name, m.definition, m.source)
                meaning = found.setdefault(key, MetricMeaning(*key))
                meaning.tokens.setdefault(m.scope or "not said", set()).add(m.n_tokens)
        return list(found.values())

    @cached_property
    def example(self) -> Record:
        """The SAE that the loading snippets name: the last stage at the middle layer."""
        last = [r for r in self.records if r.stage == self.stages[-1]] if self.stages else self.records
        return last[len(last) // 2]

    @cached_property
    def saelens_ready(self) -> list[Record]:
        """SAEs that stock SAELens loads with the same maths."""
        return [r for r in self.records if not cardtext.saelens_limits(r.metadata)]

    @property
    def total_size(self) -> int:
        """Bytes of all SAEs."""
        return sum(r.size for r in self.records)

    def value(self, record: Record, name: str) -> str:
        """A metric of an SAE as text, or a dash."""
        number = record.metadata.metric(name, "all")
        number = record.metadata.metric(name) if number is None else number
        return "–" if number is None else cardtext.number(number)

    def facts(self, section: str) -> list[tuple[str, str]]:
        """(label, value) of one section of the metadata over all SAEs; what varies is listed."""
        return cardtext.facts(section, [r.metadata for r in self.records])

    def front_matter(self) -> dict[str, Any]:
        """The YAML header: only what is known."""
        tags = ["sparse-autoencoder", "sae", "interpretability", "mechanistic-interpretability"]
        if self.saelens_ready:
            tags.append("saelens")
        tags += [name.replace("_", "-") for name in self.architectures]
        front: dict[str, Any] = {"library_name": "hubsae", "tags": tags}
        if self.base_models:
            front["base_model"] = self.base_models[0] if len(self.base_models) == 1 else self.base_models
        if self.datasets:
            front["datasets"] = list(self.datasets)
        if self.license:
            front["license"] = self.license
        return front


def guess_kind(records: list[Record]) -> str:
    """Which template fits: one SAE, a chain over stages, a grid at one place, or any other release."""
    if len(records) == 1:
        return "single"
    if len({r.stage for r in records}) > 1:
        return "chain"
    place = {(r.layer, r.metadata.hook.module_path) for r in records}
    shapes = {(r.metadata.config.architecture, r.metadata.config.k, r.metadata.config.d_sae) for r in records}
    return "grid" if len(place) == 1 and len(shapes) > 1 else "release"


def environment(template_folder: Path | None = None) -> Any:
    """Jinja with the house's filters; `template_folder` is searched before the built-in templates."""
    import jinja2

    folders = [folder for folder in (template_folder, bundled("cards")) if folder is not None]
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(folder) for folder in folders]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
        autoescape=False,  # Markdown; values go through `cell`, which neutralises what would break a table
    )
    env.filters.update(
        number=cardtext.number,
        bytes=cardtext.human_bytes,
        cell=cardtext.cell,
        count=lambda n, one, many=None: f"{n:,} {one if n == 1 else many or one + 's'}",
        listing=cardtext.listing,
        human=lambda text: str(text).replace("_", " "),
        architecture=cardtext.architecture_name,
        limits=cardtext.saelens_limits,
        unrecorded=cardtext.not_recorded,
    )
    env.globals.update(snippets=cardtext.snippets)
    return env


def render_blocks(card: Card, template: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """The named blocks of a card, in the order of the template; empty ones are left out."""
    import jinja2

    path = Path(template) if template is not None else None
    env = environment(path.parent if path is not None else None)
    blocks: dict[str, str] = {}

    def block(name: str, caller: Any) -> str:
        text = caller().strip()
        if text:
            blocks[name] = text
        return ""

    name = path.name if path is not None else f"{card.kind}.md.j2"
    try:
        env.get_template(name).render(card=card, block=block)
    except jinja2.TemplateNotFound as error:
        raise ConfigError(
            f"there is no card template {error.name!r}",
            hint=f"built in: {', '.join(KINDS)}; or give a path to a .md.j2 file",
        ) from error
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ConfigError(f"{template or name}{f', line {line}' if line else ''}: {error}") from error
    if not blocks:
        raise ConfigError(
            f"{template or name} has no block",
            hint='put the generated parts between {% call block("name") %} and {% endcall %}, as in cards/single.md.j2',
        )
    return blocks


def render_card(
    card: Card,
    existing: str | None = None,
    *,
    template: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> readme.Merged:
    """The card as a README, put into `existing` without touching a person's words."""
    return readme.update(existing, card.front_matter(), render_blocks(card, template), force=force)


def card_of_release(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    kind: str | None = None,
    title: str | None = None,
    citation: str | None = None,
    limitations: Sequence[str] | None = None,
) -> Card:
    """Read a packaged release folder into what a card is rendered from.

    `kind`, `title`, `citation` and `limitations` are what the folder does not say.
    """
    root = Path(folder)
    manifest = Manifest.read(root)
    records = [
        record_of(entry, Metadata.load(root if entry.path == "." else safe_join(root, entry.path)))
        for entry in manifest
    ]
    return card_of(
        manifest,
        repo_id,
        records,
        lambda path: safe_join(root, path),
        kind=kind,
        title=title,
        citation=citation,
        limitations=limitations,
    )


def record_of(entry: SAEEntry, metadata: Metadata) -> Record:
    """One SAE of a manifest, with its record."""
    weights = next((f for f in entry.files if f.path.endswith("sae_weights.safetensors")), None)
    size = sum(f.size for f in entry.files)
    return Record(entry.id, entry.path, metadata, size, weights.sha256 if weights else None)


def card_of(
    manifest: Manifest,
    repo_id: str,
    records: list[Record],
    find: Callable[[str], Path],
    *,
    kind: str | None = None,
    title: str | None = None,
    citation: str | None = None,
    limitations: Sequence[str] | None = None,
) -> Card:
    """A card from a manifest and the records of its SAEs; `find` gives the place of a result file."""
    if not records:
        raise FormatError(f"{repo_id}/config.json", "a release with at least one SAE", "an empty list of SAEs")
    paths = [f.path for f in manifest.files]
    given = {
        "kind": guess_kind(records),
        "description": manifest.description,
        "license": manifest.license,
        "datasets": manifest.datasets or cardtext.unique(r.metadata.activations.id for r in records),
        "results": _results(find, paths),
        "plots": [p for p in paths if p.startswith("plots/") and p.endswith((".png", ".svg"))],
        "extra_files": [(f.path, f.size) for f in manifest.files],
    }
    extra = manifest.model_extra or {}
    for name in ("title", "citation", "limitations"):
        if name in extra:
            given[name] = extra[name]
    options = {"kind": kind, "title": title, "citation": citation, "limitations": limitations}
    given |= {key: value for key, value in options.items() if value is not None}
    if given["kind"] not in KINDS:
        raise ConfigError(f"no card of kind {given['kind']!r}", hint=f"kinds: {', '.join(KINDS)}")
    return Card(repo_id=repo_id, records=records, **given)


def _results(find: Callable[[str], Path], paths: Iterable[str]) -> list[ResultTable]:
    tables = []
    for path in sorted(p for p in paths if p.startswith("results/") and p.endswith(".csv")):
        with open(find(path), encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        if len(rows) > 1:
            fits = len(rows) - 1 <= MAX_RESULT_ROWS and len(rows[0]) <= MAX_RESULT_COLUMNS
            shown = [[cardtext.number_text(value) for value in row] for row in rows[1:]] if fits else []
            tables.append(ResultTable(path, rows[0], shown, len(rows) - 1))
    return tables
