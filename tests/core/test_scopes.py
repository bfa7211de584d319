"""Scopes: what a text means, and which rows it holds for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError, DataError
from hubsae.core.metadata import Metadata
from hubsae.core.scopes import ALL, excluding, parse

LABELS = {
    "position": np.array([0, 1, 2, 0, 1]),
    "is_prompt": np.array([1, 1, 0, 1, 0], dtype=bool),
    "is_special": torch.tensor([True, False, False, True, False]),
    "role": np.array(["system", "user", "assistant", "user", "assistant"], dtype=object),
    "turn": np.array([0, 1, 2, 0, 1]),
    "norm": np.array([900.0, 5.0, 6.0, 800.0, 70.0], dtype=np.float32),
}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("position_0", [0, 3]),
        ("not position_0", [1, 2, 4]),
        ("no_position_0", [1, 2, 4]),
        ("prompt_no_position_0", [1]),
        ("prompt", [0, 1, 3]),
        ("response", [2, 4]),
        ("not response & special", [0, 3]),
        ("special", [0, 3]),
        ("is_special", [0, 3]),
        ("role=user", [1, 3]),
        ("role = user & not position_0", [1]),
        ("not role=user", [0, 2, 4]),
        ("turn=1", [1, 4]),
        ("is_prompt=false", [2, 4]),
        ("massive", [0, 3, 4]),
    ],
)
def test_a_scope_holds_for_the_rows_it_names(text: str, rows: list[int]) -> None:
    assert np.flatnonzero(parse(text, massive_above=50.0).mask(LABELS)).tolist() == rows


def test_every_spelling_of_a_scope_has_one_name() -> None:
    assert parse("not special&prompt & not  position_0 & prompt").name == "prompt & not position_0 & not special"
    assert excluding(["special", "position_0"]).name == excluding(["position_0", "special", "special"]).name
    assert excluding(["role=system"]).name == "not role=system"
    assert parse("all").name == ALL.name == excluding([]).name == "all"
    assert (parse("prompt") & parse("not position_0")) == parse("prompt_no_position_0")


_terms = st.sampled_from(["position_0", "not position_0", "prompt", "not special", "role=user", "turn=1", "response"])


@given(st.lists(_terms, min_size=1, max_size=4), st.randoms())
def test_order_and_repetition_of_terms_change_nothing(terms: list[str], random) -> None:
    scope = parse(" & ".join(terms))
    again = terms + terms[:1]
    random.shuffle(again)
    assert parse(" & ".join(again)) == scope
    assert parse(scope.name) == scope
    expected = np.logical_and.reduce([parse(term).mask(LABELS) for term in terms])
    assert (scope.mask(LABELS) == expected).all()


@pytest.mark.parametrize("text", ["", "not", "position_0 &", "a b", "not all", "=user", "prompt | response"])
def test_what_is_no_scope_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_a_missing_column_a_missing_bound_and_a_wrong_kind_are_named() -> None:
    with pytest.raises(DataError, match="'stage'"):
        parse("stage=base").mask(LABELS)
    with pytest.raises(DataError, match="massive"):
        parse("not massive").mask(LABELS)
    with pytest.raises(DataError, match="not true or false"):
        parse("role").mask(LABELS)
    with pytest.raises(DataError, match="number of rows"):
        ALL.mask({})
    assert ALL.mask({}, rows=3).tolist() == [True, True, True]


def test_an_sae_knows_its_own_scope() -> None:
    record = Metadata(config=SAEConfig(architecture="topk", d_in=8, d_sae=32, k=4))
    assert record.own_scope == "all"
    record.training.exclude = ["special", "position_0", "massive"]
    record.training.massive_above = 1700.0
    again = Metadata.from_dict(record.to_dict())
    assert again.own_scope == "not massive & not position_0 & not special"
    assert excluding(again.training.exclude, again.training.massive_above).mask(LABELS).tolist() == [
        False, True, True, False, True,
    ]  # fmt: skip
