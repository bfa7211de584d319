"""The steps of a grid search: harvest, train, measure, synthetic check, analysis, release, report."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hubsae.activations import ActivationDataset, harvest
from hubsae.core.errors import TrainingError
from hubsae.core.files import atomic_path, read_json, write_csv_atomic, write_json_atomic, write_text_atomic
from hubsae.core.hooks import HookPoint
from hubsae.core.metadata import Metric
from hubsae.core.sae import SAE
from hubsae.formats.native import read as read_sae
from hubsae.recipes.grid import findings as words
from hubsae.recipes.grid import plots
from hubsae.recipes.grid.analysis import Analysis, FailedCell, analyse
from hubsae.recipes.grid.cells import parse_id
from hubsae.recipes.grid.configs import calibrated, train_configs
from hubsae.recipes.grid.live import Live
from hubsae.recipes.grid.measure import load_units, measure, save_units
from hubsae.recipes.grid.published import claims, implied_base_loss, published_rows
from hubsae.recipes.grid.settings import GridConfig, TrainSettings
from hubsae.recipes.grid.synthetic import COSINE, Recovery, draw, make_world, recovered
from hubsae.recipes.grid.table import compact_row, full_row, read_results, write_results
from hubsae.recipes.grid.texts import load_subject
from hubsae.recipes.grid.training import Outcome, cell_folder, outcomes, train_cells
from hubsae.recipes.report import Report
from hubsae.recipes.steps import StepContext

RECORDS = "metrics.json"
NOT_RECOVERED = (
    "`Frac Rec %` in `results_full.csv` is the loss of the model over the loss with the SAE, as in the published "
    "tables; it is no fraction of anything recovered. `frac_recovered_mean` and `frac_recovered_zero` are."
)


def harvest_layer(ctx: StepContext, config: GridConfig) -> dict[str, Any]:
    """Write the activations of one layer; some prompts are put aside whole."""
    subject = load_subject(config.model, config.data, config.seed, ctx.progress)
    hook = hook_name(config)
    harvest(
        subject.model, subject.train, [hook], out=ctx.folder, tokenizer=subject.tokenizer,
        mode="prompt+response" if config.data.chat else "text", max_length=config.data.max_length,
        validation_fraction=config.data.validation_fraction, split_by="sample", split_seed=config.seed,
        rank=0, world_size=1, progress=False,
    )  # fmt: skip
    parts = {split: ActivationDataset.open(ctx.folder, hook, split) for split in ("train", "validation")}
    return {
        "model": subject.name,
        "revision": subject.revision,
        "dataset": subject.dataset,
        "hook": hook,
        "module_path": HookPoint.parse(hook).module_path(subject.model),
        "transformer_lens": HookPoint.parse(hook).transformer_lens,
        "d_in": parts["train"].d,
        "prompts": len(subject.train),
        "tokens": {split: len(part) for split, part in parts.items()},
    }


def train_sweep(ctx: StepContext, config: GridConfig) -> dict[str, Any]:
    """Train every cell; ranks of a torchrun launch share them out."""
    about = ctx.result("harvest")
    activations = ActivationDataset.open(ctx.path("harvest"), about["hook"], "train")
    configs = train_configs(
        config.sweep.cells(), config.train, activations, seed=config.seed, record=_record(config, about)
    )
    tokens = config.train.calibration_tokens
    ended = run_cells(
        ctx, configs, activations, config.train, partial(calibrated, activations=activations, tokens=tokens)
    )
    if ended is None:
        return {}
    if not any(outcome.ok for outcome in ended):
        raise TrainingError(
            f"none of the {len(ended)} cells could be trained; the first: {ended[0].reason}",
            hint="lower train.lr, or the expansions of the sweep",
        )
    return {"cells": len(ended), "failed": {o.id: o.reason for o in ended if not o.ok}}


def run_cells(
    ctx: StepContext,
    configs: list[Any],
    activations: Any,
    settings: TrainSettings,
    finish: Callable[[SAE], SAE],
) -> list[Outcome] | None:
    """Train cells in the step's folder with the live table, as the rank this process is; None on helping ranks."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    memory = None if settings.memory_gb is None else int(settings.memory_gb * 2**30)
    with Live(ctx, [c.name for c in configs]) if rank == 0 else Live.off():
        ended = train_cells(
            configs, activations, ctx.folder, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu",
            memory=memory, rank=rank, world=world, finish=finish,
        )  # fmt: skip
    return ended if rank == 0 else None


def measure_cells(ctx: StepContext, config: GridConfig) -> dict[str, Any]:
    """Measure the trained cells on held-out prompts and on test texts; write results.csv and results_full.csv."""
    about = ctx.result("harvest")
    subject = load_subject(config.model, config.data, config.seed)
    held = ActivationDataset.open(ctx.path("harvest"), about["hook"], "validation")
    ids = [cell.id for cell in config.sweep.cells()]
    ended = outcomes(ctx.path("train"), ids)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaders = {o.id: partial(read_sae, cell_folder(ctx.path("train"), o.id), device=device) for o in ended if o.ok}
    found = measure(
        loaders, held, subject.model, subject.tokenizer, subject.test, about["hook"],
        max_length=config.data.max_length,
        done=lambda number, name: ctx.progress(number, len(loaders), name),
    )  # fmt: skip
    write_results(ctx.folder, found.rows)
    for name, rows in found.tables.items():
        write_csv_atomic(ctx.folder / f"{name}.csv", rows)
    save_units(ctx.folder / "units.npz", found.units)
    write_json_atomic(
        ctx.folder / RECORDS, {name: [m.model_dump(mode="json") for m in ms] for name, ms in found.metrics.items()}
    )
    with atomic_path(ctx.folder / "sparsity.safetensors") as scratch:
        save_file({name: t.contiguous() for name, t in found.sparsity.items()}, scratch)
    return {
        "cells": len(found.rows),
        "held_out_tokens": len(held),
        "texts": len(subject.test),
        "failed": {f.id: f.reason for f in found.failed},
    }


def synthetic_check(ctx: StepContext, config: GridConfig) -> dict[str, Any]:
    """Train the same kinds on data with known features and count how many of them come out."""
    s = config.synthetic
    world = make_world(s.d_in, s.features, s.l0, spread=s.spread, seed=config.seed)
    x = draw(world, s.tokens, noise=s.noise, seed=config.seed + 1)
    held = draw(world, 8192, noise=s.noise, seed=config.seed + 2)
    settings = TrainSettings(
        epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, jumprelu=config.train.jumprelu,
        memory_gb=config.train.memory_gb,
    )  # fmt: skip
    cells = s.sweep().cells()
    configs = train_configs(cells, settings, x, seed=config.seed)
    ended = run_cells(ctx, configs, x, settings, partial(calibrated, activations=x, tokens=len(x)))
    if ended is None:
        return {}
    found = []
    for cell in (parse_id(outcome.id) for outcome in ended if outcome.ok):
        sae = read_sae(cell_folder(ctx.folder, cell.id))
        fraction, cosine = recovered(world.directions, sae.W_dec)
        codes = sae.encode_sparse(held)
        spread = (held - held.mean(0)).square().sum()
        fvu = float((held - sae.decode(codes)).square().sum() / spread)
        l0 = float((codes.values != 0).sum() / len(held))
        found.append(Recovery(cell, sae.d_sae, fraction, cosine, min(1.0, sae.d_sae / s.features), fvu, l0))
    write_csv_atomic(ctx.folder / "recovered.csv", [_recovery_row(r) for r in found])
    return {"recovered": [[r.cell.id, *r[1:]] for r in found], "features": s.features, "l0": s.l0}


def analyse_grid(ctx: StepContext, config: GridConfig) -> dict[str, Any]:
    """Compare, draw, and write the findings."""
    result, truth = ctx.result("measure"), ctx.result("synthetic")
    failed = [FailedCell(*item) for item in {**ctx.result("train")["failed"], **result["failed"]}.items()]
    recoveries = [Recovery(parse_id(row[0]), *row[1:]) for row in truth["recovered"]]
    rows = read_results(ctx.path("measure") / "results_full.csv")
    found = analyse(rows, load_units(ctx.path("measure") / "units.npz"), failed=failed, recoveries=recoveries)
    published = published_rows()
    text = words.markdown(words.findings(found, published))
    write_text_atomic(ctx.folder / "findings.md", text + "\n")
    write_csv_atomic(ctx.folder / "comparisons.csv", found.comparison_rows())
    write_csv_atomic(
        ctx.folder / "front.csv",
        [
            {"metric": m, "id": r.id, "l0": r.value("l0"), m: r.value(m)}
            for m, best in found.fronts.items()
            for r in best
        ],
    )
    drawn = _draw(ctx.folder / "plots", found, result["held_out_tokens"], truth["features"])
    return {"plots": [path.name for path in drawn], "findings": text}


def package(ctx: StepContext, config: GridConfig) -> dict[str, Any]:
    """Put every SAE with its numbers, the tables and the plots into a release."""
    from hubsae.formats.release import Release

    about, measured = ctx.result("harvest"), ctx.path("measure")
    metrics = read_json(measured / RECORDS)
    sparsity = load_file(measured / "sparsity.safetensors")
    intro = _intro(config, about, ctx.result("measure"))
    description = [intro, "**Findings**", ctx.result("analysis")["findings"], NOT_RECOVERED]
    public = about["dataset"] if "/" in about["dataset"] and not Path(about["dataset"]).exists() else None
    release = Release.create(
        ctx.folder,
        name=config.release.name,
        base_model=about["model"],
        license=config.release.license,
        datasets=[public] if public else [],
        description="\n\n".join(description),
    )
    rows = read_results(measured / "results_full.csv")
    for number, row in enumerate(rows):
        ctx.progress(number, len(rows), row.id)
        sae = read_sae(cell_folder(ctx.path("train"), row.id))
        sae.metadata.set_metrics([Metric.model_validate(m) for m in metrics[row.id]])
        sae.sparsity = sparsity[row.id]
        release.add(sae, row.id)
    release.add_results("results", [compact_row(row) for row in rows])
    for name, folder in (("results_full", "measure"), ("comparisons", "analysis"), ("recovered", "synthetic")):
        _copy_results(release, ctx.path(folder) / f"{name}.csv")
    for name in ctx.result("analysis")["plots"]:
        release.add_plot(name, ctx.path("analysis") / "plots" / name)
    release.refresh()
    release.verify()
    return {"ids": release.ids, "size": sum(f.size for f in release.manifest.all_files)}


def write_report(ctx: StepContext, config: GridConfig) -> dict[str, Any]:
    """The report: findings, our table, the published one, and which of its claims its rows support."""
    about, measured = ctx.result("harvest"), ctx.result("measure")
    rows = read_results(ctx.path("measure") / "results_full.csv")
    report = Report(f"Grid search: {about['model']}, layer {config.data.layer}")
    report.text(_intro(config, about, measured))
    report.heading("Findings")
    report.text(ctx.result("analysis")["findings"])
    report.heading("Results")
    report.table(
        f"All cells, on {measured['held_out_tokens']:,} tokens of held-out prompts and {measured['texts']} test texts",
        "results",
        [{"id": row.id} | compact_row(row) for row in rows],
    )
    write_csv_atomic(ctx.folder / "results_full.csv", [full_row(row) for row in rows])
    report.text("All metrics, each with its interval and the tokens it rests on: `results_full.csv`.")
    for name in ctx.result("analysis")["plots"]:
        path = Path(os.path.relpath(ctx.path("analysis") / "plots" / name, ctx.folder))
        report.figure(name.rsplit(".", 1)[0].replace("_", " "), path)
    _published_section(report)
    truth = ctx.result("synthetic")
    report.heading("Known features")
    report.text(
        f"Synthetic data with {truth['features']} known directions, {truth['l0']:g} active per token; a direction "
        f"counts as recovered when a decoder row has a cosine above {COSINE} with it. No cell can hold more "
        "directions than it has latents (`at_most`)."
    )
    recoveries = [Recovery(parse_id(row[0]), *row[1:]) for row in truth["recovered"]]
    report.table("Recovered", "recovered", [_recovery_row(r) for r in recoveries])
    path = report.write(ctx.folder)
    return {"report": path.name}


def hook_name(config: GridConfig) -> str:
    """The hook point as a dataset config."""
    return HookPoint.parse(config.data.layer).name


# ---- inside ------------------------------------------------------------------------------------------------


def _record(config: GridConfig, about: dict[str, Any]) -> dict[str, Any]:
    """What every SAE's metadata says of where it comes from."""
    mode = "question and answer in the chat template" if config.data.chat else "the bare question"
    return {
        "base_model": {"id": about["model"], "revision": about["revision"], "dtype": config.model.dtype},
        "hook": {
            "layer": config.data.layer,
            "kind": "resid_post",
            "module_path": about["module_path"],
            "transformer_lens": about["transformer_lens"],
            "context_size": config.data.max_length,
        },
        "activations": {"text_dataset": about["dataset"], "mode": mode, "tokens": about["tokens"]["train"]},
        "training": {
            "split": f"{config.data.validation_fraction:g} of the prompts held out, chosen by a hash of their number",
        },
    }


def _intro(config: GridConfig, about: dict[str, Any], measured: dict[str, Any]) -> str:
    tokens = about["tokens"]
    return (
        f"{measured['cells']} SAEs on layer {config.data.layer} of {about['model']}, all trained on the same "
        f"{tokens['train']:,} tokens ({config.train.epochs:g} epochs) and measured on {tokens['validation']:,} tokens "
        f"of prompts that no cell saw; loss on {measured['texts']} test texts. Intervals are 95 % bootstrap over "
        "prompts."
    )


def _draw(folder: Path, found: Analysis, tokens: int, features: int) -> list[Path]:
    drawn = [
        plots.pareto(folder / "pareto_l0_fvu.png", found.rows, "fvu", "FVU"),
        plots.pareto(folder / "pareto_l0_delta_ce.png", found.rows, "delta_ce", "added loss, nats per token"),
        plots.dead_latents(folder / "dead_latents.png", found.rows, tokens),
    ]
    for question, comparisons in found.answers.items():
        if question.metric != "mse":
            continue
        name = f"{question.a}_against_{question.b}.png"
        label = "difference in squared error, % of the second"
        drawn.append(plots.differences(folder / name, comparisons, question.title, label))
    drawn.append(plots.beside_published(folder / "beside_published.png", found.rows, published_rows()))
    if found.recoveries:
        drawn.append(plots.recovered_features(folder / "recovered_features.png", found.recoveries, features))
    return drawn


def _published_section(report: Report) -> None:
    rows = published_rows()
    base, _ = implied_base_loss(rows)
    report.heading("The published grid")
    report.text(
        f"{len(rows)} cells on layer 12 of Qwen2.5-0.5B-Instruct. Another model than the tiny one, other tokens and "
        "one seed: compare shapes, not values. `frac rec %` is L_base / L_sae, with L_base = "
        f"{base:.2f} nats in every row. What the release says, held against its own rows:"
    )
    told = [{"claim": c.statement, "its rows": c.verdict, "evidence": c.evidence} for c in claims(rows)]
    report.table("Claims", "published_claims", told)
    report.table(
        "Published rows",
        "published",
        [
            {
                "Type": r.architecture, "Expansion": r.expansion, "K": r.k, "Threshold": r.threshold, "L0": r.l0,
                "Val MSE": r.mse, "NMSE": r.nmse, "Dead %": round(100 * r.dead, 2), "Delta Loss": r.delta_loss,
                "frac rec %": round(100 * r.frac_rec, 2),
            }
            for r in rows
        ],
    )  # fmt: skip


def _recovery_row(r: Recovery) -> dict[str, Any]:
    numbers = {name: getattr(r, name) for name in Recovery._fields[1:]}
    return {"id": r.cell.id, **{k: round(v, 5) if isinstance(v, float) else v for k, v in numbers.items()}}


def _copy_results(release: Any, file: Path) -> None:
    import csv

    with file.open(encoding="utf-8", newline="") as stream:
        release.add_results(file.name, list(csv.DictReader(stream)))
