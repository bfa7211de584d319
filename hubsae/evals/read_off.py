"""Read the sums of a pass off as measures, with intervals from resampled groups of samples."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.stats import MASSIVE, bin_edge
from hubsae.core.errors import DataError
from hubsae.evals import bootstrap
from hubsae.evals.accumulate import ALL, BY_SEQUENCE, FIRST, GROUPS, NOT_FIRST, ROW_STATS, RUN_ROWS, Sums
from hubsae.evals.definitions import INTERVAL, Measure
from hubsae.evals.passes import rows_at_once
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
OF_SQUARES = ("mse", "nmse_pooled", "fvu", "fve", "fve_centred", "relative_bias")
"""Metrics that a few tokens of huge norm decide."""


class _Scope(NamedTuple):
    """What the activations alone give for one scope, with its resamples: the same for every SAE of the pass."""

    name: str
    cells: Tensor
    """Rows of the per-cell sums that make it up."""
    sequences: Tensor
    """The sequence of each row of the per-sequence sums in it."""
    rows: Tensor
    """Those rows."""
    n: int
    massive: str | None
    """What to know about tokens of huge norm in it."""
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


class Reconstruction(Sums):
    """The accumulator of reconstruction metrics: add blocks, merge with other ranks or shards, read the result.

    >>> from hubsae import HubSAE, SAEConfig
    >>> from hubsae.evals.passes import run_pass
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> result, = run_pass(torch.randn(100, 4), {"a": sae}, [Reconstruction({"a": sae})])
    >>> result["a"].get("mse").n_tokens
    100
    """

    def result(self) -> ReconstructionResult:
        """The measures of what was added up."""
        return read_off(self)


def read_off(sums: Sums) -> ReconstructionResult:
    """Measures of finished sums."""
    n_tokens = int(sums.inputs.n.sum())
    if not n_tokens:
        raise DataError("no tokens to evaluate", hint="the activations, or this selection of them, are empty")
    x_by_cell = _by_cell(sums.inputs.sum_x)
    scopes = _read_scopes(sums, x_by_cell)
    deciles = _read_deciles(sums, x_by_cell)
    kind = _interval_kind(sums, scopes[0])
    out = {}
    for name, sae in sums.models.items():
        batch_rule = sae.config.architecture == "batch_topk" and sae.config.threshold is None
        features = _features(sums, name, n_tokens)
        draws: dict[tuple[str, str], np.ndarray] = {}
        sse = sums.saes[name].bin_sse.value()
        own = next((s for s in scopes if s.name == sae.metadata.own_scope), scopes[0])
        by_group = _by_group(sums.saes[name].stats.value(), own.cells)[:, ROW_STATS.index("sse")]
        elements = _by_group(sums.inputs.n, own.cells).double() * sums.d
        out[name] = SAEReconstruction(
            name=name,
            measures=_measures(sums, name, scopes, kind, draws) + _feature_measures(sums, name, features),
            features=features,
            deciles=[_decile(sse, d) for d in deciles],
            histogram=_histogram(features),
            batch_rule_rows=rows_at_once(sae.d_sae) if batch_rule else None,
            draws=draws,
            by_group=torch.stack([by_group, elements], 1)[elements > 0].numpy(),
            own_scope=sae.metadata.own_scope,
        )
    return ReconstructionResult(out, n_tokens, [s.name for s in scopes])


def _interval_kind(sums: Sums, everything: _Scope) -> str:
    units = int(everything.occupied.sum())
    what = "whole samples" if sums.inputs.known["sample_id"] else f"runs of {RUN_ROWS} consecutive tokens"
    return f"{INTERVAL} over {units} groups of {what}"


def _by_cell(by_key: CompensatedSum) -> CompensatedSum:
    """Sums per key [cells x groups, ...] added up over the groups. [cells, ...]"""
    folded = CompensatedSum()
    folded.parts = by_key.parts.reshape(3, -1, GROUPS, *by_key.parts.shape[2:]).transpose(1, 2)
    return folded.total()


def _by_group(by_key: Tensor, cells: Tensor) -> Tensor:
    """Values per key [cells x groups, ...] added up over some cells. [groups, ...]"""
    return by_key.reshape(-1, GROUPS, *by_key.shape[1:])[cells].sum(0)


def _cells(sums: Sums) -> dict[str, Tensor]:
    """The cells of each scope that is reported. A scope that is empty is not, nor, unless it was asked for, one that
    holds the same tokens as another before it; cells go by their pattern, whatever the order they were met in."""
    patterns = sorted(sums.cells.of)
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, ...]] = set()
    for bit, name in enumerate(sums.names):
        members = tuple(sums.cells.of[p] for p in patterns if p >> bit & 1)
        if members and (members not in seen or name in sums.asked):
            found[name] = torch.tensor(members)
            seen.add(members)
    return found


def _massive(sums: Sums, cells: Tensor) -> str | None:
    """A warning where a scope holds tokens of more than MASSIVE times the median norm: they decide its sums."""
    bins = sorted((norm, slot) for (_, norm), slot in sums.bins.of.items())
    counts = np.cumsum([int(sums.inputs.bin_n[slot]) for _, slot in bins])
    median = bin_edge(bins[int(np.searchsorted(counts, counts[-1] / 2))][0] + 0.5)
    largest = math.sqrt(float(sums.inputs.largest[cells].max()))
    if largest <= MASSIVE * median or median < 1e-20:
        return None
    return (
        f"holds massive tokens (largest norm {largest:.4g}, median {median:.4g}): they dominate this number; "
        f"see the scope {NOT_FIRST!r} or 'not massive'"
    )


def _read_scopes(sums: Sums, x_by_cell: CompensatedSum) -> list[_Scope]:
    inputs, d = sums.inputs, sums.d
    norm2_by_cell = _by_cell(inputs.norm2)
    x_by_key, norm2_by_key = inputs.sum_x.value(), inputs.norm2.value()
    weights = cache(lambda units: torch.from_numpy(bootstrap.weights(units)))
    out = []
    pairs = list(sums.samples.of)
    for name, cells in _cells(sums).items():
        inside = set(cells.tolist())
        rows = [row for row, (_, cell) in enumerate(pairs) if cell in inside]
        _, sequences = np.unique([pairs[row][0] for row in rows], return_inverse=True)
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
                sequences=torch.from_numpy(sequences.reshape(-1)).long(),
                rows=torch.tensor(rows, dtype=torch.int64),
                n=n,
                massive=_massive(sums, cells),
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
        out += _sequence_measures(sums, name, scope)
    return out


def _sequence_measures(sums: Sums, name: str, scope: _Scope) -> list[Measure]:
    """Means over sequences of the mean over the tokens of each, which count a short text as much as a long one."""
    if not len(scope.rows) or int(sums.inputs.sequence_n.sum()) != int(sums.inputs.n.sum()):
        return []
    count = int(scope.sequences.max()) + 1
    n = torch.zeros(count, dtype=torch.float64)
    n.index_add_(0, scope.sequences, sums.inputs.sequence_n[scope.rows].double())
    values = torch.zeros(count, len(BY_SEQUENCE), dtype=torch.float64)
    values.index_add_(0, scope.sequences, sums.saes[name].sequence.value()[scope.rows])
    means = values / n[:, None]
    mse, l0 = (math.fsum(means[:, column].tolist()) / count for column in range(2))
    note = f"mean over {count} sequences"
    return [
        Measure("mse_per_sequence", mse / sums.d, scope.name, scope.n, None, None, note),
        Measure("l0_per_sequence", l0, scope.name, scope.n, None, None, note),
    ]


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
        if note is None and metric in OF_SQUARES:
            note = scope.massive
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
        put("relative_error", total["relative"] / scope.n, drawn["relative"] / scope.n_groups)
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
    bit = sums.names.index(FIRST) if FIRST in sums.names else None
    first = [] if bit is None else [slot for pattern, slot in sums.cells.of.items() if pattern >> bit & 1]
    total = state.sum_z.value()
    return FeatureStats(
        count=count,
        count_position_0=fired[first].sum(0) if sums.inputs.known["position"] else None,
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
    every = _cells(sums)
    scopes = [(ALL, (0, 1))] + ([(NOT_FIRST, (0,))] if inputs.known["position"] and NOT_FIRST in every else [])
    for scope, firsts in scopes:
        # sorted by norm, hence in the same order whatever order the bins were met in
        bins = sorted((norm, first, slot) for (first, norm), slot in sums.bins.of.items() if first in firsts)
        if not bins:
            continue
        slots = torch.tensor([slot for _, _, slot in bins])
        n = inputs.bin_n[slots].double()
        mean = x_by_cell.total(every[scope]).value() / float(n.sum())
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
                norm_low=bin_edge(bins[which[0]][0]),
                norm_high=bin_edge(bins[which[-1]][0] + 1),
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
