"""Grid search over architecture, width and sparsity on one layer, trained in one pass and measured in pairs.

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

from functools import partial

from hubsae.recipes.grid import steps as grid
from hubsae.recipes.grid.estimate import estimates
from hubsae.recipes.grid.settings import GridConfig as Config
from hubsae.recipes.steps import Step


def steps(config: Config) -> list[Step]:
    """The steps, each with what it depends on."""
    cost = estimates(config)
    texts = {"seed": config.seed, "model": config.model, "data": config.data}
    return [
        Step(
            "harvest",
            partial(grid.harvest_layer, config=config),
            settings=texts,
            resumes=True,
            estimate=cost["harvest"],
        ),
        Step(
            "train",
            partial(grid.train_sweep, config=config),
            settings={"seed": config.seed, "sweep": config.sweep, "train": config.train},
            needs=("harvest",),
            resumes=True,
            spreads=True,
            estimate=cost["train"],
        ),
        Step(
            "measure",
            partial(grid.measure_cells, config=config),
            settings={**texts, "sweep": config.sweep},
            needs=("harvest", "train"),
            estimate=cost["measure"],
        ),
        Step(
            "synthetic",
            partial(grid.synthetic_check, config=config),
            settings={"seed": config.seed, "synthetic": config.synthetic, "jumprelu": config.train.jumprelu},
            resumes=True,
            spreads=True,
            estimate=cost["synthetic"],
        ),
        Step(
            "analysis",
            partial(grid.analyse_grid, config=config),
            needs=("train", "measure", "synthetic"),
        ),
        Step(
            "release",
            partial(grid.package, config=config),
            settings={"release": config.release, "data": config.data, "train": config.train},
            needs=("harvest", "train", "measure", "synthetic", "analysis"),
            estimate=cost["release"],
        ),
        Step(
            "report",
            partial(grid.write_report, config=config),
            settings={"data": config.data, "train": config.train},
            needs=("harvest", "measure", "synthetic", "analysis"),
        ),
    ]
