"""What every scorer extracts from 24 texts that tell them apart, and what counts as right."""

from __future__ import annotations

import pytest

from hubsae.core.errors import NotFoundError
from hubsae.rl.scorers import (
    SCORERS,
    compute_score,
    compute_score_strict,
    find_scorer,
    gold_of,
)

NONE, INVALID = None, "[invalid]"
LONG = "#### 5" + " and so it goes" * 30
ORDER = ("strict", "strict_first", "verl_flexible", "lm_eval_strict", "lm_eval_flexible", "flexible")

# text, then what each scorer extracts, in ORDER
TABLE = [
    ("#### 72", "72", "72", "72", "72", "72", "72"),
    ("####72", NONE, NONE, "72", INVALID, "72", "72"),
    ("#### $72", NONE, NONE, "72", INVALID, "72", "72"),
    ("#### **72**", NONE, NONE, "72", INVALID, "72", "72"),
    ("#### 1,000", "1000", "1000", "1,000", "1000", "1000", "1000"),
    ("#### 72.", "72.", "72.", "72.", "72", "72", "72"),
    ("#### 72.0", "72.0", "72.0", "72.0", "72.0", "72.0", "72.0"),
    ("#### 072", "072", "072", "072", "072", "072", "072"),
    ("#### -5", "-5", "-5", "-5", "-5", "-5", "-5"),
    ("#### 5 then #### 7", "7", "5", "7", "5", "7", "7"),
    ("#### 7\nI double-checked 2 times", "7", "7", "2", "7", "2", "2"),
    ("The answer is 72.", NONE, NONE, "72.", INVALID, "72", "72"),
    ("so 3,", NONE, NONE, "3,", INVALID, "3", "3"),
    ("$1,234.50", NONE, NONE, "1,234.50", INVALID, "1234.50", "1234.50"),
    ("10-3", NONE, NONE, "-3", INVALID, "-3", "3"),
    ("...", NONE, NONE, "...", INVALID, "..", NONE),
    ("##### 72", "72", "72", "72", "72", "72", "72"),
    ("#### 72 dollars", "72", "72", "72", "72", "72", "72"),
    ("#### ,", "", "", ",", "", INVALID, NONE),
    ("#### 1e3", "1", "1", "3", "1", "3", "3"),
    ("#### ٧٢", NONE, NONE, NONE, INVALID, INVALID, NONE),
    ("#### ７２", NONE, NONE, NONE, INVALID, INVALID, NONE),
    (LONG, NONE, "5", NONE, "5", "5", "5"),
    ("no number at all", NONE, NONE, NONE, INVALID, INVALID, NONE),
]


@pytest.mark.parametrize("row", TABLE, ids=[row[0][:24] for row in TABLE])
def test_extraction(row):
    text, *expected = row
    for name, want in zip(ORDER, expected, strict=True):
        got = SCORERS[name].extract(text)
        assert got == (None if want == INVALID else want), name


def test_a_stated_72_is_right_or_wrong_as_each_scorer_has_it():
    right = {
        "#### 72": set(ORDER),
        "####72": {"verl_flexible", "lm_eval_flexible", "flexible"},
        "#### 72.": {"lm_eval_strict", "lm_eval_flexible", "flexible"},
        "#### 72.0": {"flexible"},
        "#### 072": {"flexible"},
        "The answer is 72.": {"lm_eval_flexible", "flexible"},
        "The answer is $72": {"verl_flexible", "lm_eval_flexible", "flexible"},
        "#### 72 dollars": set(ORDER),
        "#### 73": set(),
        "": set(),
    }
    for text, names in right.items():
        assert {name for name in ORDER if SCORERS[name](text, "72") == 1.0} == names, text


def test_thousands_separators_make_verl_flexible_harsher_than_strict():
    assert SCORERS["strict"]("#### 1,000", "1000") == 1.0
    assert SCORERS["verl_flexible"]("#### 1,000", "1000") == 0.0
    assert SCORERS["flexible"]("#### 1,000", "1000") == 1.0


def test_verl_searches_exactly_the_last_300_characters():
    assert SCORERS["strict"]("#### 72" + "x" * 293, "72") == 1.0
    assert SCORERS["strict"]("#### 72" + "x" * 294, "72") == 0.0
    assert SCORERS["strict_first"]("#### 72" + "x" * 294, "72") == 1.0


def test_the_gold_of_lm_eval_is_the_whole_answer_text():
    answer = "70+2=72\n#### 72"
    assert gold_of(answer) == "72" and gold_of("1\n#### 1,234") == "1234"
    assert SCORERS["lm_eval_strict"]("so #### 72", answer) == 1.0
    assert SCORERS["lm_eval_flexible"]("so 72", answer) == 1.0
    assert SCORERS["lm_eval_flexible"]("so 70", answer) == 0.0


def test_only_the_flexible_scorer_compares_numbers():
    for gold in ("7", "7.0", "7.00"):
        assert SCORERS["flexible"]("it is 7", gold) == 1.0
    assert SCORERS["flexible"]("it is .5", "0.5") == 1.0
    assert SCORERS["flexible"]("it is -7", "7") == 0.0
    assert SCORERS["flexible"]("it is 7", "seven") == 0.0


@pytest.mark.parametrize("text", ["9" * 200_000, "#### " * 50_000, "1e999999999", "-" * 100_000 + "1", ",.$" * 100_000])
def test_hostile_answers_score_nothing_and_do_not_hang(text: str):
    for scorer in SCORERS.values():
        assert scorer(text, "72") == 0.0


def test_verl_calls_the_scorers_by_their_entry_points():
    call = {"data_source": "openai/gsm8k", "solution_str": "The answer is 72.", "ground_truth": "72"}
    assert compute_score(**call, extra_info={"index": 3}) == 1.0
    assert compute_score_strict(**call, extra_info=None, reward_router_address="x") == 0.0


def test_an_unknown_scorer_lists_the_known_ones():
    with pytest.raises(NotFoundError, match="lm_eval_strict"):
        find_scorer("loose")
