"""What published tables support on their own: rates at matched steps, who is ahead where, what a column is not.

Nothing is loaded but the table. A ratio of two small differences of printed numbers inherits their rounding,
so its interval draws every printed digit anew within half a unit of its last place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from hubsae.core.errors import FormatError

from .printed import BUNDLED, Row, TableReport, find_table, half_unit, read_table
from .table_chains import analyse_chains, compare_chains

__all__ = [
    "BUNDLED",
    "TableReport",
    "analyse_table",
    "base_loss_from_ratio",
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
    report = TableReport("grid", source)
    cells: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        if row["k"]:
            cells.setdefault((int(row["expansion"]), int(row["k"])), {})[row["architecture"]] = row
    table = []
    for (expansion, k), pair in sorted(cells.items()):
        if not {"TopK", "BatchTopK"} <= set(pair):
            continue
        top, batch = pair["TopK"], pair["BatchTopK"]
        table.append(
            {
                "expansion": expansion,
                "k": k,
                "mse_topk": float(top["val_mse"]),
                "mse_batchtopk": float(batch["val_mse"]),
                "lower_mse": _lower(top, batch, "val_mse"),
                "dead_percent_topk": float(top["dead_percent"]),
                "dead_percent_batchtopk": float(batch["dead_percent"]),
                "fewer_dead": _lower(top, batch, "dead_percent"),
            }
        )
    report.tables["matched_cells"] = table
    mse = sum(row["lower_mse"] == "TopK" for row in table)
    dead = sum(row["fewer_dead"] == "BatchTopK" for row in table)
    report.add(f"TopK has the lower MSE in {mse} of {len(table)} matched cells", holds=True, count=mse, of=len(table))
    report.add(
        f"BatchTopK has fewer dead latents in {dead} of {len(table)} matched cells",
        holds=True,
        count=dead,
        of=len(table),
    )
    report.add(
        "BatchTopK is ahead on both MSE and dead latents in every cell",
        holds=mse == 0 and dead == len(table),
    )
    _recovered_findings(report, rows)
    jump = [float(row["l0"]) for row in rows if row["architecture"] == "JumpReLU"]
    if jump:
        report.add(
            f"JumpReLU rows run at L0 {min(jump):g} to {max(jump):g}, the others at 32 to 220: their MSE is not "
            "compared at equal sparsity",
            holds=None,
        )
    return report


def _lower(top: Row, batch: Row, column: str) -> str:
    a, b = float(top[column]), float(batch[column])
    return "tie" if a == b else "TopK" if a < b else "BatchTopK"


def base_loss_from_ratio(rows: Sequence[Row]) -> tuple[float, float] | None:
    """The range of L_base for which every published ratio is L_base/(L_base + ΔL) to its printed digits.

    Loss recovered compares with an ablation and cannot follow this law for one L_base in every row. None
    where no L_base fits all rows.
    """
    low, high = 0.0, np.inf
    for row in rows:
        delta, share = float(row["delta_loss"]), float(row["published_frac_rec_percent"]) / 100
        half_d, half_s = half_unit(row["delta_loss"]), half_unit(row["published_frac_rec_percent"]) / 100
        corners = []
        for d in (delta - half_d, delta + half_d):
            for s in (share - half_s, share + half_s):
                if s != 1:
                    corners.append(d * s / (1 - s))
        crosses_one = (share - half_s - 1) * (share + half_s - 1) <= 0
        if crosses_one:
            continue
        low, high = max(low, min(corners)), min(high, max(corners))
    return (low, high) if low <= high else None


def _recovered_findings(report: TableReport, rows: Sequence[Row]) -> None:
    fits = base_loss_from_ratio(rows)
    if fits is None:
        report.add("the published frac_rec is not one ratio of L_base to L_sae", holds=None)
        return
    base = (fits[0] + fits[1]) / 2
    report.tables["published_frac_rec"] = [
        {
            "architecture": row["architecture"],
            "expansion": int(row["expansion"]),
            "l0": float(row["l0"]),
            "published_percent": float(row["published_frac_rec_percent"]),
            "l_base_over_l_sae_percent": 100 * base / (base + float(row["delta_loss"])),
        }
        for row in rows
    ]
    report.add(
        f"the published frac_rec is not loss recovered: in all {len(rows)} rows it is L_base / L_sae with L_base = "
        f"{base:.4f} nats, and no ablation enters it",
        holds=True,
        l_base_low=fits[0],
        l_base_high=fits[1],
        rows=len(rows),
    )


# ---- instruct-aligned training -----------------------------------------------------------------------------


def _instruct(rows: Sequence[Row], source: str) -> TableReport:
    report = TableReport("instruct", source)
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["architecture"], row["metric"], row["model"], row["layer"], row["expansion"])
        cells.setdefault(key, {})[row["method"]] = float(row["value"])
    wins: dict[tuple[str, str], dict[str, int]] = {}
    for (architecture, metric, *_), methods in cells.items():
        best = min(methods, key=lambda name: methods[name])
        counted = wins.setdefault((architecture, metric), dict.fromkeys(methods, 0))
        counted[best] = counted.get(best, 0) + 1
    report.tables["wins"] = [
        {"architecture": architecture, "metric": metric, "method": method, "wins": count}
        for (architecture, metric), counted in wins.items()
        for method, count in counted.items()
    ]
    for (architecture, metric), counted in wins.items():
        order = sorted(counted.items(), key=lambda item: -item[1])
        text = ", ".join(f"{method} {count}" for method, count in order)
        report.add(f"{architecture}, {metric}: lowest in {text} of {sum(counted.values())} settings", holds=True)
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
