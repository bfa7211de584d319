"""What published tables support on their own: rates at matched steps, who is ahead where, what a column is not.

Nothing is loaded but the table. A ratio of two small differences of printed numbers inherits their rounding,
so its interval draws every printed digit anew within half a unit of its last place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from hubsae.core.errors import FormatError
from hubsae.recipes.registry import find_recipe

from .printed import BUNDLED, Row, TableReport, find_table, half_unit, read_table
from .table_chains import analyse_chains, compare_chains

__all__ = [
    "BUNDLED",
    "TableReport",
    "analyse_table",
    "compare_chains",
    "find_table",
    "half_unit",
    "read_table",
]


def analyse_table(path: str | os.PathLike[str]) -> TableReport:
    """Analyse a published table; its columns say which kind it is."""
    file = find_table(path)
    rows = read_table(file)
    columns = set(rows[0])
    for needed, analyse in KINDS:
        if needed <= columns:
            return analyse(rows, file.name)
    expected = "; or ".join(", ".join(sorted(needed)) for needed, _ in KINDS)
    raise FormatError(file, f"a table with the columns {expected}", f"columns {', '.join(rows[0])}")


# ---- grid --------------------------------------------------------------------------------------------------


def _grid(rows: Sequence[Row], source: str) -> TableReport:
    """The claims of the grid, as the recipe that reproduces it holds them against its rows."""
    published = find_recipe("grid_search").module("published")
    report = TableReport("grid", source)
    for claim in published.claims(published.parse_rows(rows, source)):
        report.add(f"{claim.statement} {claim.evidence}", claim.verdict == "supported", verdict=claim.verdict)
    return report


# ---- instruct-aligned training -----------------------------------------------------------------------------


def _instruct(rows: Sequence[Row], source: str) -> TableReport:
    """Where each method has the lowest error, as the recipe that reproduces it counts."""
    published = find_recipe("fast").module("published")
    report = TableReport("instruct", source)
    report.tables["wins"] = published.win_rows(published.table(rows, source))
    for row in report.tables["wins"]:
        lowest = {name.removeprefix("lowest: "): n for name, n in row.items() if name.startswith("lowest: ")}
        text = ", ".join(f"{method} {n}" for method, n in lowest.items())
        report.add(f"{row['SAE']}, {row['error']}: lowest in {text} of {sum(lowest.values())} settings", holds=True)
    report.add(
        "values are log2 of an MSE: 2^value is the MSE; L0 is not published, so nothing here is at equal sparsity",
        holds=None,
    )
    return report


# ---- accuracy and cosines ----------------------------------------------------------------------------------


def _accuracy(rows: Sequence[Row], source: str) -> TableReport:
    report = TableReport("accuracy", source)
    runs: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append((int(row["step"]), float(row["accuracy"])))
    report.tables["runs"] = [
        {
            "run": run,
            "first": sorted(points)[0][1],
            "last_step": max(points)[0],
            "last": sorted(points)[-1][1],
            "best": max(value for _, value in points),
            "best_steps": " ".join(str(s) for s, v in sorted(points) if v == max(x for _, x in points)),
        }
        for run, points in runs.items()
    ]
    for row in report.tables["runs"]:
        report.add(f"{row['run']}: best accuracy {row['best']:.1%} (step {row['best_steps']})", holds=True)
    return report


def _cosines(rows: Sequence[Row], source: str) -> TableReport:
    report = TableReport("decoder_cosine", source)
    table = []
    for row in rows:
        steps = int(row["to_step"]) - int(row["from_step"])
        drift = 1 - float(row["mean_decoder_cosine"])
        table.append({**row, "drift": drift, "drift_per_step": drift / steps})
    report.tables["decoder_drift"] = table
    first = [row for row in table if int(row["from_step"]) == 0]
    report.add(
        f"the first transition drifts {min(r['drift_per_step'] for r in first):.4f} to "
        f"{max(r['drift_per_step'] for r in first):.4f} per step, later ones at most "
        f"{max(r['drift_per_step'] for r in table if int(r['from_step']) > 0):.4f}",
        holds=True,
    )
    return report


KINDS: tuple[tuple[set[str], Callable[[Sequence[Row], str], TableReport]], ...] = (
    ({"chain", "stage", "layer", "k", "mse", "nmse", "n_dead", "l_sae", "frac_rec"}, analyse_chains),
    ({"architecture", "expansion", "k", "val_mse", "dead_percent", "delta_loss", "published_frac_rec_percent"}, _grid),
    ({"model", "layer", "expansion", "architecture", "metric", "method", "value"}, _instruct),
    ({"run", "step", "accuracy"}, _accuracy),
    ({"chain", "layer", "from_step", "to_step", "mean_decoder_cosine"}, _cosines),
)
