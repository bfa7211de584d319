"""What the published tables support, read from the tables alone."""

import csv
from dataclasses import replace

import pytest

from hubsae.core.errors import DataError, FormatError
from hubsae.core.files import read_csv
from hubsae.recipes.registry import find_recipe

tables = find_recipe("rl_chain").module("tables")
analyse_table, compare_chains = tables.analyse_table, tables.compare_chains
find_table, half_unit = tables.find_table, tables.half_unit
grid = find_recipe("grid_search").module("published")

CHAINS, GRID = "chains_reconstruction.csv", "grid_layer12.csv"


@pytest.mark.parametrize(("layer", "k", "end_to_end", "at_116"), [(18, 64, 1.25, 0.74), (23, 256, 1.37, 1.30)])
def test_strict_over_flexible_end_to_end_and_at_matched_step(layer, k, end_to_end, at_116):
    full = compare_chains(CHAINS, "strict", "flexible", layer, k, matched=False)
    matched = compare_chains(CHAINS, "strict", "flexible", layer, k, matched=True)
    assert round(full.ratio, 2) == end_to_end
    assert round(matched.ratio, 2) == at_116
    assert (full.steps_a, full.steps_b, matched.steps_a, matched.steps_b) == (116, 200, 116, 116)
    for ratio in (full, matched):
        low, high = ratio.interval
        assert low < ratio.ratio < high and high - low < 0.02


def test_the_two_chains_are_not_within_three_percent():
    findings = [f for f in analyse_table(CHAINS).findings if "strict over flexible" in f["finding"]]
    assert len(findings) == 2
    assert all(abs(f["end_to_end"] - 1) > 0.03 and abs(f["matched"] - 1) > 0.03 for f in findings)


def test_one_sae_on_two_validation_sets_is_noticed():
    found = [f for f in analyse_table(CHAINS).findings if "different validation sets" in f["finding"]]
    assert [f["n_dead"] for f in found] == [
        {"flexible": 43, "strict": 170},
        {"flexible": 80, "strict": 258},
        {"flexible": 29, "strict": 109},
    ]


def test_the_denominator_of_nmse_differs_between_layers():
    [found] = [f for f in analyse_table(CHAINS).findings if "not comparable across layers" in f["finding"]]
    variance = found["implied_variance_by_layer"]
    assert variance[6][0] > 45 and variance[18][1] < 48.5 and variance[23][1] < 3.6


def test_chains_without_a_usable_base_get_no_rate():
    report = analyse_table(CHAINS)
    text = " ".join(f["finding"] for f in report.findings if "no rate is taken" in f["finding"])
    assert "sft layer 23 k 64" in text and "sft layer 6 k 64" in text
    assert not any(row["chain"] == "sft" for row in report.tables["rates"])


def test_the_shuffled_control_shows_most_of_the_fall():
    rows = analyse_table(CHAINS).tables["less_control"]
    shares = {(r["chain"], r["layer"]): r["share_in_control"] for r in rows}
    assert shares["flexible", 18] == pytest.approx((0.003666 - 0.003334) / (0.003844 - 0.003428))
    assert sum(share >= 0.75 for share in shares.values()) == 10 and len(shares) == 11


def test_retraining_the_base_spreads_by_a_quarter_of_what_the_strict_chain_changes_at_layer_18():
    rows = {(r["chain"], r["layer"], r["k"]): r for r in analyse_table(CHAINS).tables["replicate_spread"]}
    row = rows["strict", 18, 64]
    assert row["base_trainings"] == 3
    assert row["spread_over_delta"] == pytest.approx((0.003666 - 0.003580) / (0.003580 - 0.003256))


def test_grid_counts():
    both = grid.pairs(grid.published_rows())
    assert len(both) == 12
    assert {(b.expansion, b.k) for b, t in both if b.mse < t.mse} == {(4, 128), (4, 220)}
    assert [(b.expansion, b.k) for b, t in both if b.dead >= t.dead] == [(16, 64)]
    claim = next(f for f in analyse_table(GRID).findings if f["finding"].startswith("BatchTopK is better than TopK"))
    assert claim["holds"] is False and "TopK is ahead in 10 of 12 matched cells" in claim["finding"]


def test_published_frac_rec_is_base_loss_over_sae_loss_and_flagged():
    base, misfit = grid.implied_base_loss(grid.published_rows())
    assert base == pytest.approx(3.2097, abs=0.001) and misfit < 1e-4
    [flag] = [f for f in analyse_table(GRID).findings if f["verdict"] == "not what it says"]
    assert "L_base / L_sae with L_base = 3.21 in all 36 rows" in flag["finding"] and flag["holds"] is False


def test_a_true_recovered_fraction_is_not_mistaken_for_the_ratio():
    # against an ablation of 10 nats
    rows = [replace(row, frac_rec=1 - row.delta_loss / (10 - 3.2097)) for row in grid.published_rows()]
    assert grid.implied_base_loss(rows)[1] > 0.01


def test_instruct_win_counts():
    report = analyse_table("instruct_reconstruction.csv")
    wins = {(row["SAE"], row["error"]): [row[f"lowest: {name}"] for name in ("FAST", "BT(F)", "BT(P)")]
            for row in report.tables["wins"]}  # fmt: skip
    assert wins["standard", "MSE"] == [31, 9, 0] and wins["jumprelu", "MSE"] == [34, 5, 1]
    assert wins["standard", "MSE_st"][0] == 37 and wins["jumprelu", "MSE_st"][0] == 40
    assert "standard, MSE: lowest in FAST 31, BT(F) 9, BT(P) 0 of 40 settings" in report.findings[0]["finding"]


def test_a_table_that_lacks_a_method_says_which():
    published = find_recipe("fast").module("published")
    rows = [row for row in read_csv(published.CSV) if row["method"] != "sequential"]
    with pytest.raises(FormatError, match="no FAST for"):
        published.table(rows)


def test_accuracy_never_reaches_seventy_percent():
    runs = analyse_table("chains_accuracy.csv").tables["runs"]
    assert max(run["best"] for run in runs) < 0.59


def test_decoder_drift_per_step():
    rows = analyse_table("chains_decoder_cosine.csv").tables["decoder_drift"]
    first = next(r for r in rows if (r["chain"], r["layer"], r["from_step"]) == ("strict", "6", "0"))
    assert first["drift_per_step"] == pytest.approx((1 - 0.842) / 10)


@pytest.mark.parametrize(("text", "half"), [(".003844", 5e-7), ("59.06", 5e-3), ("1.41e-05", 5e-8), ("12", 0.5)])
def test_half_a_unit_of_the_last_place(text, half):
    assert half_unit(text) == pytest.approx(half)


def test_a_report_is_written_whole(tmp_path):
    written = analyse_table(CHAINS).write(tmp_path)
    assert {p.name for p in written} >= {"rates.csv", "comparisons.csv", "findings.json"}
    with open(tmp_path / "comparisons.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    match = [
        r
        for r in rows
        if (r["chain_a"], r["chain_b"], r["layer"], r["comparison"]) == ("strict", "flexible", "18", "end_to_end")
    ]
    assert round(float(match[0]["ratio_of_rates"]), 2) == 1.25


def test_unknown_tables_say_what_is_expected(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(FormatError, match="a table with the columns"):
        analyse_table(other)
    other.write_text("a,b\n")
    with pytest.raises(FormatError, match="empty"):
        analyse_table(other)
    with pytest.raises(FormatError, match="bundled tables: chains_accuracy"):
        find_table("nothing.csv")
    with pytest.raises(DataError, match="no chain nobody"):
        compare_chains(CHAINS, "nobody", "flexible", 18, 64, matched=True)
