"""The fit of linear probes: what a score is predicted by, from codes, vectors or label columns, in one pass.

    pass -> RidgeSums (normal equations by fold, split by problem) -> fit() -> Probe, with what it carries

The sums are those of the latents that fired: [folds, m, m], whatever the number of tokens, and no matrix of
[tokens, latents] is ever made. Everything that needs other rows than those a fit saw (the penalty, what a feature adds,
how stable its weight is) is read off the sums of the fold that was left out. Ridge as everyone has it:
min ‖y − Xw − b‖² + alpha ‖w‖², the bias free.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.splits import uniform
from hubsae.core.codes import SparseCodes
from hubsae.core.errors import ConfigError, DataError
from hubsae.core.scopes import parse
from hubsae.evals.passes import PassBlock, as_column, load_state, save_state
from hubsae.evals.probes import Probe, inputs_of

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Tried penalties: alpha as a share of the number of rows, for inputs of variance one. A constant is always tried."""

FOLDS = 5
TABLES = ("n", "sum_y", "yy", "sum_x", "fired", "xy", "pairs")
PAIRS_AT_ONCE = 1 << 22


class Carrier(NamedTuple):
    """What one feature carries of the score."""

    feature: int
    weight: float
    """Per unit of the feature's value"""
    effect: float
    """Weight times the feature's spread over the rows: what it moves the score by"""
    drop: float
    """What cross-validated R² loses when the feature is left out and the rest is fitted again"""
    stable: float
    """Share of the fits without one fold in which it is among as many strongest, with the same sign"""
    rows: int
    """Rows on which it is not 0"""


@dataclass(frozen=True)
class Fit:
    """A probe with what cross-validation says of it."""

    probe: Probe
    r2: float
    """Of rows in folds left out, about the mean of the others"""
    by_penalty: dict[float, float]
    effects: Tensor
    """[width] of each input: weight times its spread over the rows"""
    carriers: list[Carrier]


class RidgeSums:
    """Accumulator of the normal equations of a probe, by fold; folds are drawn by problem.

    Inputs are the codes of `sae`, else the label columns `inputs`, else the vectors. Rows are those in `scope`, each
    of which must have every target. `columns` of targets share the sums of the inputs, so one more costs nothing.

    >>> from hubsae.core.config import SAEConfig
    >>> from hubsae.core.sae import SAE
    >>> from hubsae.evals.passes import run_pass
    >>> sae = SAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> x = torch.randn(400, 4, generator=torch.manual_seed(0))
    >>> score = sae.encode(x)[:, 3] * 2.0
    >>> sums = RidgeSums(["score"], sae="mine", group="problem")
    >>> _ = run_pass(x, {"mine": sae}, [sums], columns={"score": score, "problem": torch.arange(400) // 4})
    >>> fit = sums.fit("score", top=1)
    >>> fit.carriers[0].feature, fit.r2 > 0.99
    (3, True)
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        sae: str | None = None,
        inputs: Sequence[str] = (),
        group: str = "sample_id",
        scope: str = "all",
        folds: int = FOLDS,
        seed: int = 0,
    ):
        self.targets, self.sae, self.inputs = list(targets), sae, list(inputs)
        self.group, self.scope, self.folds, self.seed = group, parse(scope), folds, seed
        self.latents: list[int] = []
        """The latents that fired, in the order of the sums"""
        self.width = 0
        self.problems: set[int] = set()
        self._slot = torch.zeros(0, dtype=torch.int64)
        t = len(self.targets)
        self.n = torch.zeros(folds, dtype=torch.float64)
        self.sum_y, self.yy = (torch.zeros(folds, t, dtype=torch.float64) for _ in range(2))
        self.sum_x, self.fired = (torch.zeros(folds, 0, dtype=torch.float64) for _ in range(2))
        self.xy = torch.zeros(folds, 0, t, dtype=torch.float64)
        self.pairs = torch.zeros(folds, 0, 0, dtype=torch.float64)
        """Σ x_i x_j; of two latents the sum lies in either triangle, in parts"""

    @property
    def columns(self) -> tuple[str, ...]:
        """Label columns."""
        return tuple(dict.fromkeys((*self.targets, *self.inputs, self.group, *self.scope.columns)))

    # ---- adding up ----------------------------------------------------------------------------------------

    def add(self, block: PassBlock) -> None:
        """Take in one block."""
        for name in (*self.targets, *self.inputs, self.group):
            if name not in block.labels:
                raise DataError(f"a probe needs the label column {name!r}", hint=f"here: {', '.join(block.labels)}")
        keep = self.scope.mask(block.labels, len(block))
        if not keep.any():
            return
        y = np.stack([np.asarray(block.labels[name])[keep].astype(np.float64) for name in self.targets], 1)
        if not np.isfinite(y).all():
            bad = int((~np.isfinite(y).all(1)).sum())
            raise DataError(
                f"{bad} of {len(y)} rows from row {block.start} on are in the scope {self.scope.name!r} and have no "
                f"score: {', '.join(self.targets)} holds NaN or infinity there",
                hint="choose a scope in which every row is scored, or look at the reward model: NaN comes from float16",
            )
        groups = group_numbers(np.asarray(block.labels[self.group])[keep])
        self.problems.update(np.unique(groups).tolist())
        fold = torch.from_numpy((uniform(groups.astype(np.uint64), self.seed) * self.folds).astype(np.int64))
        x = inputs_of(block, keep, self.sae, self.inputs)
        if isinstance(x, SparseCodes):
            self._add_codes(x.indices.long(), x.values.double(), x.d_sae, y, fold)
        else:
            self._see(torch.arange(x.shape[1]), x.shape[1])
            self._add_dense(x.double(), torch.from_numpy(y), fold)

    def _add_codes(self, latents: Tensor, values: Tensor, width: int, y: np.ndarray, fold: Tensor) -> None:
        device = values.device
        self._see(torch.unique(latents[values != 0]).cpu(), width, device)
        x, where, target, fold = (
            values,
            self._slot[latents].clamp_min(0),
            torch.from_numpy(y).to(device),
            fold.to(device),
        )
        m, k = len(self.latents), x.shape[1]
        if k * k > 2 * m:  # as many pairs as there are: a dense product is cheaper
            step = max(1, PAIRS_AT_ONCE // max(m, 1))
            for first in range(0, len(x), step):
                part = slice(first, first + step)
                dense = x.new_zeros(len(x[part]), m).scatter_add_(1, where[part], x[part])
                self._add_dense(dense, target[part], fold[part])
            return
        self._add_targets(target, fold)
        at = fold[:, None] * m + where  # [rows, k]
        self.sum_x.view(-1).index_add_(0, at.reshape(-1), x.reshape(-1))
        self.fired.view(-1).index_add_(0, at.reshape(-1), (x != 0).double().reshape(-1))
        each = (x[..., None] * target[:, None]).reshape(-1, target.shape[1])
        self.xy.view(-1, target.shape[1]).index_add_(0, at.reshape(-1), each)
        one, two = torch.triu_indices(k, k, device=device)
        step = max(1, PAIRS_AT_ONCE // len(one))
        flat = self.pairs.view(-1)
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            place = (at[part][:, one] * m + where[part][:, two]).reshape(-1)
            flat.index_add_(0, place, (x[part][:, one] * x[part][:, two]).reshape(-1))

    def _add_dense(self, x: Tensor, y: Tensor, fold: Tensor) -> None:
        self._add_targets(y, fold)
        for number in torch.unique(fold).tolist():
            rows = fold == number
            some = x[rows]
            self.sum_x[number] += some.sum(0)
            self.fired[number] += (some != 0).sum(0)
            self.xy[number] += some.T @ y[rows]
            self.pairs[number] += (some.T @ some).triu()

    def _add_targets(self, y: Tensor, fold: Tensor) -> None:
        self.n.index_add_(0, fold, torch.ones_like(fold, dtype=torch.float64))
        self.sum_y.index_add_(0, fold, y)
        self.yy.index_add_(0, fold, y * y)

    def _see(self, latents: Tensor, width: int, device: torch.device | None = None) -> None:
        """Make room for latents that were not seen before."""
        if not self.width:
            self.width, self._slot = width, torch.full((width,), -1, dtype=torch.int64)
        if device is not None and self._slot.device != device:
            for name in (*TABLES, "_slot"):
                setattr(self, name, getattr(self, name).to(device))
        fresh = latents[self._slot[latents.to(self._slot.device)].cpu() < 0]
        if not len(fresh):
            return
        m = len(self.latents)
        self._slot[fresh.to(self._slot.device)] = torch.arange(m, m + len(fresh), device=self._slot.device)
        self.latents += fresh.tolist()
        more = len(fresh)
        self.sum_x, self.fired = (torch.nn.functional.pad(t, (0, more)) for t in (self.sum_x, self.fired))
        self.xy = torch.nn.functional.pad(self.xy, (0, 0, 0, more))
        self.pairs = torch.nn.functional.pad(self.pairs, (0, more, 0, more))

    def merge(self, other: RidgeSums) -> None:
        """Take in what another rank or shard has added up."""
        if (self.targets, self.folds, self.seed, self.group) != (other.targets, other.folds, other.seed, other.group):
            raise ConfigError("sums of other targets, folds or groups cannot be merged")
        if not other.width:
            return
        self._see(torch.tensor(other.latents), other.width, other.pairs.device)
        at = self._slot[torch.tensor(other.latents, device=self._slot.device)]
        self.n, self.sum_y, self.yy = self.n + other.n, self.sum_y + other.sum_y, self.yy + other.yy
        for name in ("sum_x", "fired", "xy"):
            getattr(self, name).index_add_(1, at, getattr(other, name))
        self.pairs[:, at[:, None], at] += other.pairs
        self.problems |= other.problems

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state into a file."""
        lists = {"latents": self.latents, "problems": sorted(self.problems)}
        tensors = {n: getattr(self, n) for n in TABLES} | {n: torch.tensor(v).long() for n, v in lists.items()}
        return save_state(path, "ridge", tensors, [self.targets, self.folds, self.seed, self.group, self.width])

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a state that was saved."""
        tensors, facts = load_state(path, "ridge")
        if facts[:4] != [self.targets, self.folds, self.seed, self.group]:
            raise ConfigError(f"{path} holds sums of other targets, folds or groups: {facts[:4]}")
        self.width = facts[4]
        self.latents, self.problems = tensors.pop("latents").tolist(), set(tensors.pop("problems").tolist())
        vars(self).update(tensors)
        self._slot = torch.full((self.width,), -1, dtype=torch.int64)
        self._slot[self.latents] = torch.arange(len(self.latents))

    def result(self) -> RidgeSums:
        """Itself: what is read off is asked for with `fit`."""
        return self

    # ---- reading off --------------------------------------------------------------------------------------

    def fit(
        self,
        target: str | None = None,
        *,
        alpha: float | None = None,
        penalties: Sequence[float] = PENALTIES,
        standardise: bool = True,
        top: int = 0,
    ) -> Fit:
        """The probe of a target, its penalty by cross-validation over folds of problems.

        `alpha` fixes the penalty as scikit-learn counts it. `standardise` fits inputs of variance one, which makes one
        penalty fair to all of them; the weights are of the inputs as they are. `top` asks what so many features carry.
        """
        return self.fit_many([target or self.targets[0]], alpha, penalties, standardise, top)[0]

    def fit_many(
        self,
        targets: Sequence[str],
        alpha: float | None = None,
        penalties: Sequence[float] = PENALTIES,
        standardise: bool = True,
        top: int = 0,
    ) -> list[Fit]:
        """The same for several targets: each matrix is factored once for all of them."""
        which = [self.targets.index(target) for target in targets]
        self._check(targets, which)
        full = _Centred.of(self, [True] * self.folds, which)
        spread = (full.xx.diagonal() / full.n).clamp_min(0).sqrt()
        # constant inputs (a latent that fired alike on every row) say nothing: left at weight 0
        scale = torch.where(spread > 1e-9 * full.mean_x.abs(), spread, torch.inf)
        scale = scale if standardise else torch.where(torch.isfinite(scale), 1.0, torch.inf).to(scale)
        parts = [f for f in range(self.folds) if self.n[f] > 0]
        asked = [np.inf, *sorted(penalties, reverse=True)] if alpha is None else [alpha / float(full.n)]
        sse = torch.zeros(len(asked), len(which), dtype=torch.float64)
        total = torch.zeros(len(which), dtype=torch.float64)
        for f in parts:
            rest = _Centred.of(self, [g != f for g in range(self.folds)], which)
            held = _Centred.of(self, [g == f for g in range(self.folds)], which)
            total += held.error(rest, None)
            for row, penalty in enumerate(asked):
                sse[row] += held.error(rest, None if np.isinf(penalty) else rest.solve(scale, penalty))
        r2 = 1 - sse / total
        fits = []
        # the largest of equals: a penalty that does not matter is not a small one
        chosen = [asked[i] for i in np.argmax(r2.numpy(), axis=0)]
        solved = {p: full.xy * 0 if np.isinf(p) else full.solve(scale, p) for p in set(chosen)}
        for column, (target, best) in enumerate(zip(targets, chosen, strict=True)):
            weights = solved[best][:, column]
            wide, effects = torch.zeros(2, self.width, dtype=torch.float64)
            wide[self.latents], effects[self.latents] = weights.cpu(), (weights * spread).cpu()
            bias = float(full.mean_y[column] - full.mean_x @ weights)
            record = {
                "target": target, "sae": self.sae, "inputs": self.inputs, "scope": self.scope.name, "group": self.group,
                "alpha": None if np.isinf(best) else best * float(full.n), "penalty": None if np.isinf(best) else best,
                "standardised": standardise, "folds": len(parts), "rows": int(full.n), "problems": len(self.problems),
                "cross_validated_r2": float(r2[:, column].max()), "mean": float(full.mean_y[column]),
            }  # fmt: skip
            carriers = self._carriers(column, which, weights, scale, best, parts, top) if top else []
            found = {float(p): float(v) for p, v in zip(asked, r2[:, column], strict=True)}
            fits.append(Fit(Probe(wide, bias, record), float(r2[:, column].max()), found, effects, carriers))
        return fits

    def _check(self, targets: Sequence[str], which: Sequence[int]) -> None:
        n = float(self.n.sum())
        if not n:
            raise DataError(f"no row is in the scope {self.scope.name!r}: nothing to fit a probe on")
        if len(self.problems) < 2 or int((self.n > 0).sum()) < 2:
            raise DataError(
                f"the scores are of {len(self.problems)} problem{'s' * (len(self.problems) != 1)}, all in one fold: "
                "there is none to hold out",
                hint=f"score more problems, or name the column that tells them apart with group= (now {self.group!r})",
            )
        for target, at in zip(targets, which, strict=True):
            mean = float(self.sum_y[:, at].sum()) / n
            if float(self.yy[:, at].sum()) - n * mean * mean <= 1e-12 * max(float(self.yy[:, at].sum()), 1e-300):
                raise DataError(
                    f"all {int(n)} scores in {target!r} are {mean:.6g}: there is nothing to predict",
                    hint="is the reward model's head trained, and read at the right tokens?",
                )

    def _carriers(
        self, column: int, which: list[int], weights: Tensor, scale: Tensor, penalty: float, parts: list[int], top: int
    ) -> list[Carrier]:
        spread = torch.where(torch.isfinite(scale), scale, 0.0)
        every = _Centred.of(self, [True] * self.folds, which)
        moved = weights * (every.xx.diagonal() / every.n).clamp_min(0).sqrt()
        chosen = moved.abs().argsort(descending=True)[:top]
        chosen = chosen[weights[chosen] != 0]
        lost, total = torch.zeros(len(chosen), dtype=torch.float64), 0.0
        stable = torch.zeros(len(chosen), dtype=torch.float64)
        for f in parts if len(chosen) else []:
            rest = _Centred.of(self, [g != f for g in range(self.folds)], which).only(column)
            held = _Centred.of(self, [g == f for g in range(self.folds)], which).only(column)
            w = rest.solve(scale, penalty)
            units = torch.zeros(len(weights), len(chosen), dtype=torch.float64, device=w.device)
            units[chosen, torch.arange(len(chosen))] = 1.0
            inverse = rest.solve(scale, penalty, units)  # columns of the inverse
            # fitted again without feature j: w − A⁻¹e_j · w_j / (A⁻¹)_jj
            share = w[chosen, 0] / inverse[chosen, torch.arange(len(chosen))]
            without = w - inverse * share
            error = torch.cat([held.error(rest, without[:, [j]]) for j in range(len(chosen))])
            lost += error - held.error(rest, w)
            total += float(held.error(rest, None)[0])
            size = (w[:, 0] * spread).abs()
            bar = size.sort(descending=True).values[len(chosen) - 1]
            stable += ((size[chosen] >= bar) & (w[chosen, 0].sign() == weights[chosen].sign())).double().cpu()
        rows = self.fired.sum(0)
        return [
            Carrier(
                self.latents[at], float(weights[at]), float(moved[at]), float(lost[i] / total),
                float(stable[i] / len(parts)), int(rows[at]),
            )
            for i, at in enumerate(chosen.tolist())
        ]  # fmt: skip


@dataclass(frozen=True)
class _Centred:
    """Sums over some folds, about their means; the raw sums stay, for errors about other means."""

    n: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    """[m, m] Σ (x − mean)(x − mean)ᵀ"""
    xy: Tensor
    """[m, targets]"""
    yy: Tensor
    """[targets]"""

    @staticmethod
    def of(sums: RidgeSums, folds: Sequence[bool], which: Sequence[int]) -> _Centred:
        on = torch.tensor(folds, device=sums.n.device)
        n = sums.n[on].sum()
        pairs = torch.zeros_like(sums.pairs[0])
        for fold in on.nonzero()[:, 0].tolist():  # one after the other: an index would copy all of them
            pairs += sums.pairs[fold]
        xx = pairs + pairs.T
        xx.diagonal().copy_(pairs.diagonal())
        x, y = sums.sum_x[on].sum(0), sums.sum_y[on].sum(0)[list(which)]
        return _Centred(
            n, x / n, y / n, xx.sub_(torch.outer(x, x / n)),
            sums.xy[on].sum(0)[:, list(which)] - torch.outer(x, y / n), sums.yy[on].sum(0)[list(which)] - y * y / n,
        )  # fmt: skip

    def only(self, column: int) -> _Centred:
        """One of the targets."""
        part = slice(column, column + 1)
        return _Centred(self.n, self.mean_x, self.mean_y[part], self.xx, self.xy[:, part], self.yy[part])

    def solve(self, scale: Tensor, penalty: float, right: Tensor | None = None) -> Tensor:
        """(Σ(x − mean)(x − mean)ᵀ/scale² + penalty·n)⁻¹ in the inputs' own units, times Σxy or `right`. [m, ...]"""
        inverse = 1 / scale
        matrix = self.xx * torch.outer(inverse, inverse)
        matrix.diagonal().add_(penalty * self.n)
        factor, bad = torch.linalg.cholesky_ex(matrix)
        if int(bad):  # no penalty, and inputs that say the same: the smallest weights
            solved = torch.linalg.pinv(matrix, hermitian=True) @ (
                (self.xy if right is None else right) * inverse[:, None]
            )
        else:
            solved = torch.cholesky_solve((self.xy if right is None else right) * inverse[:, None], factor)
        return solved * inverse[:, None]

    def error(self, fitted: _Centred, weights: Tensor | None) -> Tensor:
        """Σ (y − prediction)² over these folds, of weights fitted on others (None: of their mean). [targets], CPU"""
        off = self.mean_y - fitted.mean_y
        if weights is None:
            return (self.yy + self.n * off.square()).cpu()
        off = off - (self.mean_x - fitted.mean_x) @ weights
        spread = self.yy - 2 * (weights * self.xy).sum(0) + (weights * (self.xx @ weights)).sum(0)
        return (spread + self.n * off.square()).cpu()


def group_numbers(values: np.ndarray) -> np.ndarray:
    """Problems as numbers, whatever names them.

    >>> group_numbers(np.array([3, 4])).tolist(), len(set(group_numbers(np.array(["a", "b"])).tolist()))
    ([3, 4], 2)
    """
    return values.astype(np.int64) if values.dtype.kind in "iub" else as_column("sample_id", values)
