"""How SAEs change along a chain of checkpoints: directions, firing, reconstruction, and at which rate.

For every layer and k, all SAEs of the chain are run on the activations of every stage in one pass each; that
gives the full cross matrix, in which "before training" is the previous SAE on the new activations and "after"
is the diagonal. A warm-started chain confounds stage with more training: a control chain, trained as long on
the base model's activations only, is subtracted at matched steps where one is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.core.errors import DataError
from hubsae.evals.accumulate import NOT_FIRST
from hubsae.evals.chains import Group, Link, activations_for, make_groups
from hubsae.evals.rates import Series, make_series
from hubsae.evals.reconstruction import reconstruction
from hubsae.evals.results import ReconstructionResult
from hubsae.evals.weights import Matching, Movement, movement

# A latent is alive where it fires on a larger share of tokens than this.
ALIVE_DENSITY = 1e-4
CROSS_METRICS = ("nmse_pooled", "fvu", "mse")
RATE_METRICS = ("nmse_pooled", "fvu", "mse")


class StageRow(NamedTuple):
    """One SAE on the activations of its own stage; all None where no activations were given."""

    stage: str
    step: int | None
    n_tokens: int | None = None
    scope: str = "all"
    """The tokens that the SAE is for, which the numbers below are about"""
    nmse_before: float | None = None
    """nmse_pooled of the previous stage's SAE on these activations: before this stage's training"""
    nmse_after: float | None = None
    fvu_before: float | None = None
    fvu_after: float | None = None
    fvu_after_no_position_0: float | None = None
    """None without positions"""
    l0: float | None = None
    dead_fraction: float | None = None
    alive: int | None = None
    births: int | None = None
    """Latents alive here and not at the previous stage, matched as in the movement table"""
    deaths: int | None = None
    effective_features: float | None = None
    max_density: float | None = None


class MoveRow(NamedTuple):
    """Directions of one SAE against an earlier one."""

    against: str
    """previous or base"""
    from_stage: str
    to_stage: str
    from_step: int | None
    to_step: int | None
    matching: str
    kept_index: float
    decoder_mean: float
    decoder_median: float
    decoder_p05: float
    encoder_mean: float
    encoder_median: float
    encoder_decoder_correlation: float | None
    decoder_drift_per_step: float | None
    """(1 − decoder_mean) / steps between"""
    stable: int
    reweighted: int
    redirected: int
    rotated: int


class CrossRow(NamedTuple):
    """One entry of the cross matrix."""

    metric: str
    scope: str
    sae_stage: str
    activation_stage: str
    value: float | None
    low: float | None
    high: float | None
    n_tokens: int


@dataclass
class GroupDrift:
    """One layer and k of a chain."""

    layer: int | None
    k: int | None
    name: str
    stages: list[StageRow]
    moves: list[MoveRow]
    cross: list[CrossRow]
    series: dict[tuple[str, str], Series]
    """By (metric, scope): each stage's own SAE on its own activations, with paired resamples"""
    densities: dict[str, Tensor] = field(default_factory=dict)
    """By stage: firing density of each latent"""
    cosines: dict[str, Movement] = field(default_factory=dict)
    """By `stage/against`"""

    def matrix(self, metric: str = "nmse_pooled", scope: str = "all") -> np.ndarray:
        """The cross matrix [SAE of stage i, activations of stage j]; NaN where not defined."""
        stages = [row.stage for row in self.stages]
        out = np.full((len(stages), len(stages)), np.nan)
        for row in self.cross:
            if row.metric == metric and row.scope == scope and row.value is not None:
                out[stages.index(row.sae_stage), stages.index(row.activation_stage)] = row.value
        return out


@dataclass
class DriftReport:
    """Drift of a chain, and of its control where there is one.

    `report.write_report(report, folder)` gives tidy CSV files, a JSON summary and plots.
    """

    name: str
    groups: list[GroupDrift]
    control: DriftReport | None = None

    def group(self, layer: int | None = None, k: int | None = None) -> GroupDrift:
        """The group of a layer and k, or the only one."""
        found = [g for g in self.groups if layer in (None, g.layer) and k in (None, g.k)]
        if len(found) != 1:
            have = ", ".join(g.name for g in self.groups)
            raise DataError(f"{len(found)} groups fit layer {layer}, k {k}", hint=f"the chain has: {have}")
        return found[0]


def drift(
    chain: Any,
    activations: Any,
    *,
    control: Any = None,
    control_activations: Any = None,
    name: str = "chain",
    match: Matching = "auto",
    on_pass: Callable[[str], None] | None = None,
) -> DriftReport:
    """Analyse a chain of SAEs.

    `chain`: a mapping from stage names to SAEs (or lists of them, one per layer), or SAEs whose metadata name
    stage and layer. `activations`: one table for all, a mapping by stage, by layer, or by (stage, layer), or a
    function of (stage, layer). `control`: a chain trained as long on base activations; without
    `control_activations` each of its stages is measured on the base stage's activations. With
    `activations=None` only the weights are compared.

    >>> from hubsae import HubSAE, SAEConfig
    >>> saes = {f"ppo_step{s}": HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2)) for s in (0, 10)}
    >>> report = drift(saes, torch.randn(300, 8, generator=torch.manual_seed(0)))
    >>> report.group().matrix().shape, report.group().moves[0].matching
    ((2, 2), 'index')
    """
    groups = make_groups(chain)
    _one_width_each(groups, activations)
    report = DriftReport(name=name, groups=[_group_drift(g, activations, match, on_pass) for g in groups])
    if control is not None:
        held = control_activations
        if held is None and activations is not None:
            held = _base_only(activations, {group.layer: group.links[0] for group in groups})
        report.control = drift(control, held, name=f"{name} control", match=match, on_pass=on_pass)
    return report


def _one_width_each(groups: list[Group], activations: Any) -> None:
    if isinstance(activations, (Tensor, np.ndarray)) and len({g.layer for g in groups}) > 1:
        layers = ", ".join(str(g.layer) for g in groups)
        raise DataError(
            f"the chain has layers {layers}, but only one table of activations was given",
            hint="pass activations={(stage, layer): tensor}, or one chain per layer",
        )


def _base_only(activations: Any, base: dict[int | None, Link]) -> Callable[[str, int | None], Any]:
    def get(_: str, layer: int | None) -> Any:
        link = base.get(layer)
        if link is None:
            raise DataError(f"the control chain has layer {layer}, the chain has none there")
        return activations_for(activations, link)

    return get


def _group_drift(group: Group, activations: Any, match: Matching, on_pass: Callable[[str], None] | None) -> GroupDrift:
    links = group.links
    saes = {link.stage: link.sae for link in links}
    results: dict[str, ReconstructionResult] = {}
    for link in links if activations is not None else []:
        results[link.stage] = reconstruction(saes, activations_for(activations, link), force=True)
        if on_pass is not None:
            on_pass(f"{group.name} {link.stage}")
    cosines: dict[str, Movement] = {}
    moves: list[MoveRow] = []
    for index, link in enumerate(links[1:], start=1):
        for against, other in (("previous", links[index - 1]), ("base", links[0])):
            moved = movement(link.sae, other.sae, match=match)
            cosines[f"{link.stage}/{against}"] = moved
            moves.append(_move_row(against, other, link, moved))
    if not results:
        stages = [StageRow(link.stage, link.step) for link in links]
        return GroupDrift(group.layer, group.k, group.name, stages, moves, [], {}, {}, cosines)
    own = {link.stage: results[link.stage][link.stage] for link in links}
    return GroupDrift(
        layer=group.layer,
        k=group.k,
        name=group.name,
        stages=_stage_rows(links, results, cosines),
        moves=moves,
        cross=_cross_rows(links, results),
        series=_series(links, results),
        densities={stage: result.features.density for stage, result in own.items()},
        cosines=cosines,
    )


def _move_row(against: str, before: Link, now: Link, moved: Movement) -> MoveRow:
    dec, enc = moved.decoder.double(), moved.encoder.double()
    steps = now.step - before.step if now.step is not None and before.step is not None else 0
    return MoveRow(
        against=against,
        from_stage=before.stage,
        to_stage=now.stage,
        from_step=before.step,
        to_step=now.step,
        matching=moved.matching,
        kept_index=moved.kept_index,
        decoder_mean=float(dec.mean()),
        decoder_median=float(dec.median()),
        decoder_p05=float(torch.quantile(dec, 0.05)),
        encoder_mean=float(enc.mean()),
        encoder_median=float(enc.median()),
        encoder_decoder_correlation=moved.correlation(),
        decoder_drift_per_step=(1 - float(dec.mean())) / steps if steps > 0 else None,
        **moved.quadrants(),
    )


def _stage_rows(
    links: list[Link], results: dict[str, ReconstructionResult], cosines: dict[str, Movement]
) -> list[StageRow]:
    rows = []
    alive_before: Tensor | None = None
    for index, link in enumerate(links):
        result = results[link.stage]
        own, scope = result[link.stage], link.sae.metadata.own_scope
        before = result[links[index - 1].stage] if index else None
        density = own.features.density
        alive = density > ALIVE_DENSITY
        births = deaths = None
        if alive_before is not None:
            moved = cosines[f"{link.stage}/previous"]
            here, there = alive[moved.latent], alive_before[moved.partner]
            births, deaths = int((here & ~there).sum()), int((~here & there).sum())
        alive_before = alive
        rows.append(
            StageRow(
                stage=link.stage,
                step=link.step,
                n_tokens=own.get("mse", scope).n_tokens,
                scope=scope,
                nmse_before=None if before is None else before.value("nmse_pooled", scope),
                nmse_after=own.value("nmse_pooled", scope),
                fvu_before=None if before is None else before.value("fvu", scope),
                fvu_after=own.value("fvu", scope),
                fvu_after_no_position_0=own.value("fvu", NOT_FIRST) if NOT_FIRST in result.scopes else None,
                l0=own.value("l0", scope),
                dead_fraction=own.value("dead_fraction", scope),
                alive=int(alive.sum()),
                births=births,
                deaths=deaths,
                effective_features=own.value("effective_features", scope),
                max_density=float(density.max()),
            )
        )
    return rows


def _cross_rows(links: list[Link], results: dict[str, ReconstructionResult]) -> list[CrossRow]:
    rows = []
    for link in links:
        result, own = results[link.stage], link.sae.metadata.own_scope
        for other in links:
            for metric in CROSS_METRICS:
                for scope in [s for s in dict.fromkeys(("all", NOT_FIRST, own)) if s in result.scopes]:
                    measure = result[other.stage].get(metric, scope)
                    low, high = measure.interval or (None, None)
                    rows.append(
                        CrossRow(metric, scope, other.stage, link.stage, measure.value, low, high, measure.n_tokens)
                    )
    return rows


def _series(links: list[Link], results: dict[str, ReconstructionResult]) -> dict[tuple[str, str], Series]:
    out: dict[tuple[str, str], Series] = {}
    steps = [link.step for link in links if link.step is not None]
    if len(steps) != len(links):
        return out
    scopes = set.intersection(*(set(result.scopes) for result in results.values()))
    for metric in RATE_METRICS:
        for scope in sorted(scopes):
            own = [results[link.stage][link.stage] for link in links]
            values = [item.value(metric, scope) for item in own]
            if any(value is None for value in values):
                continue
            drawn = [item.draws.get((metric, scope)) for item in own]
            stacked = None
            if all(d is not None for d in drawn):
                stacked = np.stack([d for d in drawn if d is not None], axis=1)
            out[metric, scope] = make_series(steps, [v for v in values if v is not None], stacked)
    return out
