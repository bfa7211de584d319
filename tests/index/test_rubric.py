"""Features rated on the published scale of five, beside contexts of different features, with any judge."""

from __future__ import annotations

import json

import pytest

from hubsae.index import rubric
from hubsae.index.chat import ChatError
from hubsae.index.explain import Contexts
from hubsae.index.page import build

from . import synthetic


@pytest.fixture
def index(tmp_path):
    folder = synthetic.write(tmp_path, d_sae=300, active=80, examples=1600)
    build(tmp_path)
    return folder


class Theme:
    """Says 5 where the strongest token of all contexts is one, else 1."""

    def __init__(self, stop_at: int | None = None):
        self.asked: list[str] = []
        self.stop_at = stop_at

    def __call__(self, messages):
        assert messages[0]["content"] == rubric.RUBRIC
        if self.stop_at is not None and len(self.asked) >= self.stop_at:
            raise ChatError("gone")
        self.asked.append(messages[1]["content"])
        tops = set()
        for line in messages[1]["content"].splitlines():
            pairs = line.partition(". ")[2].rsplit(" ", 1)
            tops.add(pairs[0])
        return f"verdict score [[{5 if len(tops) == 1 else 1}]], feature name [[{len(tops)} tops]]"


def test_a_judge_sees_the_strongest_contexts_each_of_another_sample_and_its_number_is_read(index):
    judge = Theme()
    found = rubric.rate_features(index, judge, "theme", count=12, shown=3, seed=3)
    assert len(found) == 12 and all(one.score in (1, 5) and one.control in (1, 5) for one in found)
    assert len(judge.asked) == 24 and all(len(text.splitlines()) == 3 for text in judge.asked)
    contexts = Contexts(index)
    for one in found:
        shown = rubric.strongest(contexts.of(one.feature), 3)
        assert len({c["sample_id"] for c in shown}) == 3 and shown[0]["value"] == max(c["value"] for c in shown) > 0
        assert rubric.question(shown) in judge.asked
    # the control's contexts are of features other than the one it stands beside, and of five different ones
    owners = {}
    for feature in rubric.rateable(index, 3):
        owners[rubric.question(rubric.strongest(contexts.of(feature), 1)).partition(". ")[2]] = feature
    controls = [
        t for t in judge.asked if t not in {rubric.question(rubric.strongest(contexts.of(o.feature), 3)) for o in found}
    ]
    assert len(controls) == 12
    for text, one in zip(controls, found, strict=True):
        of = [owners[line.partition(". ")[2]] for line in text.splitlines()]
        assert len(set(of)) == 3 and one.feature not in of


def test_a_run_that_was_stopped_goes_on_behind_the_last_feature_and_another_seed_draws_others(index):
    whole = rubric.rate_features(index, Theme(), "other", count=6, shown=3)
    (index / rubric.JOURNAL).unlink()
    with pytest.raises(ChatError):
        rubric.rate_features(index, Theme(stop_at=7), "other", count=6, shown=3)
    with (index / rubric.JOURNAL).open("a") as file:
        file.write('{"feature": 1, "sco')  # a crash
    judge = Theme()
    assert rubric.rate_features(index, judge, "other", count=6, shown=3) == whole
    assert len(judge.asked) == 6
    assert [one.feature for one in rubric.rate_features(index, Theme(), "other", count=6, shown=3, seed=1)] != [
        one.feature for one in whole
    ]


def test_an_answer_without_a_score_is_counted_and_not_guessed():
    assert rubric.rate(lambda messages: "verdict score [[4]], feature name [[full stops]]", []) == (4, "full stops")
    assert rubric.rate(lambda messages: "I would say 4", []) == (None, "")
    assert rubric.rate(lambda messages: "[[9]]", [])[0] is None
    ratings = [rubric.Rating(0, 4, "", 1, ""), rubric.Rating(1, None, "", 5, ""), rubric.Rating(2, 2, "", None, "")]
    of_one, control = rubric.shares(ratings)
    assert (of_one["features"], of_one["unread"], of_one["clear"], of_one["score_4"]) == (2, 1, 0.5, 1)
    assert (control["features"], control["clear"], control["mean"]) == (2, 0.5, 3.0)
    assert of_one["low"] < 0.5 < of_one["high"] and json.dumps(of_one)
    assert rubric.shares([])[0]["clear"] is None
