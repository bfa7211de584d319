"""The report: verdicts only where there is a band, tables that are files too."""

from __future__ import annotations

from pathlib import Path

from hubsae.core.files import read_csv
from hubsae.recipes.registry import find_recipe
from hubsae.recipes.report import Report, markdown_table

verdicts = find_recipe("rl_chain").module("verdicts")
Band, compare, summary_of = verdicts.Band, verdicts.compare, verdicts.summary_of

PUBLISHED = [
    {"layer": "6", "stage": "base", "mse": "0.0238", "n_dead": "43"},
    {"layer": "12", "stage": "base", "mse": "0.0408", "n_dead": ""},
]
BANDS = [Band({"layer": 6, "stage": "base"}, "mse", 0.0235, 0.0251)]


def compared(mse6: float | None):
    ours = [{"layer": 6, "stage": "base", "mse": mse6, "n_dead": 50}, {"layer": 12, "stage": "base", "mse": 0.05}]
    return compare(ours, PUBLISHED, keys=["layer", "stage"], metrics=["mse", "n_dead"], bands=BANDS)


def test_verdicts():
    assert [row["verdict"] for row in compared(0.0235)] == ["in band", "no band", "no band"]
    assert compared(0.0234)[0]["verdict"] == "below band"
    assert compared(0.0252)[0]["verdict"] == "above band"
    assert compared(None)[0]["verdict"] == "not measured"


def test_each_row_carries_both_numbers_and_the_band():
    row = compared(0.024)[0]
    assert (row["published"], row["low"], row["high"], row["measured"]) == (0.0238, 0.0235, 0.0251, 0.024)
    assert summary_of(compared(0.024)) == "1 in band, 2 no band"


def test_a_table_is_a_file_with_all_rows_and_a_page_with_some(tmp_path: Path):
    report = Report("Run")
    report.heading("Results")
    report.table("All", "results", [{"n": i, "x": i / 3} for i in range(10)], columns=["x"], most=2)
    report.figure("drift", "../plots/drift.png")
    text = report.write(tmp_path).read_text()
    assert len(read_csv(tmp_path / "results.csv")) == 10
    assert "| 0.3333 |" in text and "The other 8 rows" in text and "| n |" not in text
    assert "![drift](../plots/drift.png)" in text


def test_cells_do_not_break_the_table():
    assert markdown_table([{"a": "x|y", "b": None, "c": True}]).split("\n")[-1] == "| x\\|y | - | yes |"
