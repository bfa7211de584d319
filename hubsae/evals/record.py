"""Put results where cards find them: metrics into each SAE's metadata.json, tables and plots into the release."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hubsae.activations import ActivationDataset, PairedActivations
from hubsae.core.errors import NotFoundError
from hubsae.core.files import read_csv
from hubsae.core.hooks import KINDS, HookPoint
from hubsae.core.metadata import Metric
from hubsae.core.sae import SAE
from hubsae.evals.comparison import Comparison
from hubsae.evals.drift import DriftReport
from hubsae.evals.plots import plot_deciles, plot_histograms
from hubsae.evals.report import write_report
from hubsae.evals.results import ReconstructionResult
from hubsae.evals.splice import SpliceResult
from hubsae.formats.release import Release


def record_metrics(release: Release, metrics: Mapping[str, Sequence[Metric]]) -> None:
    """Add metrics to the metadata of SAEs by id; one with the same name and scope is replaced."""
    with release.one_manifest():
        for sae_id, entries in metrics.items():
            metadata = release.metadata(sae_id)
            metadata.set_metrics(list(entries))
            release.record(sae_id, metadata)


def record_reconstruction(release: Release, result: ReconstructionResult) -> None:
    """Metrics, tables and plots of a reconstruction pass, into a release whose ids are the names of the SAEs."""
    record_metrics(release, {sae.name: sae.metrics() for sae in result.saes.values()})
    _merge_table(release, "reconstruction", result.rows(), ("sae", "metric", "scope"))
    _merge_table(release, "norm_deciles", result.decile_rows(), ("sae", "scope", "decile"))
    _merge_table(release, "density_histogram", result.histogram_rows(), ("sae", "log10_low"))
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in (("density_histogram", plot_histograms), ("norm_deciles", plot_deciles)):
            release.add_plot(f"{name}.png", draw(result, Path(folder) / f"{name}.png"))


def record_splice(release: Release, results: Mapping[str, SpliceResult]) -> None:
    """Metrics and table of splice results, by id."""
    record_metrics(release, {name: result.metrics() for name, result in results.items()})
    rows = [row for result in results.values() for row in result.rows()]
    _merge_table(release, "splice", rows, ("sae", "metric", "scope"))


def record_drift(release: Release, report: DriftReport, comparison: Comparison | None = None) -> None:
    """Tables, summary and plots of a drift report."""
    with tempfile.TemporaryDirectory() as folder:
        for file in write_report(report, folder):
            if file.suffix == ".png":
                release.add_plot(file.name, file)
            elif file.suffix == ".csv":
                release.add_results(file.name, read_csv(file))
    if comparison is not None and comparison.items:
        release.add_results("drift_comparison", comparison.rows())


def _merge_table(release: Release, name: str, rows: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    """Write rows, keeping those of earlier runs that these do not replace."""
    file = release.path / "results" / f"{name}.csv"
    kept: list[dict[str, Any]] = []
    if file.is_file():
        fresh = {tuple(_text(row.get(column)) for column in key) for row in rows}
        kept = [row for row in read_csv(file) if tuple(row.get(column) or "" for column in key) not in fresh]
    release.add_results(name, [*kept, *rows])


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def activation_reader(
    path: str | Path, *, config: str | None = None, split: str | None = None
) -> Callable[[str | None, int | None, str], ActivationDataset]:
    """Opens the activations of a (stage, layer, kind): config `stage.layers.N`, `layers.N`, or the one given.

    Without a split, validation is taken where there is one, then test, then train. A config that names another
    layer or stage is never taken in its place.
    """
    opened: dict[tuple[str | None, str], ActivationDataset] = {}

    def read(stage: str | None, layer: int | None, kind: str = "resid_post") -> ActivationDataset:
        hook = None if layer is None else HookPoint(layer, kind).name
        names = [config] if config else [f"{stage}.{hook}" if stage and hook else None, hook, None]
        problem: NotFoundError | None = None
        for name in dict.fromkeys(names):
            for part in [split] if split else ["validation", "test", "train"]:
                try:
                    if (name, part) not in opened:
                        opened[name, part] = ActivationDataset.open(path, name, part)
                except NotFoundError as error:
                    problem = problem or error
                    continue
                found = opened[name, part]
                if config or _belongs(found.config, stage, hook):
                    return found
                problem = NotFoundError(
                    f"{path} has {found.config}, which is not stage {stage or 'unknown'}, {hook or 'any layer'}",
                    hint=f"to take it all the same, name it: --config {found.config}",
                )
        raise problem or NotFoundError(f"{path} holds no activations")

    return read


def _belongs(config: str, stage: str | None, hook: str | None) -> bool:
    """Whether a config's name allows it to be this stage and hook; a name that says nothing does."""
    match = re.fullmatch(rf"(?:(.+)\.)?(layers\.\d+(?:\.(?:{'|'.join(KINDS)}))?)", config)
    if match is None:
        return True
    return hook in (None, match[2]) and (match[1] is None or stage in (None, match[1]))


def activations_of(sae: SAE, read: Callable[[str | None, int | None, str], ActivationDataset]) -> Any:
    """What an SAE is measured on, from an `activation_reader`; of a transcoder, both of its hook points."""
    stage, hook = sae.metadata.base_model.stage, sae.metadata.hook
    source = read(stage, hook.layer, hook.kind)
    if not sae.config.is_transcoder:
        return source
    out = sae.metadata.hook_out
    if out is None or out.layer is None:
        raise NotFoundError(
            f"the record of {sae.metadata.id or 'this transcoder'} does not say what it predicts (hook_out)",
            hint="pair the activations yourself: reconstruction(sae, harvested.pair(input, output))",
        )
    return PairedActivations(source, read(stage, out.layer, out.kind))
