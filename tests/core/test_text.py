"""Small things that exist once: stages, orders, sizes, harmless text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubsae.core import text
from hubsae.core.errors import HubSAEError


@pytest.mark.parametrize(
    ("stage", "step"),
    [("ppo_step116", 116), ("checkpoint-500", 500), ("instruct_base", 0), ("base", 0), ("Base", 0), ("final", None),
     ("", None), (None, None), ("rloo_step7", 7), ("database", None), ("stage_2", 2)],
)  # fmt: skip
def test_a_stage_says_its_step_one_way(stage, step):
    assert text.stage_step(stage) == step


def test_stages_sort_by_step_and_the_rest_behind():
    names = ["ppo_step116", "final", "ppo_step30", "instruct_base", "best", "ppo_step9"]
    assert sorted(names, key=text.stage_order) == [
        "instruct_base", "ppo_step9", "ppo_step30", "ppo_step116", "best", "final",
    ]  # fmt: skip


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (999, "999 B"), (999_960, "1.0 MB"), (2.3e12, "2.3 TB")])
def test_sizes(size, shown):
    assert text.format_bytes(size) == shown


@given(st.text())
def test_printable_leaves_nothing_that_moves_a_cursor_or_turns_text(value):
    shown = text.printable(value)
    assert "\x1b" not in shown and "\u202e" not in shown and "\n" not in shown
    shown.encode("utf-8")  # no lone surrogate is left
    assert text.printable(shown) == shown


def test_names_with_escapes_are_refused_and_shown_harmless():
    with pytest.raises(HubSAEError, match=r"\\x1b"):
        text.check_name("layer\x1b[2J", "id")
