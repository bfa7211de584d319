"""The table of dead features: how many of each variant never fire, beside the norm ratio of its training space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hubsae.activations.stats import ActivationStats
from hubsae.evals.results import SAEReconstruction
from hubsae.recipes.sweep import Outcome

from .settings import Config


def gamma(stats: ActivationStats) -> dict[str, float]:
    """The norm ratio ‖mean‖ / ‖std‖ that predicts dead features, over all tokens and without position 0."""
    pairs = {"all": (stats.mean, stats.std), "not position_0": (stats.mean_without_first, stats.std_without_first)}
    return {scope: float(mean.norm() / std.norm()) for scope, (mean, std) in pairs.items()}


def row_of(cell: Outcome, measured: SAEReconstruction, scope: str) -> dict[str, Any]:
    """One cell: how many features never fired on the activations put aside, and how well it reconstructs them."""
    variant, _, seed = cell.id.rpartition("-")
    dead = measured.get("dead_fraction", scope)
    return {
        "variant": variant, "seed": int(seed), "dead": dead.value, "on_tokens": dead.n_tokens,
        "fve": measured.value("fve", scope), "l0": measured.value("l0", scope), "dead_in_training": cell.dead,
        "training_tokens": cell.tokens,
    }  # fmt: skip


def summary(cells: Sequence[Mapping[str, Any]], stats: ActivationStats, config: Config) -> list[dict[str, Any]]:
    """One row per variant: mean over seeds and the range, beside the norm ratio of the space it was trained in."""
    scope = "not position_0" if "position_0" in config.sae.exclude else "all"
    rows, ratio = [], gamma(stats)[scope]
    spaces = {name.rpartition("-")[0]: cell.normalize for name, cell in config.variants().items()}
    for variant in dict.fromkeys(row["variant"] for row in cells):
        mine = [row for row in cells if row["variant"] == variant]
        dead, fve = ([row[name] for row in mine] for name in ("dead", "fve"))
        rows.append(
            {
                "variant": variant, "gamma": ratio if spaces[variant] == "none" else 0.0, "seeds": len(mine),
                "dead": float(np.mean(dead)), "dead_from": min(dead), "dead_to": max(dead),
                "fve": float(np.mean(fve)), "fve_from": min(fve), "fve_to": max(fve), "on_tokens": mine[0]["on_tokens"],
            }
        )  # fmt: skip
    return rows
