"""How well SAEs reconstruct activations: one streaming pass, any number of SAEs, every number named.

The pass itself is in `accumulate.py`; here its sums are read off as measures, per-latent statistics, a
density histogram and explained variance by norm decile. The result is the same, bit for bit, for every batch
size and every number of ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.core.errors import DataError
from hubsae.core.files import write_csv_atomic
from hubsae.core.metadata import Metric
from hubsae.core.sae import HubSAE
from hubsae.evals import bootstrap
from hubsae.evals.accumulate import BINS_PER_OCTAVE, ROW_STATS, Sums, rows_at_once, scope_keys
from hubsae.evals.blocks import BLOCK_ROWS, GROUPS, RUN_ROWS, SCOPE_CELLS, iter_blocks, read_pieces
from hubsae.evals.definitions import INTERVAL, Measure, to_metrics

# Below this share of Σ‖x‖² a variance is rounding: the activations are constant and ratios to it undefined.
CONSTANT = 1e-12
DENSITY_EDGES = tuple(round(-8 + 0.25 * i, 2) for i in range(33))


class FeatureStats(NamedTuple):
    """Per-latent statistics over all tokens of the pass; tensors are [d_sae]."""

    count: Tensor
    """Tokens on which the latent fires (z ≠ 0), int64."""
    count_position_0: Tensor | None
    """Of these, how many are the first of their sequence; None without positions."""
    mean: Tensor
    """Mean of z over the tokens on which it fires; 0 where it never does."""
    max: Tensor
    """Largest z; 0 where it never fires."""
    n_tokens: int
    """Tokens seen."""

    @property
    def density(self) -> Tensor:
        """Share of tokens on which each latent fires, float64."""
        return self.count.double() / max(self.n_tokens, 1)

    def log10_density(self, floor: float = 1e-10) -> Tensor:
        """What SAELens keeps in sparsity.safetensors."""
        return torch.log10(self.density.clamp_min(floor)).float()


class NormDecile(NamedTuple):
    """Explained variance among tokens of similar norm."""

    scope: str
    decile: int
    """1 holds the smallest norms."""
    norm_low: float
    norm_high: float
    n_tokens: int
    fve: float | None
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖², both over the decile, the mean that of the whole scope."""


class DensityBin(NamedTuple):
    """One bar of the density histogram."""

    log10_low: float | None
    """None for the latents that never fire."""
    log10_high: float | None
    n_latents: int


@dataclass(frozen=True)
class SAEReconstruction:
    """All numbers of one SAE."""

    name: str
    measures: list[Measure]
    features: FeatureStats
    deciles: list[NormDecile]
    histogram: list[DensityBin]
    batch_rule_rows: int | None
    """Rows each selection saw, where the SAE selects over a batch; None where codes do not depend on it."""
    draws: dict[tuple[str, str], np.ndarray]
    """Bootstrap values by (metric, scope). Two passes over the same samples draw the same groups, so the
    differences of their draws are paired."""

    def get(self, metric: str, scope: str = "all") -> Measure:
        """A measure by name and scope, or an error that lists what there is."""
        for measure in self.measures:
            if measure.name == metric and measure.scope == scope:
                return measure
        names = sorted({m.name for m in self.measures})
        scopes = sorted({m.scope for m in self.measures})
        raise DataError(
            f"no {metric!r} in scope {scope!r} for {self.name!r}",
            hint=f"metrics: {', '.join(names)}; scopes: {', '.join(scopes)} (scopes need their label columns)",
        )

    def value(self, metric: str, scope: str = "all") -> float | None:
        """The value of a measure; None where it is not defined."""
        return self.get(metric, scope).value

    def metrics(self) -> list[Metric]:
        """Entries for metadata.json."""
        return to_metrics(self.measures)


@dataclass(frozen=True)
class ReconstructionResult:
    """One pass: every SAE by name.

    >>> from hubsae.core.config import SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> result = reconstruction({"mine": sae}, torch.randn(200, 4, generator=torch.manual_seed(0)))
    >>> result["mine"].value("l0"), result["mine"].get("mse").n_tokens
    (1.975, 200)
    """

    saes: dict[str, SAEReconstruction]
    n_tokens: int
    scopes: list[str]

    def __getitem__(self, name: str) -> SAEReconstruction:
        return self.saes[name]

    def rows(self) -> list[dict[str, Any]]:
        """A tidy table: one line per SAE, metric and scope."""
        return [measure.row(sae=sae.name) for sae in self.saes.values() for measure in sae.measures]

    def decile_rows(self) -> list[dict[str, Any]]:
        """Explained variance by norm decile, tidy."""
        return [{"sae": s.name, **d._asdict()} for s in self.saes.values() for d in s.deciles]

    def histogram_rows(self) -> list[dict[str, Any]]:
        """Density histograms, tidy."""
        return [{"sae": s.name, **b._asdict()} for s in self.saes.values() for b in s.histogram]

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write reconstruction.csv, norm_deciles.csv and density_histogram.csv into a folder."""
        root = Path(folder)
        return [
            write_csv_atomic(root / "reconstruction.csv", self.rows()),
            write_csv_atomic(root / "norm_deciles.csv", self.decile_rows()),
            write_csv_atomic(root / "density_histogram.csv", self.histogram_rows()),
        ]


def name_saes(saes: Mapping[str, HubSAE] | Sequence[HubSAE] | HubSAE) -> dict[str, HubSAE]:
    """SAEs by name: the keys given, or their ids, or sae0, sae1, ..."""
    if isinstance(saes, HubSAE):
        saes = [saes]
    if isinstance(saes, Mapping):
        named = dict(saes)
    else:
        named = {}
        for number, sae in enumerate(saes):
            name = sae.metadata.id or f"sae{number}"
            named[name if name not in named else f"{name}#{number}"] = sae
    if not named:
        raise DataError("no SAEs to evaluate")
    return named


def accumulate(
    saes: Mapping[str, HubSAE] | Sequence[HubSAE] | HubSAE,
    activations: Any,
    *,
    batch_size: int | None = None,
    position: Any = None,
    is_prompt: Any = None,
    sample_id: Any = None,
    rank: int = 0,
    world_size: int = 1,
    on_block: Callable[[int], None] | None = None,
) -> Sums:
    """The sums of a pass, or of one rank's part of it; `merge` them and give them to `read_off`."""
    named = name_saes(saes)
    columns = {"position": position, "is_prompt": is_prompt, "sample_id": sample_id}
    pieces, labels, d = read_pieces(activations, columns, batch_size)
    sums = Sums(named, d, labels)
    for block in iter_blocks(pieces, rank=rank, world_size=world_size):
        sums.add(block, named)
        if on_block is not None:
            on_block(block.x.shape[0])
    return sums


def reconstruction(
    saes: Mapping[str, HubSAE] | Sequence[HubSAE] | HubSAE,
    activations: Any,
    *,
    batch_size: int | None = None,
    position: Any = None,
    is_prompt: Any = None,
    sample_id: Any = None,
    on_block: Callable[[int], None] | None = None,
) -> ReconstructionResult:
    """Evaluate SAEs on the same activations in one pass.

    `activations` is a tensor [tokens, d], a mapping with `x` and label columns, or an ActivationDataset.
    Labels (`position` of the token in its sequence, `is_prompt`, `sample_id`) open the scopes and make the
    intervals those of whole samples. `batch_size` only says how to read; it changes no number. Under torchrun
    ranks share the work and all get the whole result.

    >>> from hubsae.core.config import SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> x = torch.randn(64, 4, generator=torch.manual_seed(0))
    >>> result = reconstruction(sae, x)
    >>> result["sae0"].value("mse") == reconstruction(sae, x, batch_size=7)["sae0"].value("mse")
    True
    >>> reconstruction(sae, x, position=torch.arange(64) % 8).scopes
    ['all', 'no_position_0', 'position_0']
    """
    named = name_saes(saes)
    rank, world_size = _ranks()
    if world_size > 1:
        _agree_on_products(named, rank)
    sums = accumulate(
        named,
        activations,
        batch_size=batch_size,
        position=position,
        is_prompt=is_prompt,
        sample_id=sample_id,
        rank=rank,
        world_size=world_size,
        on_block=on_block,
    )
    return read_off(sums if world_size == 1 else sums.gather(), named)


def _ranks() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _agree_on_products(saes: Mapping[str, HubSAE], rank: int) -> None:
    """Which backend multiplies is decided by a timed trial; ranks that decided differently would round differently."""
    import torch.distributed as dist

    from hubsae.kernels.linear import adopt, decisions

    found: list[Any] = [None]
    if rank == 0:
        for sae in {sae.config: sae for sae in saes.values()}.values():
            with torch.no_grad():
                sae.encode_sparse(torch.zeros(rows_at_once(sae.d_sae, BLOCK_ROWS), sae.d_in, device=sae.device))
        found = [decisions()]
    dist.broadcast_object_list(found, src=0)
    adopt(found[0])


# ---- reading the sums off ---------------------------------------------------------------------------------


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
