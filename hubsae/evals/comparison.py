"""Chains against each other: rates end to end and at matched steps, and what is left after a control chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hubsae.evals.bootstrap import percentile_interval
from hubsae.evals.drift import DriftReport
from hubsae.evals.rates import RateRatio, change, rate_ratio


class Compared(NamedTuple):
    """Rates of two chains at one layer and k."""

    layer: int | None
    k: int | None
    metric: str
    scope: str
    end_to_end: RateRatio
    matched: RateRatio


@dataclass
class Comparison:
    """Two chains, layer by layer."""

    a: str
    b: str
    items: list[Compared]
    left_out: list[str]
    """What could not be compared, and why"""

    def rows(self) -> list[dict[str, Any]]:
        """Tidy: two lines per layer, metric and scope."""
        return [
            ratio.row(chain_a=self.a, chain_b=self.b, layer=c.layer, k=c.k, metric=c.metric, scope=c.scope)
            for c in self.items
            for ratio in (c.end_to_end, c.matched)
        ]


def compare(a: DriftReport, b: DriftReport) -> Comparison:
    """Rates of two chains, end to end and at matched steps; only equal layer and k are compared."""
    items: list[Compared] = []
    left_out: list[str] = []
    others = {(g.layer, g.k): g for g in b.groups}
    for group in a.groups:
        other = others.pop((group.layer, group.k), None)
        if other is None:
            left_out.append(f"{group.name}: only in {a.name}")
            continue
        for key in sorted(set(group.series) & set(other.series)):
            one, two = group.series[key], other.series[key]
            if len(one.steps) < 2 or len(two.steps) < 2:
                left_out.append(f"{group.name} {key[0]}: a chain of one stage has no rate")
                continue
            items.append(
                Compared(
                    group.layer, group.k, *key, rate_ratio(one, two, matched=False), rate_ratio(one, two, matched=True)
                )
            )
    left_out += [f"{g.name}: only in {b.name}" for g in others.values()]
    return Comparison(a.name, b.name, items, left_out)


def less_control(report: DriftReport) -> list[dict[str, Any]]:
    """Change of each stage since the base, that of the control at the same step, and what remains."""
    if report.control is None:
        return []
    rows = []
    held = {(g.layer, g.k): g for g in report.control.groups}
    for group in report.groups:
        other = held.get((group.layer, group.k))
        if other is None:
            continue
        for metric, scope in sorted(set(group.series) & set(other.series)):
            one, two = group.series[metric, scope], other.series[metric, scope]
            for step in one.steps[1:]:
                if not two.steps[0] <= step <= two.steps[-1]:
                    continue
                of_chain, of_control = change(one, float(step)), change(two, float(step))
                net = None
                if of_chain.draws is not None and of_control.draws is not None:
                    net = percentile_interval(of_chain.draws - of_control.draws)
                low, high = net or (None, None)
                rows.append(
                    {
                        "layer": group.layer,
                        "k": group.k,
                        "metric": metric,
                        "scope": scope,
                        "step": float(step),
                        "delta_chain": of_chain.delta,
                        "delta_control": of_control.delta,
                        "delta_net": of_chain.delta - of_control.delta,
                        "low": low,
                        "high": high,
                    }
                )
    return rows
