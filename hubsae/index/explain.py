"""Labels from a chat model, scored: it names a feature from its strongest contexts and is judged on others.

As delphi defines the scores. Detection: the judge reads plain contexts, in half of which the feature fires, and says
for each whether the label fits. Fuzzing: in every context it fires, and tokens are marked, in half of them those on
which it fires, in the other half as many others; the judge says whether the marks fit. Both are balanced accuracies:
0.5 is guessing. Control: the same contexts, judged under the label of another feature.

Contexts without the feature are drawn from those of other features, of other samples. That it does not fire there is
not known but likely: features that fire on more than `MAX_DENSITY` of the tokens are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.errors import HubSAEError
from hubsae.core.parquet import arrow
from hubsae.index.chat import Chat, each_once
from hubsae.index.labels import Label, write

JOURNAL = "explanations.jsonl"
MAX_DENSITY = 0.01
MARKED = 0.3  # of the strongest value of a context: tokens above are marked
BATCH = 10  # contexts in one question to the judge
EXPLAIN = (
    "A feature inside a language model fires on some tokens. You see passages in which it fires; the tokens on which "
    "it does are marked «like this». Say what the marked tokens have in common, with their surroundings where these "
    "matter: one line, at most 20 words, no introduction. Answer in the form\nLabel: ..."
)
DETECT = (
    "You see a description of some property of text, then numbered passages. For each passage say 1 if some part of it "
    "has the property, else 0. Answer with a JSON list alone, such as [1, 0, 1]."
)
FUZZ = (
    "You see a description of some property of text, then numbered passages with tokens marked «like this». For each "
    "passage say 1 if the marked tokens have the property, else 0. Answer with a JSON list alone, such as [1, 0, 1]."
)


@dataclass(frozen=True)
class Score:
    """A balanced accuracy with its 95 % interval, from `n` judgements; `missing` ones had no readable answer."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    missing: int = 0


@dataclass(frozen=True)
class Explained:
    """One feature: its label and how well others can use it."""

    feature: int
    text: str
    detection: Score
    fuzzing: Score
    control_detection: Score
    control_fuzzing: Score
    author: str
    settings: str


@dataclass(frozen=True)
class Plan:
    """What a run would ask."""

    features: list[int]
    calls: int
    characters: int
    """About how many characters the questions have in all"""


# ---- contexts --------------------------------------------------------------------------------------------------


class Contexts:
    """The examples of an index, one row group in memory at a time."""

    def __init__(self, index: Path):
        self.file = arrow().parquet.ParquetFile(index / "features.parquet")
        groups = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(groups)])
        self.held: tuple[int, list[dict[str, Any]]] = (-1, [])

    def group(self, feature: int) -> list[dict[str, Any]]:
        """The rows of the row group that holds a feature."""
        place = int(np.searchsorted(self.starts, feature, side="right")) - 1
        if self.held[0] != place:
            columns = ["feature", "count", "density", "examples"]
            self.held = place, self.file.read_row_group(place, columns=columns).to_pylist()
        return self.held[1]

    def of(self, feature: int) -> dict[str, Any]:
        """One row."""
        return next(row for row in self.group(feature) if row["feature"] == feature)

    def others(self, row: dict[str, Any], count: int, random: np.random.Generator) -> list[dict[str, Any]]:
        """Examples of other features, from samples in which this one has none."""
        own = {one["sample_id"] for one in row["examples"]}
        pool = [
            one
            for other in self.group(row["feature"])
            if other["feature"] != row["feature"]
            for one in other["examples"]
            if one["sample_id"] not in own or one["sample_id"] < 0
        ]
        picked = random.permutation(len(pool))[:count]
        return [pool[i] for i in picked]


def split(row: dict[str, Any], shown: int, judged: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Contexts to explain from (the strongest) and to judge on (drawn at random, if some were), never the same."""
    drawn = [one for one in row["examples"] if one["kind"] == "sample"]
    strong = [one for one in row["examples"] if one["kind"] != "sample"]
    judge = drawn[:judged] if len(drawn) >= 2 else strong[1::2][:judged]
    taken = {(one["sample_id"], one["position"]) for one in judge}
    return [one for one in strong if (one["sample_id"], one["position"]) not in taken][:shown], judge


def passage(one: dict[str, Any], marks: set[int] | None = None) -> str:
    """A context as text, on one line, with marks where asked."""
    parts = [f"«{token}»" if marks and i in marks else token for i, token in enumerate(one["tokens"])]
    return "".join(parts).replace("\n", "⏎").replace("»«", "")


def firing(one: dict[str, Any]) -> set[int]:
    """The tokens to mark: those above a share of the strongest."""
    most = max((abs(v) for v in one["values"]), default=0.0)
    return {i for i, v in enumerate(one["values"]) if most and abs(v) >= MARKED * most}


def _misplaced(one: dict[str, Any], random: np.random.Generator) -> set[int]:
    """As many marks on tokens where it does not fire."""
    silent = [i for i, v in enumerate(one["values"]) if v == 0]
    count = min(len(firing(one)), len(silent))
    return {silent[i] for i in random.permutation(len(silent))[:count]}


# ---- asking ----------------------------------------------------------------------------------------------------


def label_of(chat: Chat, examples: Sequence[dict[str, Any]]) -> str:
    """One line that says what the marked tokens have in common."""
    text = "\n".join(f"{i}. {passage(one, firing(one))}" for i, one in enumerate(examples, 1))
    answer = chat([{"role": "system", "content": EXPLAIN}, {"role": "user", "content": text}])
    found = re.search(r"label\s*:\s*(.+)", answer, re.I)
    line = (found[1] if found else answer.strip().split("\n")[0]).strip().strip('"*')
    return " ".join(line.split())[:300]


def judge(
    chat: Chat, question: str, label: str, passages: Sequence[tuple[str, bool]], random: np.random.Generator
) -> Score:
    """Balanced accuracy of the judge over passages with the right answers, asked in batches in mixed order."""
    order = random.permutation(len(passages))
    right: dict[bool, list[int]] = {True: [], False: []}
    missing = 0
    for start in range(0, len(order), BATCH):
        batch = [passages[i] for i in order[start : start + BATCH]]
        text = "\n".join(f"{i}. {shown}" for i, (shown, _) in enumerate(batch, 1))
        content = f"Property: {label}\n\n{text}"
        answer = chat([{"role": "system", "content": question}, {"role": "user", "content": content}])
        said = _answers(answer, len(batch))
        if said is None:
            missing += len(batch)
            continue
        for (_, truth), told in zip(batch, said, strict=True):
            right[truth].append(int(told == truth))
    return _score(right[True], right[False], missing, random)


def _answers(text: str, count: int) -> list[bool] | None:
    """The last list of 0 and 1 of the right length in an answer."""
    for found in reversed(re.findall(r"\[([01,\s]*)\]", text)):
        said = re.findall(r"[01]", found)
        if len(said) == count:
            return [word == "1" for word in said]
    return None


def _score(yes: list[int], no: list[int], missing: int, random: np.random.Generator) -> Score:
    """With a bootstrap within each class; no score where a class is empty."""
    if not yes or not no:
        return Score(None, None, None, len(yes) + len(no), missing)
    hits, rejections = np.array(yes), np.array(no)
    draws = [side[random.integers(0, len(side), (1000, len(side)))].mean(1) for side in (hits, rejections)]
    low, high = np.percentile((draws[0] + draws[1]) / 2, [2.5, 97.5])
    value = (hits.mean() + rejections.mean()) / 2
    return Score(float(value), float(low), float(high), len(yes) + len(no), missing)


# ---- a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How much is shown and asked."""

    shown: int = 10
    """Contexts that the model explains from"""
    judged: int = 10
    """Contexts with the feature that the judge sees, and as many without"""
    seed: int = 0

    @property
    def calls(self) -> int:
        """Questions per feature: the label, then two scores and their two controls."""
        return 1 + 4 * math.ceil(2 * self.judged / BATCH)


def plan(
    index: str | Path, features: Sequence[int] | None = None, *, count: int = 100, options: Options | None = None
) -> Plan:
    """Which features a run explains (those named, or some drawn at random) and what it asks at most."""
    options = options or Options()
    index = Path(index)
    pq = arrow().parquet
    table = pq.read_table(index / "summary.parquet", columns=["feature", "count", "density"])
    n, fires, density = (table[name].to_numpy() for name in ("feature", "count", "density"))
    usable = n[(fires >= 4) & (density <= MAX_DENSITY)]
    if features is None:
        usable = np.random.default_rng(options.seed).permutation(usable)[:count]
        features = sorted(int(f) for f in usable)
    elif unfit := sorted(set(features) - set(usable.tolist())):
        raise HubSAEError(
            f"these features fire on fewer than 4 tokens or on more than {MAX_DENSITY:.0%} of them: {unfit[:10]}"
        )
    contexts = Contexts(index)
    lengths = [len(passage(one)) for f in features[:20] for one in contexts.of(f)["examples"]]
    length = float(np.mean(lengths)) if lengths else 0.0
    each = options.shown * length + len(EXPLAIN) + (options.calls - 1) * (len(FUZZ) + BATCH * length)
    return Plan(list(features), options.calls * len(features), int(each * len(features)))


def explain(
    index: str | Path,
    chat: Chat,
    author: str,
    wanted: Plan,
    *,
    options: Options | None = None,
    show: bool | None = None,
) -> list[Explained]:
    """Label the planned features, score the labels, and write them into the index.

    Every finished feature is kept in `explanations.jsonl` beside the index: a run that was stopped, by hand or because
    the model did not answer, goes on behind the last one.
    """
    index, options = Path(index), options or Options()
    settings = f"{author} shown={options.shown} judged={options.judged} seed={options.seed}"
    contexts, texts = Contexts(index), {}

    def labelled(feature: int) -> str:
        return label_of(chat, split(contexts.of(feature), options.shown, options.judged)[0])

    def control(feature: int, done: dict[int, dict[str, Any]]) -> str:
        """The label of the feature before this one in the plan (of the last for the first)."""
        other = wanted.features[wanted.features.index(feature) - 1]
        if other == feature:
            return ""  # one feature alone has no control
        if other in done:
            return done[other]["text"]
        if other not in texts:
            texts[other] = labelled(other)
        return texts[other]

    def ask(feature: int, done: dict[int, dict[str, Any]]) -> dict[str, Any]:
        other = control(feature, done)
        text = texts.pop(feature, None) or labelled(feature)
        random = np.random.default_rng([options.seed, feature])
        scores = _scores(chat, contexts, contexts.of(feature), (text, other), options, random)
        return asdict(Explained(feature, text, *scores, author=author, settings=settings))

    rows = each_once(index / JOURNAL, settings, wanted.features, ask, "explaining", show)
    names = ("detection", "fuzzing", "control_detection", "control_fuzzing")
    found = [Explained(**{**row, **{name: Score(**row[name]) for name in names}}) for row in rows]
    write(index, (_as_label(one) for one in found if one.text))
    return found


def _scores(
    chat: Chat, contexts: Contexts, row: dict[str, Any], labels: Sequence[str], options: Options,
    random: np.random.Generator,
) -> list[Score]:  # fmt: skip
    """Detection and fuzzing of a feature under each label."""
    held = split(row, options.shown, options.judged)[1]
    plain = [(passage(one), True) for one in held]
    plain += [(passage(one), False) for one in contexts.others(row, len(held), random)]
    half = len(held) // 2
    marked = [(passage(one, firing(one)), True) for one in held[half:]]
    marked += [(passage(one, marks), False) for one in held[:half] if (marks := _misplaced(one, random))]
    return [
        judge(chat, question, label, passages, random) if label else Score(None, None, None, 0)
        for label in labels
        for question, passages in ((DETECT, plain), (FUZZ, marked))
    ]


def _as_label(one: Explained) -> Label:
    score = one.detection
    return Label(
        one.feature, one.text, one.author, "detection", score.value, score.low, score.high, score.n,
        date.today().isoformat(),
    )  # fmt: skip


def summary(found: Sequence[Explained]) -> dict[str, dict[str, float | int | None]]:
    """Mean scores over features, and of their controls, with a bootstrap interval over features."""
    random = np.random.default_rng(0)
    out: dict[str, dict[str, float | int | None]] = {}
    for name in ("detection", "control_detection", "fuzzing", "control_fuzzing"):
        values = np.array([s.value for one in found if (s := getattr(one, name)).value is not None])
        judged = sum(getattr(one, name).n for one in found)
        if not len(values):
            out[name] = {"mean": None, "low": None, "high": None, "features": 0, "judgements": judged}
            continue
        means = values[random.integers(0, len(values), (2000, len(values)))].mean(1)
        low, high = np.percentile(means, [2.5, 97.5])
        out[name] = {
            "mean": float(values.mean()), "low": float(low), "high": float(high), "features": len(values),
            "judgements": judged,
        }  # fmt: skip
    return out
