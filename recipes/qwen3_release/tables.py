"""The recipe's tables: the evaluation of every checkpoint, words to steer towards, and dead features by variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.activations.stats import ActivationStats
from hubsae.core.metadata import Metric
from hubsae.core.parquet import arrow
from hubsae.evals import bootstrap
from hubsae.evals.results import SAEReconstruction
from hubsae.evals.splice import SpliceResult
from hubsae.evals.steering import UNSTEERED, SteeringResult
from hubsae.index.features import FeatureIndex
from hubsae.index.files import PROMPTS
from hubsae.recipes.sweep import Outcome

from .settings import Config

HEADLINES = (
    "fve_normalised", "mse_normalised", "fve", "mse", "dead_fraction", "frac_recovered_zero", "kl_score", "delta_ce",
)  # fmt: skip
LEAST_PURITY, LEAST_WORD = 0.8, 4
INTERVAL = "95 % percentile bootstrap over conversations"


# ---- every kept checkpoint ---------------------------------------------------------------------------------------


def kl_score(name: str, result: SpliceResult, scope: str) -> dict[str, Any]:
    """1 - kl / kl_zero over the texts of a splice: the card's second score, with its interval over texts."""
    used = [row for row in result.per_text if row["scope"] == scope]
    sums = np.array([[row["kl"], row["kl_zero"]] for row in used])

    def of(s: np.ndarray) -> np.ndarray:
        return 1 - s[:, 0] / s[:, 1]

    low, high = bootstrap.interval(sums, of) or (None, None)
    value, n = float(of(sums.sum(0, keepdims=True))[0]), result.get("kl", scope).n_tokens
    return {"sae": name, "metric": "kl_score", "scope": scope, "value": value, "low": low, "high": high, "n_tokens": n}


def evaluation(rows: Sequence[Mapping[str, Any]], scope: str) -> list[dict[str, Any]]:
    """The headlines of each checkpoint in its own scope, as a card shows them."""
    order = {metric: place for place, metric in enumerate(HEADLINES)}
    wanted = [row for row in rows if row["metric"] in order and row["scope"] == scope]
    columns = ("value", "low", "high", "n_tokens")
    return [
        {"checkpoint": row["sae"], "metric": row["metric"], **{name: row[name] for name in columns}}
        for row in sorted(wanted, key=lambda row: (row["sae"], order[row["metric"]]))
    ]


def as_metric(row: Mapping[str, Any]) -> Metric:
    """A row as an entry of metadata.json."""
    interval = None if row["low"] is None else (row["low"], row["high"])
    return Metric(
        name=row["metric"], value=row["value"], definition=row["definition"], n_tokens=row["n_tokens"],
        scope=row["scope"], interval=interval, source="hubsae",
        interval_kind=(row.get("interval") or INTERVAL) if interval else None,
    )  # fmt: skip


# ---- index and steering ------------------------------------------------------------------------------------------


def prompt_rows(folder: Path) -> int:
    """How many strongest conversations an index keeps, over all features."""
    kinds = arrow().parquet.read_table(folder / PROMPTS, columns=["kind"])["kind"]
    return int((kinds.to_numpy(zero_copy_only=False) == "prompt").sum())


def words_of(index: FeatureIndex, count: int, norms: Sequence[float]) -> dict[int, str]:
    """Features that fire on one whole word, with the word: those that add most at their strongest, one per word.

    `norms` are those of the decoder rows. Where too few fire so, features whose strongest token is anything follow.
    """
    known = {name: index.metrics[name].to_pylist() for name in ("purity", "count", "top_token", "max")}
    readable = index.readable() or [f for f, n in enumerate(known["count"]) if n]

    def rank(feature: int) -> tuple[bool, float]:
        token = known["top_token"][feature] or ""
        pure = (known["purity"][feature] or 0) >= LEAST_PURITY
        whole = token.startswith(" ") and token.strip().isalpha() and len(token.strip()) >= LEAST_WORD
        return not (pure and whole), -known["max"][feature] * norms[feature]

    found: dict[str, int] = {}
    for feature in sorted(readable, key=rank):
        word = (known["top_token"][feature] or "").strip().lower()
        if word and known["max"][feature] > 0 and len(found) < count:
            found.setdefault(word, feature)
    return {feature: word for word, feature in found.items()}


def questions(chats: Sequence[Any], tokenizer: Any, count: int, longest: int) -> list[Any]:
    """First questions of conversations that are short enough to be asked many times."""
    found = []
    for chat in chats:
        asked = next((m for m in chat["messages"] if m.get("role", m.get("from")) in ("user", "human")), None)
        text = "" if asked is None else asked.get("content", asked.get("value", ""))
        if text and len(tokenizer(text)["input_ids"]) <= longest:
            found.append([{"role": "user", "content": text}])
        if len(found) == count:
            break
    return found


def examples(result: SteeringResult, words: Mapping[str, str], each: int = 1) -> list[dict[str, Any]]:
    """What was written: unsteered, and under each feature at each strength."""
    rows = []
    for name, word in words.items():
        for prompt in range(min(each, len(result.prompts))):
            before = {"feature": name, "word": word, "prompt": result.prompts[prompt]}
            rows.append({**before, "strength": 0.0, "text": result.texts[UNSTEERED, 0.0][prompt]})
            rows += [{**before, "strength": s, "text": result.texts[name, s][prompt]} for s in result.strengths]
    return rows


# ---- dead features -----------------------------------------------------------------------------------------------


def gamma(stats: ActivationStats) -> dict[str, float]:
    """The norm ratio ‖mean‖ / ‖std‖ that predicts dead features, over all tokens and without position 0."""
    pairs = {"all": (stats.mean, stats.std), "not position_0": (stats.mean_without_first, stats.std_without_first)}
    return {scope: float(mean.norm() / std.norm()) for scope, (mean, std) in pairs.items()}


def dead_row(cell: Outcome, measured: SAEReconstruction, scope: str) -> dict[str, Any]:
    """One cell: how many features never fired on the activations put aside, and how well it reconstructs them."""
    variant, _, seed = cell.id.rpartition("-")
    dead = measured.get("dead_fraction", scope)
    return {
        "variant": variant, "seed": int(seed), "dead": dead.value, "on_tokens": dead.n_tokens,
        "fve": measured.value("fve", scope), "l0": measured.value("l0", scope), "dead_in_training": cell.dead,
        "training_tokens": cell.tokens,
    }  # fmt: skip


def dead_summary(cells: Sequence[Mapping[str, Any]], stats: ActivationStats, config: Config) -> list[dict[str, Any]]:
    """One row per variant: mean over seeds and the range, beside the norm ratio of the space it was trained in."""
    scope = "not position_0" if "position_0" in config.sae.exclude else "all"
    rows, ratio = [], gamma(stats)[scope]
    spaces = {name.rpartition("-")[0]: cell.normalize for name, cell in config.variants().items()}
    for variant in dict.fromkeys(row["variant"] for row in cells):
        mine = [row for row in cells if row["variant"] == variant]
        dead, fve = ([row[name] for row in mine] for name in ("dead", "fve"))
        rows.append(
            {
                "variant": variant, "gamma": ratio if spaces[variant] == "none" else 0.0, "seeds": len(mine),
                "dead": float(np.mean(dead)), "dead_from": min(dead), "dead_to": max(dead),
                "fve": float(np.mean(fve)), "fve_from": min(fve), "fve_to": max(fve), "on_tokens": mine[0]["on_tokens"],
            }
        )  # fmt: skip
    return rows
