"""Read the sums of a pass off as measures, with intervals from resampled groups of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.evals import bootstrap
from hubsae.evals.accumulate import BINS_PER_OCTAVE, ROW_STATS, Sums, rows_at_once
from hubsae.evals.blocks import BLOCK_ROWS, CELLS, GROUPS, RUN_ROWS, SCOPE_CELLS
from hubsae.evals.definitions import INTERVAL, Measure
from hubsae.evals.results import (
    DENSITY_EDGES,
    DensityBin,
    FeatureStats,
    NormDecile,
    ReconstructionResult,
    SAEReconstruction,
)
from hubsae.evals.sums import CompensatedSum

# Below this share of Σ‖x‖² a variance is rounding: the activations are constant and ratios to it undefined.
CONSTANT = 1e-12


class _Scope(NamedTuple):
    """What the activations alone give for one scope, with its resamples: the same for every SAE of the pass."""

    name: str
    cells: Tensor
    n: int
    sst: float | None
    pooled_variance: float | None
    missing: str | None
    n_groups: np.ndarray
    sst_draws: np.ndarray
    pooled_draws: np.ndarray
    draws: Tensor
    """[resamples, occupied groups] how often each group is drawn"""
    occupied: Tensor


class _Decile(NamedTuple):
    """One decile of the norms, as far as the activations say it."""

    known: NormDecile
    slots: Tensor
    """Norm bins in it."""
    ss: float | None
    """Σ‖x − mean‖²; None where it is rounding."""


def read_off(sums: Sums, saes: Mapping[str, SAE]) -> ReconstructionResult:
    """Measures of finished sums."""
    n_tokens = int(sums.inputs.n.sum())
    if not n_tokens:
        raise DataError("no tokens to evaluate", hint="the activations, or this selection of them, are empty")
    x_by_cell = _by_cell(sums.inputs.sum_x)
    scopes = _read_scopes(sums, x_by_cell)
    deciles = _read_deciles(sums, x_by_cell)
    kind = _interval_kind(sums, scopes[0])
    out = {}
    for name, sae in saes.items():
        batch_rule = sae.config.architecture == "batch_topk" and sae.config.threshold is None
        features = _features(sums, name, n_tokens)
        draws: dict[tuple[str, str], np.ndarray] = {}
        sse = sums.saes[name].bin_sse.value()
        out[name] = SAEReconstruction(
            name=name,
            measures=_measures(sums, name, scopes, kind, draws) + _feature_measures(sums, name, features),
            features=features,
            deciles=[_decile(sse, d) for d in deciles],
            histogram=_histogram(features),
            batch_rule_rows=rows_at_once(sae.d_sae, BLOCK_ROWS) if batch_rule else None,
            draws=draws,
        )
    return ReconstructionResult(out, n_tokens, [s.name for s in scopes])


def _interval_kind(sums: Sums, everything: _Scope) -> str:
    units = int(everything.occupied.sum())
    what = "whole samples" if sums.inputs.known_samples else f"runs of {RUN_ROWS} consecutive tokens"
    return f"{INTERVAL} over {units} groups of {what}"


def _by_cell(by_key: CompensatedSum) -> CompensatedSum:
    """Sums per key [KEYS, ...] added up over the groups. [CELLS, ...]"""
    folded = CompensatedSum()
    folded.parts = by_key.parts.reshape(3, GROUPS, CELLS, *by_key.parts.shape[2:])
    return folded.total()


def _by_group(by_key: Tensor, cells: Tensor) -> Tensor:
    """Values per key [KEYS, ...] added up over some cells. [GROUPS, ...]"""
    return by_key.reshape(GROUPS, CELLS, *by_key.shape[1:])[:, cells].sum(1)


def _read_scopes(sums: Sums, x_by_cell: CompensatedSum) -> list[_Scope]:
    inputs, d = sums.inputs, sums.d
    norm2_by_cell = _by_cell(inputs.norm2)
    x_by_key, norm2_by_key = inputs.sum_x.value(), inputs.norm2.value()
    weights = cache(lambda units: torch.from_numpy(bootstrap.weights(units)))
    out = []
    for name in sums.scopes():
        cells = torch.tensor(SCOPE_CELLS[name])
        n_by_group = _by_group(inputs.n, cells)
        n = int(n_by_group.sum())
        (square,), unit = norm2_by_cell.total(cells).exact()
        norm2 = Fraction(square, unit)
        each, unit = x_by_cell.total(cells).exact()
        sst = float(norm2 - Fraction(sum(v * v for v in each), n * unit**2))
        pooled = float(norm2 - Fraction(sum(each) ** 2, n * d * unit**2))
        missing = None
        if sst <= CONSTANT * float(norm2):
            missing = "one token has no variance" if n == 1 else "the activations are constant in this scope"
        flat = n * d < 2 or pooled <= CONSTANT * float(norm2)

        occupied = n_by_group > 0
        draws = weights(int(occupied.sum()))
        n_draws = draws @ n_by_group[occupied].double()
        x_draws = draws @ _by_group(x_by_key, cells)[occupied]
        norm_draws = draws @ _by_group(norm2_by_key, cells)[occupied]
        pooled_draws = (norm_draws - x_draws.sum(1) ** 2 / (n_draws * d)) / (n_draws * d - 1)
        out.append(
            _Scope(
                name=name,
                cells=cells,
                n=n,
                sst=None if missing else sst,
                pooled_variance=None if flat else pooled / (n * d - 1),
                missing=missing,
                n_groups=n_draws.numpy(),
                sst_draws=(norm_draws - torch.linalg.vecdot(x_draws, x_draws) / n_draws).numpy(),
                pooled_draws=pooled_draws.numpy(),
                draws=draws,
                occupied=occupied,
            )
        )
    return out


def _measures(
    sums: Sums, name: str, scopes: list[_Scope], kind: str, keep: dict[tuple[str, str], np.ndarray]
) -> list[Measure]:
    state = sums.saes[name]
    by_cell, by_key, fired = _by_cell(state.stats), state.stats.value(), state.fired.cpu()
    out: list[Measure] = []
    for scope in scopes:
        total = by_cell.total(scope.cells).value()
        error = state.error.total(scope.cells).value()
        drawn = scope.draws @ _by_group(by_key, scope.cells)[scope.occupied]
        out += _scope_measures(sums.d, scope, kind, keep, total, error, drawn, fired[scope.cells].sum(0))
    return out


def _scope_measures(
    d: int,
    scope: _Scope,
    kind: str,
    keep: dict[tuple[str, str], np.ndarray],
    totals: Tensor,
    error: Tensor,
    draws: Tensor,
    fired: Tensor,
) -> list[Measure]:
    """Measures of one SAE in one scope, from Σ of the ROW_STATS, their resamples, Σ(x − x̂) and firing counts."""
    total = dict(zip(ROW_STATS, totals.tolist(), strict=True))
    drawn = dict(zip(ROW_STATS, draws.t().contiguous().numpy(), strict=True))
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
        shift = math.fsum(v * v for v in error.tolist()) / scope.n
        centred = None if scope.sst is None else 1 - max(total["sse"] - shift, 0.0) / scope.sst
        put("fve_centred", centred, None, scope.missing)
        for metric in ("cosine", "l2_ratio", "l0", "l1"):
            put(metric, total[metric] / scope.n, drawn[metric] / scope.n_groups)
        if total["dot"] == 0:
            put("relative_bias", None, None, "x and its reconstruction are orthogonal")
        else:
            put("relative_bias", total["norm2_hat"] / total["dot"], drawn["norm2_hat"] / drawn["dot"])
    dead = int((fired == 0).sum())
    put("n_dead", float(dead), None)
    put("dead_fraction", dead / fired.shape[0], None)
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
    place = (log / 0.25).floor().long() - round(DENSITY_EDGES[0] / 0.25)
    counts = torch.bincount(place.clamp(max=len(DENSITY_EDGES) - 2), minlength=len(DENSITY_EDGES) - 1).tolist()
    return bars + [DensityBin(*edges, n) for edges, n in zip(pairwise(DENSITY_EDGES), counts, strict=True)]


def _read_deciles(sums: Sums, x_by_cell: CompensatedSum) -> list[_Decile]:
    inputs = sums.inputs
    out: list[_Decile] = []
    scopes = [("all", (0, 1))] + ([("no_position_0", (0,))] if inputs.known_positions else [])
    for scope, firsts in scopes:
        # sorted by norm, hence in the same order whatever order the bins were met in
        bins = sorted((norm, first, slot) for (first, norm), slot in inputs.bins.items() if first in firsts)
        if not bins:
            continue
        slots = torch.tensor([slot for _, _, slot in bins])
        n = inputs.bin_n[slots].double()
        mean = x_by_cell.total(torch.tensor(SCOPE_CELLS[scope])).value() / float(n.sum())
        norm2 = inputs.bin_norm2.value()[slots]
        # Σ‖x − mean‖² of a bin from its sums
        spread = norm2 - 2 * (inputs.bin_x.value()[slots] @ mean) + n * torch.linalg.vecdot(mean, mean)
        middle = (n.cumsum(0) - n / 2) / n.sum()
        decile = (middle * 10).floor().clamp(max=9).long()
        for number in range(10):
            here = decile == number
            if not bool(here.any()):
                continue
            which = here.nonzero()[:, 0].tolist()
            ss = float(spread[here].sum())
            defined = ss > CONSTANT * max(float(norm2[here].sum()), 1e-300)
            known = NormDecile(
                scope=scope,
                decile=number + 1,
                norm_low=2 ** (bins[which[0]][0] / BINS_PER_OCTAVE),
                norm_high=2 ** ((bins[which[-1]][0] + 1) / BINS_PER_OCTAVE),
                n_tokens=int(n[here].sum()),
                fve=None,
            )
            out.append(_Decile(known, slots[here], ss if defined else None))
    return out


def _decile(sse: Tensor, decile: _Decile) -> NormDecile:
    """The explained variance of one SAE in a decile, from its squared errors by norm bin."""
    if decile.ss is None:
        return decile.known
    return decile.known._replace(fve=1 - float(sse[decile.slots].sum()) / decile.ss)
