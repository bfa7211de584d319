"""Model cards, rendered from the record of a release and from nothing else.

A card template is a Jinja file in `cards/`; it is a sequence of blocks (`{% call block("contents") %}`), each of
which the reader's own words survive around (see `core/readme.py`). A number on a card is a number in metadata.json, in
the manifest or in `results/*.csv`; what is not recorded is said to be not recorded.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from hubsae.core import readme
from hubsae.core.bundled import bundled
from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import safe_join
from hubsae.core.metadata import Metadata
from hubsae.core.text import format_bytes, stage_order
from hubsae.formats.manifest import Manifest, SAEEntry
from hubsae.hub import cardtext
from hubsae.hub.cardtext import unique
from hubsae.hub.examples import Example, example_features

KINDS = ("single", "chain", "grid", "instruct", "release")
HEADLINES = (
    "fvu", "l0", "dead_fraction", "frac_recovered_mean", "kl", "delta_ce", "nmse_pooled", "mse", "fve", "ce_sae",
)  # fmt: skip
MAX_HEADLINES = 6
MAX_RESULT_ROWS, MAX_RESULT_COLUMNS = 24, 12


@dataclass(frozen=True)
class CardOptions:
    """What a person says about the card, and how it is made."""

    template: str | os.PathLike[str] | None = None
    kind: str | None = None
    force: bool = False
    """Replace blocks that were edited by hand."""
    title: str | None = None
    citation: str | None = None
    limitations: Sequence[str] | None = None


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
    examples: list[Example] = field(default_factory=list)
    citation: str | None = None
    limitations: Sequence[str] = ()

    # -- derived facts -------------------------------------------------------------------------------------

    @property
    def records_metadata(self) -> list[Metadata]:
        """The record of each SAE."""
        return [record.metadata for record in self.records]

    @cached_property
    def base_models(self) -> list[str]:
        """Every base model, in order of appearance."""
        return unique(m.base_model.id for m in self.records_metadata)

    @cached_property
    def layers(self) -> list[int]:
        """Every layer, ascending."""
        return sorted(unique(r.layer for r in self.records))

    @cached_property
    def stages(self) -> list[str]:
        """Every stage in training order: by step where known, else in order of appearance."""
        steps = {r.stage: r.metadata.base_model.step for r in self.records}
        names = unique(r.stage for r in self.records)
        return sorted(names, key=lambda name: stage_order(name) if steps[name] is None else (0, steps[name], []))

    @cached_property
    def architectures(self) -> list[str]:
        """Every selection rule."""
        return unique(m.config.architecture for m in self.records_metadata)

    @cached_property
    def scopes(self) -> list[str]:
        """The token groups that the SAEs are for."""
        return unique(m.own_scope for m in self.records_metadata)

    @property
    def headline_metrics(self) -> list[str]:
        """Names of the metrics worth a column, in each SAE's own scope: the usual ones first, then others."""
        present = unique(m.name for record in self.records_metadata for m in record.own_metrics)
        usual = [name for name in HEADLINES if name in present]
        return (usual + [name for name in present if name not in usual])[:MAX_HEADLINES]

    @property
    def definitions(self) -> list[tuple[str, str | None, str | None]]:
        """(metric, definition, who took it), each once."""
        return unique((m.name, m.definition, m.source) for r in self.records_metadata for m in r.metrics)

    @property
    def tokens_by_scope(self) -> list[tuple[str, str]]:
        """(scope, on how many tokens), each once."""
        found: dict[str, set[int]] = {}
        for metric in (m for record in self.records_metadata for m in record.metrics):
            found.setdefault(metric.scope or "not said", set()).update(
                [] if metric.n_tokens is None else [metric.n_tokens]
            )
        return [(scope, cardtext.number_range(sorted(counts))) for scope, counts in found.items()]

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
        """A metric of an SAE in its own scope as text, or a dash."""
        found = record.metadata.metric(name, record.metadata.own_scope)
        found = next((m.value for m in record.metadata.own_metrics if m.name == name), None) if found is None else found
        return "–" if found is None else cardtext.number(found)

    def facts(self, section: str) -> list[tuple[str, str]]:
        """(label, value) of one section of the metadata over all SAEs; what varies is listed."""
        return cardtext.facts(section, self.records_metadata)

    def front_matter(self) -> dict[str, Any]:
        """The YAML header: only what is known."""
        tags = ["sparse-autoencoder", "sae", "interpretability", "mechanistic-interpretability"]
        if self.saelens_ready:
            tags.append("saelens")
        tags += [name.replace("_", "-") for name in self.architectures]
        base = [cardtext.plain(name) for name in self.base_models]
        front = {
            "base_model": base[0] if len(base) == 1 else base,
            "datasets": [cardtext.plain(name) for name in self.datasets],
            "license": cardtext.plain(self.license or ""),
        }
        return {"library_name": "hubsae", "tags": tags} | {name: value for name, value in front.items() if value}


def guess_kind(records: list[Record]) -> str:
    """Which template fits: one SAE, a chain over stages, a grid at one place, or any other release."""
    if len(records) == 1:
        return "single"
    if len({r.stage for r in records}) > 1:
        return "chain"
    place = {(r.layer, r.metadata.hook.module_path) for r in records}
    shapes = {(r.metadata.config.architecture, r.metadata.config.k, r.metadata.config.d_sae) for r in records}
    return "grid" if len(place) == 1 and len(shapes) > 1 else "release"


# -- rendering ---------------------------------------------------------------------------------------------------


@lru_cache(4)
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
        autoescape=False,  # Markdown, where each kind of place has an escape of its own, see `cardtext`
    )
    env.filters.update(
        number=cardtext.number,
        bytes=format_bytes,
        cell=cardtext.cell,
        code=cardtext.code,
        literal=cardtext.literal,
        target=cardtext.target,
        prose=cardtext.prose,
        count=lambda n, one, many=None: f"{n:,} {one if n == 1 else many or one + 's'}",
        listing=cardtext.listing,
        architecture=cardtext.architecture_name,
        limits=cardtext.saelens_limits,
        unrecorded=cardtext.not_recorded,
    )
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


# -- reading a release -------------------------------------------------------------------------------------------


def card_of_release(folder: str | os.PathLike[str], repo_id: str, options: CardOptions = CardOptions()) -> Card:
    """Read a packaged release folder into what a card is rendered from."""
    root = Path(folder)
    manifest = Manifest.read(root)
    records = [
        record_of(entry, Metadata.load(root if entry.path == "." else safe_join(root, entry.path)))
        for entry in manifest
    ]
    return card_of(manifest, repo_id, records, lambda path: safe_join(root, path), options)


def record_of(entry: SAEEntry, metadata: Metadata) -> Record:
    """One SAE of a manifest, with its record."""
    weights = next((f for f in entry.files if f.path.endswith("sae_weights.safetensors")), None)
    return Record(entry.id, entry.path, metadata, sum(f.size for f in entry.files), weights and weights.sha256)


def card_of(
    manifest: Manifest,
    repo_id: str,
    records: list[Record],
    find: Callable[[str], Path],
    options: CardOptions = CardOptions(),
) -> Card:
    """A card from a manifest and the records of its SAEs; `find` gives the place of a result file."""
    if not records:
        raise FormatError(f"{repo_id}/config.json", "a release with at least one SAE", "an empty list of SAEs")
    if options.kind is not None and options.kind not in KINDS:
        raise ConfigError(f"no card of kind {options.kind!r}", hint=f"kinds: {', '.join(KINDS)}")
    extra = manifest.model_extra or {}
    paths = [f.path for f in manifest.files]
    card = Card(
        repo_id=repo_id,
        records=records,
        kind=options.kind or manifest.card or guess_kind(records),
        title=options.title or extra.get("title"),
        description=manifest.description,
        license=manifest.license,
        datasets=manifest.datasets
        or unique(r.metadata.activations.id for r in records if "/" in (r.metadata.activations.id or "")),
        results=_results(find, paths),
        plots=[p for p in paths if p.startswith("plots/") and p.endswith((".png", ".svg"))],
        citation=options.citation or extra.get("citation"),
        limitations=options.limitations or manifest.limitations or (),
    )
    card.examples = example_features(find, {f.path: f.size for f in manifest.files}, card.example.id)
    return card


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
