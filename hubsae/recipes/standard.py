"""What the steps of most recipes do; what a step leaves is a thing with a name, so that no step rebuilds its paths.

Activations    what a harvest left, opened by layer, stage and split
Shelf          SAEs in a folder by id, written whole or not at all
Measures       what was measured of SAEs
package        a release from SAEs, their numbers, tables and plots
add_pages      features in the open: what they fire on, and the pages that show it
publishing     the step that pushes a release, and the activations
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hubsae.activations import ActivationDataset
from hubsae.core.files import atomic_path, read_csv, read_json, write_csv_atomic, write_json_atomic, write_text_atomic
from hubsae.core.metadata import Metric
from hubsae.core.quiet import quiet
from hubsae.core.sae import SAE
from hubsae.core.settings import Settings
from hubsae.formats import Release, native
from hubsae.hub.sae import HubSAE
from hubsae.index import build, page
from hubsae.index.files import FOLDER
from hubsae.recipes.steps import Estimate, Step, StepContext
from hubsae.recipes.subject import Subject
from hubsae.train.parallel import pick_device as pick_device

WEIGHTS_AT_ONCE = 4 << 30
"""Bytes of SAEs held at a time by `in_parts`."""


@dataclass(frozen=True)
class Activations:
    """What a harvest left in a folder."""

    folder: Path

    def open(self, layer: int | str, split: str, stage: str | None = None) -> ActivationDataset:
        """One hook point, at one stage where there are several."""
        hook = f"layers.{layer}" if isinstance(layer, int) else layer
        return ActivationDataset.open(self.folder, f"{stage}.{hook}" if stage else hook, split)


@dataclass(frozen=True)
class Shelf:
    """SAEs in a folder, by id.

    >>> import tempfile
    >>> from hubsae.core.config import SAEConfig
    >>> shelf = Shelf(Path(tempfile.mkdtemp()))
    >>> shelf.put("topk/layer1", HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2), seed=0))
    >>> shelf.get("topk/layer1").d_sae
    8
    """

    folder: Path

    def where(self, name: str) -> Path:
        """The folder of an SAE."""
        return self.folder / name

    def put(self, name: str, sae: Any) -> None:
        """Write an SAE, in place of what was there."""
        target = self.where(name)
        scratch = target.with_name(f".{target.name}.writing")
        for old in (scratch, target):
            shutil.rmtree(old, ignore_errors=True)
        native.write(sae, scratch)
        os.replace(scratch, target)

    def get(self, name: str, device: str = "cpu") -> HubSAE:
        """Read an SAE."""
        return HubSAE.from_pretrained(self.where(name), device=device)


def in_parts(saes: Mapping[str, Callable[[], SAE]]) -> Iterator[dict[str, SAE]]:
    """SAEs, given as functions that load them, as many at a time as fit into WEIGHTS_AT_ONCE."""
    held: dict[str, SAE] = {}
    size = 0
    for name, load in saes.items():
        sae = load()
        mine = sum(t.numel() * t.element_size() for t in sae.tensors().values())
        if held and size + mine > WEIGHTS_AT_ONCE:
            yield held
            held, size = {}, 0
            gc.collect()
        held[name] = sae
        size += mine
    if held:
        yield held


@dataclass
class Measures:
    """What was measured of SAEs: one step writes it, that of the release reads it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> error = Metric(name="mse", value=0.5, definition="mean", n_tokens=9, scope="all", source="hubsae")
    >>> Measures({"topk/layer1": [error]}).write(folder)
    >>> Measures.read(folder).metrics["topk/layer1"][0].value
    0.5
    """

    metrics: dict[str, list[Metric]] = field(default_factory=dict)
    """By SAE, for its record."""
    density: dict[str, Tensor] = field(default_factory=dict)
    """By SAE, where it is known: log10 of how often each latent fires [d_sae]."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By name; each becomes a CSV, which `tables_in` finds."""

    def write(self, folder: Path) -> None:
        """Write all of it."""
        for name, rows in self.tables.items():
            write_csv_atomic(folder / f"{name}.csv", rows)
        lists = {name: [metric.model_dump(mode="json") for metric in found] for name, found in self.metrics.items()}
        write_json_atomic(folder / "metrics.json", lists)
        if self.density:
            with atomic_path(folder / "density.safetensors") as scratch:
                save_file({name: tensor.contiguous() for name, tensor in self.density.items()}, scratch)

    @staticmethod
    def read(*folders: Path) -> Measures:
        """Metrics and densities of all the folders."""
        out = Measures()
        for folder in folders:
            for name, found in read_json(folder / "metrics.json").items():
                out.metrics[name] = [Metric.model_validate(metric) for metric in found]
            if (path := folder / "density.safetensors").is_file():
                out.density |= load_file(path)
        return out


class PublishSettings(Settings):
    """Repos to push to at the end; nothing is pushed where none is named."""

    release: str | None = None
    activations: str | None = None
    private: bool = False


def package(
    folder: Path,
    saes: Mapping[str, Callable[[], SAE]],
    *,
    name: str,
    base_model: str,
    license: str | None = "apache-2.0",
    datasets: Sequence[str] = (),
    description: str | None = None,
    measures: Measures | None = None,
    tables: Mapping[str, Sequence[dict[str, Any]]] | None = None,
    plots: Sequence[Path] = (),
    also: Sequence[str] = (),
    card: str | None = None,
    subject: Subject | None = None,
    stages: Mapping[str, Callable[[], Any]] | None = None,
    progress: Callable[..., None] | None = None,
) -> Release:
    """A release in `folder`, verified, with its card; SAEs are given as functions that load them.

    `also` names further formats to write beside each SAE. `card` names its template; the release remembers it, so that
    a push renders the same. With a `subject` the SAEs carry what its model has at their hook points, to check a model
    with; those of `stages` (by name, with what loads its model) what the model of their stage has.
    """
    made = Release.create(
        folder, name=name, base_model=base_model, license=license, datasets=list(datasets), description=description,
        card=card,
    )  # fmt: skip
    for number, (sae_id, load) in enumerate(saes.items()):
        if progress is not None:
            progress(number, len(saes), sae_id)
        sae = load()
        if measures is not None:
            sae.metadata.set_metrics(measures.metrics[sae_id])
            sae.sparsity = measures.density.get(sae_id, sae.sparsity)
        made.add(sae, sae_id, also=also)
    if subject is not None:
        tokenizer = subject.tokenizer()
        for stage, load_model in (stages or {None: subject.load}).items():
            made.add_fingerprints(load_model(), tokenizer, stage=stage)
    for title, rows in (tables or {}).items():
        made.add_results(title, rows)
    for plot in plots:
        made.add_plot(plot.name, plot)
    made.refresh()
    made.verify()
    write_card(made.path, name)
    return made


def index_features(
    folder: Path, saes: Mapping[str, SAE], rows: ActivationDataset, subject: Subject, *, top: int = 10, window: int = 8
) -> list[Path]:
    """What every feature fires on and promotes: an index of each SAE, below `folder`."""
    return build.index_activations(
        saes, rows, folder, build.Settings(top=top, window=window), tokenizer=subject.tokenizer(),
        tokenizer_id=subject.label, model=subject.load(), show=False,
    )  # fmt: skip


def add_pages(folder: Path, indexes: Path, name: str) -> Release:
    """Put indexes and the pages that show them into a release; its card shows features once there are some to show."""
    shutil.copytree(indexes, folder / FOLDER, dirs_exist_ok=True)
    page.build(folder, title=name)
    made = Release.open(folder).refresh()
    made.verify()
    write_card(folder, name)
    return made


def write_card(folder: Path, name: str) -> None:
    """The card of a release folder, as its README."""
    from hubsae.hub.card import card_of_release, render_card

    write_text_atomic(folder / "README.md", render_card(card_of_release(folder, f"you/{name}")).text)


def publishing(settings: PublishSettings, activations: str = "") -> list[Step]:
    """The step that pushes what the settings name, behind `release`; none where they name nothing.

    `activations` is the step that took them, in recipes that can push them.
    """
    repos = [repo for repo in (settings.release, settings.activations if activations else None) if repo]
    needs = tuple(filter(None, ("release", activations)))
    estimate = Estimate(f"push to {', '.join(repos)}")
    return [Step("publish", partial(_publish, activations), settings, needs, estimate=estimate)] if repos else []


def _publish(activations: str, ctx: StepContext) -> dict[str, Any]:
    """The pages at which it can be seen."""
    from hubsae.hub.datasets import push_activations
    from hubsae.hub.push import push

    settings, done = ctx.settings, {}
    options: dict[str, Any] = {"private": True} if settings.private else {}
    if settings.release:
        done["release"] = push(ctx.path("release"), settings.release, **options).url
    if settings.activations and activations:
        done["activations"] = push_activations(ctx.path(activations), settings.activations, **options).url
    return done


def tables_in(*folders: Path) -> dict[str, list[dict[str, str]]]:
    """Every CSV in these folders, by name."""
    return {path.stem: read_csv(path) for folder in folders for path in sorted(folder.glob("*.csv"))}


@contextmanager
def surroundings(threads: int | None = None, matmul: str = "auto") -> Iterator[None]:
    """Run with this many torch threads, with a fixed product in the trainer, without other libraries' chatter.

    None leaves the threads as they are; a choice of product in the environment (HUBSAE_LINEAR) is left alone.
    """
    before, fixed = torch.get_num_threads(), matmul != "auto" and "HUBSAE_LINEAR" not in os.environ
    if threads is not None:
        torch.set_num_threads(threads)
    if fixed:
        os.environ["HUBSAE_LINEAR"] = matmul
    try:
        with quiet():
            yield
    finally:
        torch.set_num_threads(before)
        if fixed:
            del os.environ["HUBSAE_LINEAR"]
