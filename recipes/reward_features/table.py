"""The table: one layer of one model, the score predicted from SAE, raw activations, controls and baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hubsae.core.sae import SAE
from hubsae.evals.passes import PassBlock, run_pass
from hubsae.evals.probes import Predictions
from hubsae.evals.ridge import Fit, RidgeSums
from hubsae.recipes.standard import Activations

from . import scores
from .data import rows_at, shuffled
from .settings import ProbeSettings

SAE_CODES, RAW, RANDOM = "SAE", "raw activations", "random dictionary"
BASELINE, SHUFFLED = "position, length, step number", "shuffled scores"
MASKED, RAW_MASKED = "SAE, format tokens masked", "raw, format tokens masked"
PLACES = ("position", "length", "step")
MOST_BLOCKS = 25
"""Blocks of tokens, 100,000, on which is counted what the features fire on"""
STRONGEST = 10
"""Features whose share of all effects says how concentrated a score is"""


class Layer(NamedTuple):
    """What came of one layer."""

    rows: list[dict[str, Any]]
    fits: dict[str, Fit]


def random_like(sae: SAE, seed: int) -> SAE:
    """A dictionary of random directions, as wide and as sparse as `sae`, about the same mean."""
    found = SAE.random(sae.config, seed=seed)
    with torch.no_grad():
        found.b_dec.copy_(sae.b_dec.cpu())
        if not sae.config.apply_b_dec_to_input:
            found.b_enc.copy_(-found.b_dec @ found.W_enc)
    return found.to(sae.device)


def probe_layer(
    of: str, layer: int, sae: SAE, train: Activations, test: Activations, how: ProbeSettings, seed: int = 0
) -> Layer:
    """Fit every probe on the training solutions, and measure each on problems held out."""
    named = {"sae": sae, "random": random_like(sae, seed + 1)}
    tables = {
        (split, mark): rows_at(where.open(layer, "train", of), mark)
        for split, where in (("train", train), ("test", test))
        for mark in ("step_end", "content_end")
    }
    chance = [f"shuffled_{n}" for n in range(how.shuffles)]
    for (split, _), part in tables.items():
        for n, name in enumerate(chance):
            part[name] = shuffled(part["score"], part["problem"], 2 * (seed + n) + (split == "test"))
    common: dict[str, Any] = {"group": "problem", "folds": how.folds, "seed": seed}
    at_ends = {
        SAE_CODES: RidgeSums(["score", *chance], sae="sae", **common),
        RAW: RidgeSums(["score"], **common),
        RANDOM: RidgeSums(["score"], sae="random", **common),
        BASELINE: RidgeSums(["score"], inputs=PLACES, **common),
    }
    at_content = {MASKED: RidgeSums(["score"], sae="sae", **common), RAW_MASKED: RidgeSums(["score"], **common)}
    rows: list[dict[str, Any]] = []
    fits: dict[str, Fit] = {}
    for mark, sums in (("step_end", at_ends), ("content_end", at_content)):
        run_pass(tables["train", mark], named, list(sums.values()))
        own = {name: one.fit("score", top=how.top if name == SAE_CODES else 0) for name, one in sums.items()}
        noise = dict(zip(chance, at_ends[SAE_CODES].fit_many(chance), strict=True)) if mark == "step_end" else {}
        probes = {name: fit.probe for name, fit in (own | noise).items()}
        (found,) = run_pass(tables["test", mark], named, [Predictions(probes, ["score", "problem", "good"])])
        fits |= own
        rows += [{"model": of, "layer": layer, **_measured(name, fit, found)} for name, fit in own.items()]
        if noise:
            rows.append({"model": of, "layer": layer, **_by_chance(noise, found, tables["test", mark])})
    return Layer(rows, fits)


def _measured(name: str, fit: Fit, found: dict[str, np.ndarray]) -> dict[str, Any]:
    said, score, problem, record = found[name], found["score"], found["problem"], fit.probe.record
    strong = fit.effects.abs().sort(descending=True).values
    return {
        "inputs": name,
        **scores.r2(said, score, problem, record["mean"]).columns("r2"),
        **scores.spearman(said, score, problem).columns("spearman"),
        **scores.auc(said, found["good"], problem).columns("auc"),
        "cross_validated_r2": fit.r2, "penalty": record["penalty"], "used": int((fit.probe.weights != 0).sum()),
        "strongest": float(strong[:STRONGEST].sum() / strong.sum()) if strong.any() else None,
        "rows": record["rows"], "problems": record["problems"],
    }  # fmt: skip


def _by_chance(noise: dict[str, Fit], found: dict[str, np.ndarray], targets: dict[str, Any]) -> dict[str, Any]:
    """Mean over shuffles, and the central 95 % of them."""
    each: dict[str, list[float]] = {"r2": [], "spearman": [], "auc": []}
    for name, fit in noise.items():
        said, score, problem = found[name], targets[name], targets["problem"]
        each["r2"].append(scores.r2(said, score, problem, fit.probe.record["mean"]).value)
        each["spearman"].append(scores.spearman(said, score, problem).value)
        each["auc"].append(scores.auc(said, score > np.median(score), problem).value)
    row: dict[str, Any] = {"inputs": SHUFFLED}
    for name, values in each.items():
        low, high = np.quantile(values, [0.025, 0.975])
        row |= {name: float(np.mean(values)), f"{name}_low": float(low), f"{name}_high": float(high)}
    first = next(iter(noise.values()))
    return row | {"cross_validated_r2": float(np.mean([f.r2 for f in noise.values()])),
                  "rows": first.probe.record["rows"], "problems": first.probe.record["problems"]}  # fmt: skip


class Company:
    """Accumulator: on which tokens each feature fires, format or not, and what the score is there."""

    columns = ("step", "is_format", "score")

    def __init__(self, width: int):
        self.mass, self.form, self.fired, self.score = (torch.zeros(width, dtype=torch.float64) for _ in range(4))

    def add(self, block: PassBlock) -> None:
        """Take in one block; prompts are left out."""
        (codes,) = block.codes.values()
        inside = torch.from_numpy(np.asarray(block.labels["step"]) > 0)
        form = torch.from_numpy(np.asarray(block.labels["is_format"]).astype(np.float64))
        score = torch.from_numpy(np.asarray(block.labels["score"]).astype(np.float64))
        values = codes.values.cpu().double()[inside]
        where = codes.indices.cpu().long()[inside].reshape(-1)
        on = (values != 0).double()
        self.mass.index_add_(0, where, values.reshape(-1))
        self.form.index_add_(0, where, (values * form[inside, None]).reshape(-1))
        self.fired.index_add_(0, where, on.reshape(-1))
        self.score.index_add_(0, where, (on * score[inside, None]).reshape(-1))

    def result(self) -> Company:
        """Itself."""
        return self


def carriers_of(of: str, layer: int, fit: Fit, sae: SAE, acts: Activations) -> list[dict[str, Any]]:
    """The features that carry the score, with what they fire on."""
    data = acts.open(layer, "train", of)
    company: Any = Company(sae.d_sae)
    (seen,) = run_pass(data, {"sae": sae}, [company], blocks=(0, MOST_BLOCKS))
    rows = []
    for carrier in fit.carriers:
        f = carrier.feature
        fired = float(seen.fired[f])
        rows.append({
            "model": of, "layer": layer, **carrier._asdict(),
            "on_format": float(seen.form[f] / seen.mass[f]) if float(seen.mass[f]) else None,
            "score_where_it_fires": float(seen.score[f] / fired) if fired else None,
        })  # fmt: skip
    return rows


def rows_of(table: Sequence[Mapping[str, Any]], **where: Any) -> list[Mapping[str, Any]]:
    """The rows of a table with these values, which may have come from a CSV."""
    return [row for row in table if all(str(row.get(key)) == str(value) for key, value in where.items())]
