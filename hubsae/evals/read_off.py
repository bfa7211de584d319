"""Read the sums of a pass off as measures, with intervals from resampled groups of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.core.errors import DataError
from hubsae.core.sae import HubSAE
from hubsae.evals import bootstrap
from hubsae.evals.accumulate import BINS_PER_OCTAVE, ROW_STATS, Sums, rows_at_once, scope_keys
from hubsae.evals.blocks import BLOCK_ROWS, GROUPS, RUN_ROWS, SCOPE_CELLS
from hubsae.evals.definitions import INTERVAL, Measure
from hubsae.evals.results import (
    DENSITY_EDGES,
    DensityBin,
    FeatureStats,
    NormDecile,
    ReconstructionResult,
    SAEReconstruction,
)

# Below this share of Σ‖x‖² a variance is rounding: the activations are constant and ratios to it undefined.
CONSTANT = 1e-12


class _Scope(NamedTuple):
    """What the activations alone give for one scope, with its resamples."""

    name: str
    keys: Tensor
    n: int
    sst: float | None
    pooled_variance: float | None
    missing: str | None
    n_groups: np.ndarray
    sst_draws: np.ndarray
    pooled_draws: np.ndarray
    draws: np.ndarray
    occupied: np.ndarray


def read_off(sums: Sums, saes: Mapping[str, HubSAE]) -> ReconstructionResult:
    """Measures of finished sums."""
    n_tokens = int(sums.inputs.n.sum())
    if not n_tokens:
        raise DataError("no tokens to evaluate", hint="the activations, or this selection of them, are empty")
    scopes = [_read_scope(sums, name) for name in sums.scopes()]
    kind = _interval_kind(sums, scopes[0])
    out = {}
    for name, sae in saes.items():
        batch_rule = sae.config.architecture == "batch_topk" and sae.config.threshold is None
        features = _features(sums, name, n_tokens)
        draws: dict[tuple[str, str], np.ndarray] = {}
        measures = [m for scope in scopes for m in _measures(sums, name, scope, kind, draws)]
        out[name] = SAEReconstruction(
            name=name,
            measures=measures + _feature_measures(sums, name, features),
            features=features,
            deciles=_deciles(sums, name),
            histogram=_histogram(features),
            batch_rule_rows=rows_at_once(sae.d_sae, BLOCK_ROWS) if batch_rule else None,
            draws=draws,
        )
    return ReconstructionResult(out, n_tokens, [s.name for s in scopes])


def _interval_kind(sums: Sums, everything: _Scope) -> str:
    units = int(everything.occupied.sum())
    what = "whole samples" if sums.inputs.known_samples else f"runs of {RUN_ROWS} consecutive tokens"
    return f"{INTERVAL} over {units} groups of {what}"


def _read_scope(sums: Sums, name: str) -> _Scope:
    keys = scope_keys(name)
    inputs, d = sums.inputs, sums.d
    n = int(inputs.n[keys].sum())
    sum_x = inputs.sum_x.total(keys)
    [norm2] = inputs.norm2.total(keys).exact()
    each = sum_x.exact()
    sst = float(norm2 - sum(v * v for v in each) / n)
    pooled = float(norm2 - sum(each) ** 2 / (n * d))
    missing = None
    if sst <= CONSTANT * float(norm2):
        missing = "one token has no variance" if n == 1 else "the activations are constant in this scope"
    flat = n * d < 2 or pooled <= CONSTANT * float(norm2)

    cells = len(SCOPE_CELLS[name])
    n_groups = inputs.n[keys].reshape(GROUPS, cells).sum(1).double().numpy()
    occupied = n_groups > 0
    draws = bootstrap.weights(int(occupied.sum()))
    n_draws = draws @ n_groups[occupied]
    x_draws = draws @ inputs.sum_x.value()[keys].reshape(GROUPS, cells, d).sum(1).numpy()[occupied]
    norm_draws = draws @ inputs.norm2.value()[keys].reshape(GROUPS, cells).sum(1).numpy()[occupied]
    pooled_ss = norm_draws - x_draws.sum(1) ** 2 / (n_draws * d)
    return _Scope(
        name=name,
        keys=keys,
        n=n,
        sst=None if missing else sst,
        pooled_variance=None if flat else pooled / (n * d - 1),
        missing=missing,
        n_groups=n_draws,
        sst_draws=norm_draws - (x_draws**2).sum(1) / n_draws,
        pooled_draws=pooled_ss / (n_draws * d - 1),
        draws=draws,
        occupied=occupied,
    )


def _measures(
    sums: Sums, name: str, scope: _Scope, kind: str, keep: dict[tuple[str, str], np.ndarray]
) -> list[Measure]:
    state = sums.saes[name]
    d = sums.d
    total = dict(zip(ROW_STATS, state.stats.total(scope.keys).value().tolist(), strict=True))
    cells = len(SCOPE_CELLS[scope.name])
    groups = state.stats.value()[scope.keys].reshape(GROUPS, cells, -1).sum(1).numpy()[scope.occupied]
    drawn = dict(zip(ROW_STATS, (scope.draws @ groups).T, strict=True))
    out: list[Measure] = []

    def put(metric: str, value: float | None, draws: np.ndarray | None, note: str | None = None) -> None:
        interval = None
        if value is not None and draws is not None:
            keep[metric, scope.name] = draws
        if value is not None and draws is not None and scope.draws.shape[1] > 1:
            interval = bootstrap.percentile_interval(draws)
        out.append(Measure(metric, value, scope.name, scope.n, interval, kind if interval else None, note))

    with np.errstate(divide="ignore", invalid="ignore"):
        mse_draws = drawn["sse"] / (scope.n_groups * d)
        put("mse", total["sse"] / (scope.n * d), mse_draws)
        if scope.pooled_variance is None:
            put("nmse_pooled", None, None, "all elements are equal: no variance to compare with")
        else:
            nmse = total["sse"] / (scope.n * d) / scope.pooled_variance
            put("nmse_pooled", nmse, mse_draws / scope.pooled_draws)
        fvu_draws = drawn["sse"] / scope.sst_draws
        fvu = None if scope.sst is None else total["sse"] / scope.sst
        put("fvu", fvu, fvu_draws, scope.missing)
        put("fve", None if fvu is None else 1 - fvu, 1 - fvu_draws, scope.missing)
        error = state.error.total(torch.tensor(SCOPE_CELLS[scope.name]))
        shift = math.fsum(v * v for v in error.value().tolist()) / scope.n
        centred = None if scope.sst is None else 1 - max(total["sse"] - shift, 0.0) / scope.sst
        put("fve_centred", centred, None, scope.missing)
        for metric in ("cosine", "l2_ratio", "l0", "l1"):
            put(metric, total[metric] / scope.n, drawn[metric] / scope.n_groups)
        if total["dot"] == 0:
            put("relative_bias", None, None, "x and its reconstruction are orthogonal")
        else:
            put("relative_bias", total["norm2_hat"] / total["dot"], drawn["norm2_hat"] / drawn["dot"])
    fired = state.fired.cpu()[list(SCOPE_CELLS[scope.name])].sum(0)
    dead = int((fired == 0).sum())
    put("n_dead", float(dead), None)
    put("dead_fraction", dead / state.d_sae, None)
    put("effective_features", effective_features(fired), None)
    return out


def effective_features(counts: Tensor) -> float:
    """2^H of the firing counts normalised to sum one; 0 where nothing fires.

    >>> effective_features(torch.tensor([5, 5, 0, 0]))
    2.0
    """
    fired = counts[counts > 0].double()
    if not fired.numel():
        return 0.0
    share = fired / fired.sum()
    return float(2 ** (-(share * share.log2()).sum()))


def _features(sums: Sums, name: str, n_tokens: int) -> FeatureStats:
    state = sums.saes[name]
    fired = state.fired.cpu()
    count = fired.sum(0)
    total = state.sum_z.value()
    return FeatureStats(
        count=count,
        count_position_0=fired[3:].sum(0) if sums.inputs.known_positions else None,
        mean=torch.where(count > 0, total / count.clamp_min(1), 0.0),
        max=state.max_z.cpu(),
        n_tokens=n_tokens,
    )


def _feature_measures(sums: Sums, name: str, features: FeatureStats) -> list[Measure]:
    if features.count_position_0 is None:
        return []
    only = (features.count > 0) & (features.count == features.count_position_0)
    share = int(only.sum()) / sums.saes[name].d_sae
    return [Measure("position_0_only_fraction", share, "all", features.n_tokens, None, None)]


def _histogram(features: FeatureStats) -> list[DensityBin]:
    density = features.density
    bars = [DensityBin(None, None, int((density == 0).sum()))]
    log = torch.log10(density[density > 0]).clamp_min(DENSITY_EDGES[0])
    inside = (log / 0.25).floor().mul(0.25).clamp(DENSITY_EDGES[0], DENSITY_EDGES[-2])
    for low, high in pairwise(DENSITY_EDGES):
        bars.append(DensityBin(low, high, int((inside == low).sum())))
    return bars


def _deciles(sums: Sums, name: str) -> list[NormDecile]:
    inputs, state = sums.inputs, sums.saes[name]
    out: list[NormDecile] = []
    scopes = [("all", (0, 1))] + ([("no_position_0", (0,))] if sums.inputs.known_positions else [])
    for scope, firsts in scopes:
        # sorted by norm, hence in the same order whatever order the bins were met in
        bins = sorted((norm, first, slot) for (first, norm), slot in inputs.bins.items() if first in firsts)
        if not bins:
            continue
        slots = torch.tensor([slot for _, _, slot in bins])
        n = inputs.bin_n[slots].double()
        keys = scope_keys(scope)
        mean = inputs.sum_x.total(keys).value() / float(n.sum())
        # Σ‖x − mean‖² of a bin from its sums
        spread = (
            inputs.bin_norm2.value()[slots]
            - 2 * (inputs.bin_x.value()[slots] @ mean)
            + n * torch.linalg.vecdot(mean, mean)
        )
        sse = state.bin_sse.value()[slots]
        norm2 = inputs.bin_norm2.value()[slots]
        middle = (n.cumsum(0) - n / 2) / n.sum()
        decile = (middle * 10).floor().clamp(max=9).long()
        for number in range(10):
            here = decile == number
            if not bool(here.any()):
                continue
            which = here.nonzero()[:, 0].tolist()
            ss = float(spread[here].sum())
            defined = ss > CONSTANT * max(float(norm2[here].sum()), 1e-300)
            out.append(
                NormDecile(
                    scope=scope,
                    decile=number + 1,
                    norm_low=2 ** (bins[which[0]][0] / BINS_PER_OCTAVE),
                    norm_high=2 ** ((bins[which[-1]][0] + 1) / BINS_PER_OCTAVE),
                    n_tokens=int(n[here].sum()),
                    fve=1 - float(sse[here].sum()) / ss if defined else None,
                )
            )
    return out
