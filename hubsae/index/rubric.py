"""How clear a feature is on a scale of five, as papers had chat models say it, beside a control.

The judge sees the strongest contexts of a feature, token by token with the values, and gives one number: 5 for a clear
pattern without an exception, 1 for none. There are no contexts without the feature and none that were held out, so the
number says how alike the strongest contexts look. The control says what that is worth: the same question about contexts
that belong to as many different features. `explain` has scores that ask more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.parquet import arrow
from hubsae.evals.bootstrap import wilson
from hubsae.index.chat import Chat, each_once
from hubsae.index.explain import Contexts, passage

JOURNAL = "ratings.jsonl"
RUBRIC = (
    "Below are passages of text in which one feature of a language model is active, as tokens, each followed by how "
    "strongly the feature is active on it. Name the feature and score how clear the pattern is:\n"
    "5: a clear pattern, and no passage that deviates from it\n"
    "4: a clear pattern, with one or two deviating passages\n"
    "3: a clear overall pattern, but quite a few passages that do not fit\n"
    "2: a broad theme without structure\n"
    "1: no pattern that one could name\n"
    "Answer in the form: verdict score [[n]], feature name [[name]]"
)
CLEAR = 4
"""The score from which a feature counts as clear."""


@dataclass(frozen=True)
class Rating:
    """What the judge said of a feature, and of as many contexts of different features."""

    feature: int
    score: int | None
    """None where its answer holds no score"""
    name: str
    control: int | None
    settings: str


def rateable(index: str | Path, shown: int = 5) -> list[int]:
    """Features that fire in at least `shown` samples, so that as many contexts can be shown."""
    table = arrow().parquet.read_table(Path(index) / "features.parquet")
    rows = table.select(["feature", "examples"]).to_pylist()
    return [row["feature"] for row in rows if len(strongest(row, shown)) == shown]


def strongest(row: dict[str, Any], shown: int) -> list[dict[str, Any]]:
    """The strongest contexts of a feature in which it fires, one of each sample."""
    found: dict[int, dict[str, Any]] = {}
    for one in row["examples"]:
        if one["kind"] != "sample" and one["value"] > found.get(one["sample_id"], {"value": 0.0})["value"]:
            found[one["sample_id"]] = one
    return sorted(found.values(), key=lambda one: -one["value"])[:shown]


def question(examples: Sequence[dict[str, Any]]) -> str:
    """Contexts as the judge sees them: tokens and values in turn."""
    lines = []
    for number, one in enumerate(examples, 1):
        pairs = zip(one["tokens"], one["values"], strict=True)
        lines.append(
            f"{number}. " + " ".join(f"{passage({'tokens': [token]})!r} {value:.3g}" for token, value in pairs)
        )
    return "\n".join(lines)


def rate(chat: Chat, examples: Sequence[dict[str, Any]]) -> tuple[int | None, str]:
    """The score and the name a judge gives to contexts."""
    answer = chat([{"role": "system", "content": RUBRIC}, {"role": "user", "content": question(examples)}])
    score = re.search(r"\[\[\s*([1-5])\s*\]\]", answer)
    name = re.search(r"name\s*:?\s*\[\[(.*?)\]\]", answer, re.S | re.I)
    return int(score[1]) if score else None, " ".join(name[1].split())[:300] if name else ""


def rate_features(
    index: str | Path,
    chat: Chat,
    author: str,
    *,
    count: int = 128,
    shown: int = 5,
    seed: int = 0,
) -> list[Rating]:
    """Rate `count` features of an index drawn at random; a run that was stopped goes on behind the last one.

    The control of a feature are the strongest contexts of `shown` other features, one of each.
    """
    index, random = Path(index), np.random.default_rng(seed)
    settings = f"{author} shown={shown} seed={seed}"
    usable = rateable(index, shown)
    chosen = sorted(random.permutation(usable)[:count].tolist())
    contexts = Contexts(index)

    def ask(feature: int, _: dict[int, dict[str, Any]]) -> dict[str, Any]:
        others = [f for f in np.random.default_rng([seed, feature]).permutation(usable).tolist() if f != feature]
        mixed = [strongest(contexts.of(f), 1)[0] for f in others[:shown]]
        score, name = rate(chat, strongest(contexts.of(feature), shown))
        control = rate(chat, mixed)[0] if len(mixed) == shown else None
        return asdict(Rating(feature, score, name, control, settings))

    return [Rating(**row) for row in each_once(index / JOURNAL, settings, chosen, ask, "rating", False)]


def shares(ratings: Sequence[Rating]) -> list[dict[str, Any]]:
    """How many features the judge calls clear, with an interval (Wilson), and how many of the controls.

    >>> ratings = [Rating(i, 5 if i < 27 else 2, "", 2, "") for i in range(128)]
    >>> row = shares(ratings)[0]
    >>> row["clear"], round(row["low"], 2), round(row["high"], 2)
    (0.2109375, 0.15, 0.29)
    """
    out = []
    for what in ("score", "control"):
        scores = [value for one in ratings if (value := getattr(one, what)) is not None]
        clear = sum(score >= CLEAR for score in scores)
        low, high = wilson(clear, len(scores))
        out.append(
            {
                "contexts": "of one feature" if what == "score" else "of different features (control)",
                "features": len(scores),
                "unread": len(ratings) - len(scores),
                "clear": clear / len(scores) if scores else None,
                "low": low,
                "high": high,
                "mean": float(np.mean(scores)) if scores else None,
            }
            | {f"score_{n}": scores.count(n) for n in range(1, 6)}
        )
    return out
