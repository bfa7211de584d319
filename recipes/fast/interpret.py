"""Features read by a judge: the published rubric, detection and fuzzing, each beside a control.

`RuleJudge` answers the same questions without a model: a feature is named after the token on which it is strongest, and
a passage has the property where that token stands in it. It is a floor: a chat model that does no better has read
nothing in the contexts but that token.
"""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubsae.core.errors import HubSAEError
from hubsae.index import explain, rubric
from hubsae.index.chat import Chat, LocalChat, ServerChat

from .measure import split_id
from .settings import LABELS, Judge

RULE = "rule: the strongest token"
_PAIR = re.compile(r"('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\") (-?[\d.e+-]+|nan)(?: |$)")


class RuleJudge:
    """Answers the questions of `explain` and `rubric` by the strongest tokens alone."""

    def __call__(self, messages: list[dict[str, str]]) -> str:
        """An answer in the form that was asked for."""
        asked, text = (message["content"] for message in messages)
        if asked == rubric.RUBRIC:
            tops = [self._top(line.partition(". ")[2]) for line in text.splitlines()]
            token, count = Counter(tops).most_common(1)[0]
            deviating = len(tops) - count
            score = 5 if not deviating else 4 if deviating <= len(tops) // 3 else 3 if count > 1 else 1
            return f"verdict score [[{score}]], feature name [[{token}]]"
        if asked == explain.EXPLAIN:
            marked = Counter(re.findall("«(.+?)»", text))
            return f"Label: {marked.most_common(1)[0][0].strip() or 'space' if marked else '?'}"
        label, _, passages = text.partition("\n\n")
        word = label.removeprefix("Property: ").strip()
        lines = [line.partition(". ")[2] for line in passages.splitlines()]
        shown = [re.findall("«(.+?)»", line) if asked == explain.FUZZ else [line] for line in lines]
        return str([int(any(word in part for part in parts)) for parts in shown])

    @staticmethod
    def _top(line: str) -> str:
        pairs = [(ast.literal_eval(token), float(value)) for token, value in _PAIR.findall(line)]
        return max(pairs, key=lambda pair: pair[1])[0].strip() if pairs else ""


def open_judge(judge: Judge) -> tuple[Chat | None, str]:
    """The judge that settings name, and its name."""
    if judge.model == "none":
        return None, "none"
    if judge.model == "rule":
        return RuleJudge(), RULE
    if judge.server:
        return ServerChat(judge.server, judge.model, os.environ.get("OPENAI_API_KEY")), judge.model
    return LocalChat(judge.model), judge.model


def read_features(
    indexes: Mapping[str, Path], judge: Judge, *, features: int, shown: int, scored: int, seed: int, progress: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rubric's shares and the mean scores of each index, by SAE."""
    chat, author = open_judge(judge)
    ratings, scores = [], []
    for number, (name, index) in enumerate(indexes.items()) if chat is not None else ():
        assert chat is not None
        progress(number, len(indexes), name)
        method, cell = split_id(name)
        about = {"method": LABELS[method], "kind": cell.kind, "id": name}
        found = rubric.rate_features(index, chat, author, count=features, shown=shown, seed=seed)
        ratings += [about | row for row in rubric.shares(found)]
        try:
            wanted = explain.plan(index, count=scored, options=explain.Options(seed=seed))
        except HubSAEError:
            continue
        if scored and wanted.features:
            made = explain.explain(index, chat, author, wanted, options=explain.Options(seed=seed), show=False)
            scores += [about | {"score": what} | row for what, row in explain.summary(made).items()]
    return ratings, scores
