"""What a published table of chains supports: rates at matched steps, the control, and what is not comparable."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hubsae.core.errors import DataError
from hubsae.core.text import stage_step
from hubsae.evals.rates import RateRatio, Series, change, rate_ratio

from .printed import Row, TableReport, printed_series, read_table

# Implied variances further apart than this are taken for different validation data.
OTHER_DATA = 0.02


def analyse_chains(rows: Sequence[Row], source: str) -> TableReport:
    report = TableReport("chains", source)
    points: dict[tuple[str, int, int], list[tuple[int, str]]] = {}
    for row in rows:
        step = stage_step(row["stage"])
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
    return row["chain"], int(row["layer"]), int(row["k"]), stage_step(row["stage"])


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
    """Rate of ΔNMSE of chain a over that of chain b in a published table."""
    points: dict[str, list[tuple[int, str]]] = {}
    for row in read_table(source):
        step = stage_step(row["stage"])
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
