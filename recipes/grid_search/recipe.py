"""Grid search over architecture, width and sparsity on one layer, trained in one pass and measured in pairs.

    subject    the model and its texts, fixed
    harvest    activations of one layer; a tenth of the prompts is put aside whole
    train      every cell of the sweep, those that fit in memory together; BatchTopK thresholds calibrated
    measure    reconstruction on the held-out prompts, loss on test texts with each SAE in place, with intervals
    synthetic  the same trainer on data whose features are known: how many come out
    analysis   Pareto fronts, paired comparisons of matched cells, plots, findings in words
    release    every SAE with its record, the tables and plots, ready for `hubsae push RUN/release`
    report     all of it beside the published grid, and which of its claims its own rows support

Facts about the published sweep are in README.md, its 36 rows in published.csv.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from hubsae.core.errors import TrainingError
from hubsae.core.files import read_csv, write_csv_atomic, write_text_atomic
from hubsae.core.scopes import excluding
from hubsae.evals.plots import house_style
from hubsae.recipes.one_layer import OneLayer
from hubsae.recipes.report import Report
from hubsae.recipes.run import follows
from hubsae.recipes.standard import Measures, package, pick_device
from hubsae.recipes.steps import Step, StepContext, priced
from hubsae.recipes.subject import Subject, subject_of
from hubsae.recipes.sweep import cells_in, train_cells, trained

from . import findings, plots
from .analysis import Analysis, FailedCell, analyse
from .cells import parse_id
from .configs import train_configs
from .estimate import estimates
from .measure import load_units, measure, save_units
from .published import published_rows, published_section
from .settings import GridConfig as Config
from .synthetic import COSINE, Recovery, recover
from .table import compact_row, full_row, read_results, write_results

NOT_RECOVERED = (
    "`Frac Rec %` in `results_full.csv` is the loss of the model over the loss with the SAE, as in the published "
    "tables; it is no fraction of anything recovered. `frac_recovered_mean` and `frac_recovered_zero` are."
)


def steps(config: Config) -> list[Step]:
    """The steps, each with what it depends on."""
    c, grid = config, _Grid(config)
    texts = {"seed": c.seed, "model": c.model, "data": c.data}
    training = {"seed": c.seed, "sweep": c.sweep, "train": c.train}
    known = {"seed": c.seed, "synthetic": c.synthetic, "jumprelu": c.train.jumprelu}
    about = {"release": c.release, "data": c.data, "train": c.train}
    plan = [
        Step("subject", grid.subject, texts),
        Step("harvest", grid.activations, texts, ("subject",), resumes=True, version=2),
        Step("train", grid.train, training, ("harvest",), resumes=True, spreads=True),
        Step("measure", grid.measure, texts, ("subject", "harvest", "train")),
        Step("synthetic", grid.synthetic, known, resumes=True, spreads=True),
        Step("analysis", grid.analyse, needs=("train", "measure", "synthetic")),
        Step("release", grid.package, about, ("subject", "harvest", "train", "measure", "synthetic", "analysis")),
        Step("report", grid.report, about, ("harvest", "measure", "synthetic", "analysis")),
    ]
    return priced(plan, estimates(config))


class _Grid(OneLayer):
    """The steps' code; holds the config and nothing else."""

    config: Config

    def training_texts(self, subject: Subject) -> list[Any]:
        """The prompts of the harvest; some of them are put aside whole."""
        return self.config.data.items(subject.train[: self.config.data.prompts])

    def train(self, ctx: StepContext) -> dict[str, Any]:
        """Train every cell; ranks of a torchrun launch share them out."""
        config, settings = self.config, self.config.train
        rows = self.rows(ctx.path("harvest"))
        record = self._record(ctx.result("harvest"))
        configs = train_configs(config.sweep.cells(), settings, rows, seed=config.seed, record=record)
        ended = train_cells(configs, rows, ctx.folder, memory=settings.memory_bytes, progress=ctx.progress)
        if follows():
            return {}
        if not any(outcome.ok for outcome in ended):
            raise TrainingError(
                f"none of the {len(ended)} cells could be trained; the first: {ended[0].reason}",
                hint="lower train.lr, or the expansions of the sweep",
            )
        return {"cells": len(ended), "failed": {o.id: o.reason for o in ended if not o.ok}}

    def measure(self, ctx: StepContext) -> dict[str, Any]:
        """Measure the trained cells on held-out prompts and on test texts; write results.csv and results_full.csv."""
        data, subject, device = self.config.data, subject_of(ctx), pick_device()
        held, texts = self.rows(ctx.path("harvest"), "validation"), data.items(subject.test[: data.texts])
        saes = trained(ctx.path("train"), [cell.id for cell in self.config.sweep.cells()], device)
        found = measure(
            saes, held, self.load_model(subject), subject.tokenizer(), texts, self.hook,
            max_length=data.text_length or data.max_length,
            done=lambda number, name: ctx.progress(number, len(saes), name),
        )  # fmt: skip
        write_results(ctx.folder, found.rows)
        save_units(ctx.folder / "units.npz", found.units)
        found.measures.write(ctx.folder)
        failed = {f.id: f.reason for f in found.failed}
        return {"cells": len(found.rows), "held_out_tokens": len(held), "texts": len(texts), "failed": failed}

    def synthetic(self, ctx: StepContext) -> dict[str, Any]:
        """Train the same kinds on data with known features and count how many of them come out."""
        found = recover(self.config.synthetic, self.config.train, self.config.seed, ctx.folder, ctx.progress)
        if follows():
            return {}
        write_csv_atomic(ctx.folder / "recovered.csv", [r.row() for r in found])
        return {"recovered": [[r.cell.id, *r[1:]] for r in found], "features": self.config.synthetic.features}

    def analyse(self, ctx: StepContext) -> dict[str, Any]:
        """Compare, draw, and write the findings."""
        measured, truth = ctx.result("measure"), ctx.result("synthetic")
        found = analyse(
            read_results(ctx.path("measure") / "results_full.csv"),
            load_units(ctx.path("measure") / "units.npz"),
            failed=[FailedCell(*item) for item in {**ctx.result("train")["failed"], **measured["failed"]}.items()],
            recoveries=_recoveries(truth),
        )
        text = findings.markdown(findings.findings(found, published_rows()))
        write_text_atomic(ctx.folder / "findings.md", text + "\n")
        write_csv_atomic(ctx.folder / "comparisons.csv", found.comparison_rows())
        write_csv_atomic(ctx.folder / "front.csv", found.front_table())
        drawn = draw(ctx.folder / "plots", found, measured["held_out_tokens"], truth["features"])
        return {"plots": [path.name for path in drawn], "findings": text}

    def package(self, ctx: StepContext) -> dict[str, Any]:
        """Put every SAE with its numbers, the tables and the plots into a release."""
        about, measured, shelf = ctx.result("harvest"), ctx.path("measure"), cells_in(ctx.path("train"))
        rows = read_results(measured / "results_full.csv")
        found = ctx.result("analysis")
        description = [self._intro(about, ctx.result("measure")), "**Findings**", found["findings"], NOT_RECOVERED]
        tables: dict[str, Any] = {"results": [compact_row(row) for row in rows]}
        for name, step in (("results_full", "measure"), ("comparisons", "analysis"), ("recovered", "synthetic")):
            tables[name] = read_csv(ctx.path(step) / f"{name}.csv")
        public = "/" in about["dataset"] and not Path(about["dataset"]).exists()
        made = package(
            ctx.folder, {row.id: partial(shelf.get, row.id) for row in rows},
            name=self.config.release.name, base_model=about["model"], license=self.config.release.license,
            datasets=[about["dataset"]] if public else [], description="\n\n".join(description),
            measures=Measures.read(measured), tables=tables, subject=subject_of(ctx),
            plots=[ctx.path("analysis") / "plots" / name for name in found["plots"]], progress=ctx.progress,
        )  # fmt: skip
        return {"ids": made.ids, "size": sum(f.size for f in made.manifest.all_files)}

    def report(self, ctx: StepContext) -> dict[str, Any]:
        """The report: findings, our table, the published one, and which of its claims its rows support."""
        about, measured, truth = ctx.result("harvest"), ctx.result("measure"), ctx.result("synthetic")
        rows = read_results(ctx.path("measure") / "results_full.csv")
        report = Report(f"Grid search: {about['model']}, layer {self.config.data.layer}")
        report.text(self._intro(about, measured))
        report.heading("Findings")
        report.text(ctx.result("analysis")["findings"])
        report.heading("Results")
        where = f"{measured['held_out_tokens']:,} tokens of held-out prompts and {measured['texts']} test texts"
        report.table(f"All cells, on {where}", "results", [{"id": row.id} | compact_row(row) for row in rows])
        write_csv_atomic(ctx.folder / "results_full.csv", [full_row(row) for row in rows])
        report.text("All metrics, each with its interval and the tokens it rests on: `results_full.csv`.")
        for name in ctx.result("analysis")["plots"]:
            path = os.path.relpath(ctx.path("analysis") / "plots" / name, ctx.folder)
            report.figure(name.rsplit(".", 1)[0].replace("_", " "), path)
        published_section(report)
        report.heading("Known features")
        report.text(
            f"Synthetic data with {truth['features']} known directions, {self.config.synthetic.l0:g} active per token; "
            f"a direction counts as recovered when a decoder row has a cosine above {COSINE} with it. No cell can hold "
            "more directions than it has latents (`at_most`)."
        )
        report.table("Recovered", "recovered", [r.row() for r in _recoveries(truth)])
        return {"report": report.write(ctx.folder).name}

    def _record(self, about: dict[str, Any]) -> dict[str, Any]:
        """What every SAE's metadata says of where it comes from."""
        data = self.config.data
        split = f"{data.validation_fraction:g} of the prompts held out, chosen by a hash of their number"
        of = {"text_dataset": about["dataset"], "mode": data.described, "tokens": about["tokens"]["train"]}
        return {**about["place"], "activations": of, "training": {"split": split}}

    def _intro(self, about: dict[str, Any], measured: dict[str, Any]) -> str:
        tokens = about["tokens"]
        return (
            f"{measured['cells']} SAEs on layer {self.config.data.layer} of {about['model']}, all trained on the same "
            f"{tokens['train']:,} tokens ({self.config.train.epochs:g} epochs) and measured on "
            f"{tokens['validation']:,} tokens of prompts that no cell saw; loss on {measured['texts']} test texts. "
            f"Intervals are 95 % bootstrap over prompts. Scope: {excluding(self.config.train.exclude).name}, "
            "which is what they were trained on; numbers of another scope say so."
        )


def draw(folder: Path, found: Analysis, tokens: int, features: int) -> list[Path]:
    """Every picture of the analysis; another one is a line here."""
    with house_style():
        drawn = [
            plots.pareto(folder / "pareto_l0_fvu.png", found.rows, "fvu", "FVU"),
            plots.pareto(folder / "pareto_l0_delta_ce.png", found.rows, "delta_ce", "added loss, nats per token"),
            plots.dead_latents(folder / "dead_latents.png", found.rows, tokens),
        ]
        label = "difference in squared error, % of the second"
        for question, comparisons in found.answers.items():
            if question.metric == "mse":
                how = "_at_same_l0" if question.how == "same L0" else ""
                path = folder / f"{question.a}_against_{question.b}{how}.png"
                drawn.append(plots.differences(path, comparisons, question.title, label))
        drawn.append(plots.beside_published(folder / "beside_published.png", found.rows, published_rows()))
        if found.recoveries:
            drawn.append(plots.recovered_features(folder / "recovered_features.png", found.recoveries, features))
    return drawn


def _recoveries(truth: dict[str, Any]) -> list[Recovery]:
    return [Recovery(parse_id(row[0]), *row[1:]) for row in truth["recovered"]]
