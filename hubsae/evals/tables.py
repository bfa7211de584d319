"""What published tables support on their own: rates at matched steps, who is ahead where, what a column is not.

Nothing is loaded but the table. A ratio of two small differences of printed numbers inherits their rounding,
so its interval draws every printed digit anew within half a unit of its last place.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.errors import DataError, FormatError
from hubsae.core.files import write_csv_atomic, write_json_atomic
from hubsae.evals.rates import RateRatio, Series, change, make_series, rate_ratio, step_of

BUNDLED = Path(__file__).parent / "published"
RESAMPLES = 2000
# Implied variances further apart than this are taken for different validation data.
OTHER_DATA = 0.02

Row = Mapping[str, str]


@dataclass
class TableReport:
    """The analysis of one table."""

    kind: str
    source: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Tidy tables by name."""
    findings: list[dict[str, Any]] = field(default_factory=list)
    """What the numbers say in words, with the numbers: keys `finding`, `holds`, and what it rests on."""

    def add(self, finding: str, holds: bool | None = None, **evidence: Any) -> None:
        """Note a finding; `holds` is None where it is a caution and not a claim."""
        self.findings.append({"finding": finding, "holds": holds, **evidence})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kind": self.kind, "source": self.source, "findings": self.findings, "tables": self.tables}

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write one CSV per table and the findings as JSON."""
        root = Path(folder)
        written = [write_csv_atomic(root / f"{name}.csv", rows) for name, rows in self.tables.items() if rows]
        return [*written, write_json_atomic(root / "findings.json", self.to_dict())]


def find_table(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the bundled table of that name.

    >>> find_table("grid_layer12.csv").name
    'grid_layer12.csv'
    """
    given = Path(path)
    if given.is_file():
        return given
    bundled = BUNDLED / given.name
    if bundled.is_file():
        return bundled
    have = ", ".join(sorted(p.name for p in BUNDLED.glob("*.csv")))
    raise FormatError(given, "a CSV table", "no such file", hint=f"bundled tables: {have}")


def read_table(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Rows of a CSV file as text, so that the printed digits are kept."""
    file = find_table(path)
    with open(file, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise FormatError(file, "a CSV table with rows", "an empty one")
    return rows


def analyse_table(path: str | os.PathLike[str]) -> TableReport:
    """Analyse a published table; its columns say which kind it is.

    >>> report = analyse_table("grid_layer12.csv")
    >>> [f["finding"] for f in report.findings][0]
    'TopK has the lower MSE in 10 of 12 matched cells'
    """
    file = find_table(path)
    rows = read_table(file)
    columns = set(rows[0])
    for needed, analyse in KINDS:
        if needed <= columns:
            return analyse(rows, file.name)
    expected = "; or ".join(", ".join(sorted(needed)) for needed, _ in KINDS)
    raise FormatError(file, f"a table with the columns {expected}", f"columns {', '.join(rows[0])}")


# ---- digits ------------------------------------------------------------------------------------------------


def half_unit(text: str) -> float:
    """Half a unit of the last printed place.

    >>> half_unit("0.003844"), half_unit("3.22e-05")
    (5e-07, 5e-08)
    """
    mantissa, _, exponent = text.lower().partition("e")
    places = len(mantissa.partition(".")[2])
    return float(f"5e{int(exponent or 0) - places - 1}")


def printed_series(points: Sequence[tuple[int, str]], seed: int) -> Series:
    """A series of printed numbers, its draws within their rounding."""
    ordered = sorted(points)
    values = np.array([float(text) for _, text in ordered])
    room = np.array([half_unit(text) for _, text in ordered])
    generator = np.random.default_rng(seed)
    draws = values + generator.uniform(-1, 1, (RESAMPLES, values.size)) * room
    return make_series([step for step, _ in ordered], values.tolist(), draws)


# ---- chains ------------------------------------------------------------------------------------------------


def _chains(rows: Sequence[Row], source: str) -> TableReport:
    report = TableReport("chains", source)
    points: dict[tuple[str, int, int], list[tuple[int, str]]] = {}
    for row in rows:
        step = step_of(row["stage"])
        if step is None:
            raise DataError(f"{source}: stage {row['stage']!r} names no step")
        points.setdefault((row["chain"], int(row["layer"]), int(row["k"])), []).append((step, row["nmse"]))
    series = _usable_series(report, rows, points)
    report.tables["rates"] = [
        {
            "chain": chain,
            "layer": layer,
            "k": k,
            "step": c.step,
            "nmse": c.value,
            "delta_from_base": c.delta,
            "delta_per_step": c.per_step,
        }
        for (chain, layer, k), one in series.items()
        for c in (change(one, float(step)) for step in one.steps)
    ]
    report.tables["comparisons"] = _chain_comparisons(series)
    report.tables["less_control"] = _less_shuffled(series)
    report.tables["implied_variance"] = _implied_variance(rows)
    _chain_findings(report, rows, series)
    return report


def _usable_series(
    report: TableReport, rows: Sequence[Row], points: Mapping[tuple[str, int, int], list[tuple[int, str]]]
) -> dict[tuple[str, int, int], Series]:
    """Series that have a base measured on the same data as their later stages; the others are named."""
    out: dict[tuple[str, int, int], Series] = {}
    baseless, elsewhere = [], []
    for number, (key, printed) in enumerate(points.items()):
        steps = sorted(step for step, _ in printed)
        if len(steps) < 2 or steps[0] != 0:
            baseless += [key] if len(steps) > 1 else []
            continue
        variance = [implied_variance(row) for step in steps[:2] for row in rows if _key(row) == (*key, step)]
        if abs(variance[0] / variance[1] - 1) > OTHER_DATA:
            elsewhere.append(key)
            continue
        out[key] = printed_series(printed, seed=number)
    if baseless:
        report.add(f"no base of the same k, so no rate is taken: {_names(baseless)}", holds=None)
    if elsewhere:
        report.add(
            "the base was measured on other data than the later stages (their implied pooled variances differ by more "
            f"than {OTHER_DATA:.0%}), so no rate is taken: {_names(elsewhere)}",
            holds=None,
        )
    return out


def _names(keys: Sequence[tuple[str, int, int]]) -> str:
    return ", ".join(f"{chain} layer {layer} k {k}" for chain, layer, k in keys)


def _key(row: Row) -> tuple[str, int, int, int | None]:
    return row["chain"], int(row["layer"]), int(row["k"]), step_of(row["stage"])


def implied_variance(row: Row) -> float:
    """The pooled variance a printed nmse was divided by: mse / nmse."""
    return float(row["mse"]) / float(row["nmse"])


def _chain_comparisons(series: Mapping[tuple[str, int, int], Series]) -> list[dict[str, Any]]:
    out = []
    chains = list(dict.fromkeys(chain for chain, _, _ in series))
    for a in chains:
        for b in chains:
            if a == b:
                continue
            for (chain, layer, k), one in series.items():
                other = series.get((b, layer, k))
                if chain != a or other is None:
                    continue
                for matched in (False, True):
                    ratio = rate_ratio(one, other, matched=matched)
                    out.append(ratio.row(chain_a=a, chain_b=b, layer=layer, k=k, metric="nmse"))
    return out


def compare_chains(source: str | os.PathLike[str], a: str, b: str, layer: int, k: int, *, matched: bool) -> RateRatio:
    """Rate of ΔNMSE of chain a over that of chain b in a published table.

    >>> round(compare_chains("chains_reconstruction.csv", "strict", "flexible", 18, 64, matched=False).ratio, 2)
    1.25
    """
    points: dict[str, list[tuple[int, str]]] = {}
    for row in read_table(source):
        step = step_of(row["stage"])
        if (int(row["layer"]), int(row["k"])) == (layer, k) and step is not None:
            points.setdefault(row["chain"], []).append((step, row["nmse"]))
    missing = [name for name in (a, b) if len(points.get(name, [])) < 2]
    if missing:
        have = ", ".join(sorted(name for name, p in points.items() if len(p) > 1))
        raise DataError(f"no chain {', '.join(missing)} at layer {layer}, k {k}", hint=f"there: {have or 'none'}")
    return rate_ratio(printed_series(points[a], 0), printed_series(points[b], 1), matched=matched)


def _less_shuffled(series: Mapping[tuple[str, int, int], Series], control: str = "shuffled") -> list[dict[str, Any]]:
    out = []
    for (chain, layer, k), one in series.items():
        other = series.get((control, layer, k))
        if chain == control or other is None:
            continue
        end = min(float(one.steps[-1]), float(other.steps[-1]))
        of_chain, of_control = change(one, end), change(other, end)
        out.append(
            {
                "chain": chain,
                "layer": layer,
                "k": k,
                "step": end,
                "delta_chain": of_chain.delta,
                "delta_control": of_control.delta,
                "delta_net": of_chain.delta - of_control.delta,
                "share_in_control": of_control.delta / of_chain.delta if of_chain.delta else None,
            }
        )
    return out


def _implied_variance(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {
            "chain": row["chain"],
            "stage": row["stage"],
            "layer": int(row["layer"]),
            "k": int(row["k"]),
            "mse": float(row["mse"]),
            "nmse": float(row["nmse"]),
            "implied_pooled_variance": implied_variance(row),
        }
        for row in rows
    ]


def _chain_findings(report: TableReport, rows: Sequence[Row], series: Mapping[tuple[str, int, int], Series]) -> None:
    for layer, k in ((18, 64), (23, 256)):
        one, other = series.get(("strict", layer, k)), series.get(("flexible", layer, k))
        if one is None or other is None:
            continue
        full, matched = rate_ratio(one, other, matched=False), rate_ratio(one, other, matched=True)
        report.add(
            f"layer {layer}, k {k}: ΔNMSE per step of strict over flexible is {full.ratio:.2f} end to end and "
            f"{matched.ratio:.2f} at step {matched.steps_a:g}; not within 3 % of each other",
            holds=True,
            end_to_end=full.ratio,
            end_to_end_rounding=full.interval,
            matched=matched.ratio,
            matched_rounding=matched.interval,
            matched_step=matched.steps_a,
        )
    by_layer: dict[int, list[float]] = {}
    for row in report.tables["implied_variance"]:
        by_layer.setdefault(row["layer"], []).append(row["implied_pooled_variance"])
    if by_layer:
        ranges = {layer: (min(v), max(v)) for layer, v in sorted(by_layer.items())}
        widest = max(v for _, v in ranges.values()) / min(v for v, _ in ranges.values())
        report.add(
            "nmse is not comparable across layers: the pooled variance it divides by differs by a factor of "
            f"{widest:.0f} between layers",
            holds=None,
            implied_variance_by_layer=ranges,
        )
    _same_sae_findings(report, rows)
    _replicate_findings(report, rows, series)
    net = report.tables["less_control"]
    if net:
        most = [row for row in net if row["share_in_control"] is not None and row["share_in_control"] >= 0.75]
        report.add(
            f"in {len(most)} of {len(net)} comparisons at the last common step, the shuffled-reward chain shows at "
            "least three quarters of the other chain's ΔNMSE: that part comes with training longer, not with reward",
            holds=None,
        )


def _same_sae_findings(report: TableReport, rows: Sequence[Row]) -> None:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["stage"], row["layer"], row["k"], row["l_sae"], row["frac_rec"]), []).append(row)
    for key, same in groups.items():
        values = {row["nmse"] for row in same}
        if len(same) > 1 and len(values) > 1:
            dead = {row["chain"]: int(row["n_dead"]) for row in same}
            report.add(
                f"{key[0]} layer {key[1]} k {key[2]} is one SAE in {', '.join(row['chain'] for row in same)} (equal "
                f"l_sae and frac_rec) with nmse {', '.join(sorted(values))} and dead counts "
                f"{', '.join(map(str, dead.values()))}: they were measured on different validation sets",
                holds=None,
                n_dead=dead,
            )


def _replicate_findings(
    report: TableReport, rows: Sequence[Row], series: Mapping[tuple[str, int, int], Series]
) -> None:
    """How far trainings of one base SAE lie apart, on the same validation data, beside what a chain changes."""
    out = []
    for (chain, layer, k), one in series.items():
        bases = [row for row in rows if _key(row)[1:] == (layer, k, 0)]
        own = next(implied_variance(row) for row in bases if row["chain"] == chain)
        same_data = [row for row in bases if abs(implied_variance(row) / own - 1) < OTHER_DATA / 4]
        # the same SAE listed under two chains has the same mse
        seen = {row["mse"]: float(row["nmse"]) for row in same_data}
        if len(seen) < 2:
            continue
        spread = max(seen.values()) - min(seen.values())
        delta = change(one, float(one.steps[-1])).delta
        out.append(
            {
                "chain": chain,
                "layer": layer,
                "k": k,
                "base_trainings": len(seen),
                "spread_of_base_nmse": spread,
                "delta_of_chain": delta,
                "spread_over_delta": spread / abs(delta) if delta else None,
            }
        )
    report.tables["replicate_spread"] = out
    if out:
        known = [row["spread_over_delta"] for row in out if row["spread_over_delta"] is not None]
        report.add(
            "base SAEs trained several times by one recipe differ in nmse, on the same data, by "
            f"{min(known):.0%} to {max(known):.0%} of what a whole chain changes; a difference between chains "
            "smaller than that is not told from retraining",
            holds=None,
        )


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
    ({"chain", "stage", "layer", "k", "mse", "nmse", "n_dead", "l_sae", "frac_rec"}, _chains),
    ({"architecture", "expansion", "k", "val_mse", "dead_percent", "delta_loss", "published_frac_rec_percent"}, _grid),
    ({"model", "layer", "expansion", "architecture", "metric", "method", "value"}, _instruct),
    ({"run", "step", "accuracy"}, _accuracy),
    ({"chain", "layer", "from_step", "to_step", "mean_decoder_cosine"}, _cosines),
)
