"""Analysis of a grid: paired comparisons, fronts, tables, findings, and the published rows against their claims."""

from __future__ import annotations

import numpy as np
import pytest

from hubsae.core.errors import ConfigError, DataError
from hubsae.recipes.registry import find_recipe

RECIPE = find_recipe("grid_search")
cells = RECIPE.module("cells")
paired = RECIPE.module("paired")
synthetic = RECIPE.module("synthetic")
table = RECIPE.module("table")
analysis = RECIPE.module("analysis")
findings = RECIPE.module("findings")
published = RECIPE.module("published")
Cell, parse_id = cells.Cell, cells.parse_id
Units, compare, compare_between, holm = paired.Units, paired.compare, paired.compare_between, paired.holm
matched, matched_by_l0, sign_test = paired.matched, paired.matched_by_l0, paired.sign_test
front = analysis.front
Recovery = synthetic.Recovery
GridRow, Number, read_results, write_results = table.GridRow, table.Number, table.read_results, table.write_results


def test_published_claims_are_held_against_their_own_rows() -> None:
    rows = published.published_rows()
    assert len(rows) == 36
    both = published.pairs(rows)
    assert len(both) == 12
    assert sum(t.mse < b.mse for b, t in both) == 10
    assert {(b.expansion, b.k) for b, t in both if b.mse < t.mse} == {(4, 128), (4, 220)}
    assert [(b.expansion, b.k) for b, t in both if b.dead >= t.dead] == [(16, 64)]
    wins, k64, sweet, jump, wide = published.claims(rows)
    assert (
        wins.verdict == "contradicted" and "TopK is ahead in 10 of 12" in wins.evidence and "11 of 12" in wins.evidence
    )
    assert k64.verdict == "supported" and "57.41" in k64.evidence
    assert sweet.verdict == "not what it says" and "L_base / L_sae" in sweet.evidence
    assert jump.verdict == "partly" and "7.9 to 56.5 %" in jump.evidence
    assert wide.verdict == "partly" and "+21.7" in wide.evidence


def test_published_frac_rec_is_base_loss_over_loss_in_every_row() -> None:
    rows = published.published_rows()
    base, misfit = published.implied_base_loss(rows)
    assert base == pytest.approx(3.2097, abs=2e-4)
    # the columns are printed to 0.01 %
    assert misfit < 1.1e-4
    assert published.implied_variance(rows) == pytest.approx((47.53, 47.53), abs=0.02)


def test_a_claim_about_other_rows_gets_another_verdict() -> None:
    rows = published.published_rows()
    swapped = [
        published.PublishedRow(
            {"TopK": "BatchTopK", "BatchTopK": "TopK"}.get(r.architecture, r.architecture),
            r.expansion, r.k, r.threshold, r.l0, 0.001 if r.architecture == "TopK" else r.mse, r.nmse,
            0.0 if r.architecture == "TopK" else r.dead, r.delta_loss, r.frac_rec,
        )
        for r in rows
    ]  # fmt: skip
    assert published.claims(swapped)[0].verdict == "supported"


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (Cell("topk", 8, 64), "TopK_exp8x_k64"),
        (Cell("batch_topk", 16, 220, 2), "BatchTopK_exp16x_k220_s2"),
        (Cell("jumprelu_fixed", 4, 0.5), "JumpReLU_exp4x_t0.5"),
        (Cell("jumprelu_fixed", 4, 1e-5), "JumpReLU_exp4x_t1e-05"),
        (Cell("jumprelu_trained", 1.5, 32), "JumpReLU-STE_exp1.5x_l32"),
    ],
)
def test_ids_and_cells_are_each_others_inverse(cell: Cell, name: str) -> None:
    assert cell.id == name
    assert parse_id(name) == cell


@pytest.mark.parametrize("name", ["TopK_exp8x_t0.5", "sae_layer12", "JumpReLU_exp8x_k64"])
def test_an_id_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not the id of a grid cell"):
        parse_id(name)


def test_a_small_paired_difference_is_found_where_the_cells_own_intervals_overlap() -> None:
    rng = np.random.default_rng(3)
    weight = rng.integers(20, 80, 120).astype(float)
    hard = rng.lognormal(0, 1, 120)
    a = Units(weight * (hard + 0.02 + rng.normal(0, 0.02, 120)), weight)
    b = Units(weight * hard, weight)
    found = compare("mse", ("a", "b"), a, b)
    assert found.verdict == "b" and 0 < found.low < found.difference < found.high
    # unpaired, the intervals of the two would overlap many times over
    own = paired.bootstrap.interval(np.stack([a.amount, a.weight], 1), lambda s: s[:, 0] / s[:, 1])
    assert own is not None and own[1] - own[0] > 10 * found.difference


def test_no_difference_is_decided_about_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(200):
        hard, weight = rng.lognormal(0, 0.5, 64), np.ones(64)
        noise = rng.normal(0, 0.1, (2, 64))
        found = compare("mse", ("a", "b"), Units(hard + noise[0], weight), Units(hard + noise[1], weight), 1000)
        decided += found.verdict != "open"
    assert 2 <= decided <= 24  # 10 expected of 200


def test_the_sign_test_is_exact() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for better, worse in ((0, 5), (7, 3), (6, 6), (60, 40), (1, 0)):
        assert sign_test(better, worse) == pytest.approx(scipy.binomtest(better, better + worse).pvalue)
    assert sign_test(0, 0) == 1.0


def test_holm_corrects_and_keeps_order() -> None:
    rng = np.random.default_rng(1)
    weight = np.ones(50)
    base = rng.lognormal(0, 1, 50)
    cells = [Units(base + shift + rng.normal(0, 0.1, 50), weight) for shift in (0.0, 0.05, 0.4)]
    raw = [compare("mse", (str(i), "base"), c, Units(base, weight)) for i, c in enumerate(cells)]
    fixed = holm(raw)
    assert [c.a for c in fixed] == ["0", "1", "2"]
    by_p = sorted(fixed, key=lambda c: c.p)
    assert by_p[0].p_holm == pytest.approx(min(1, 3 * by_p[0].p))
    assert [c.p_holm for c in by_p] == sorted(c.p_holm for c in by_p)


def test_cells_on_other_tokens_are_not_compared() -> None:
    with pytest.raises(DataError, match="cannot be paired"):
        compare("mse", ("a", "b"), Units(np.ones(4), np.ones(4)), Units(np.ones(4), np.full(4, 2.0)))
    with pytest.raises(DataError, match="too few"):
        compare("mse", ("a", "b"), Units(np.ones(1), np.ones(1)), Units(np.ones(1), np.ones(1)))


def test_between_two_cells_of_a_power_law_interpolation_is_exact() -> None:
    weight = np.full(30, 10.0)
    at = {l0: Units(np.linspace(1, 2, 30) * weight * l0**-0.7, weight) for l0 in (32.0, 50.0, 64.0)}
    share = np.log(50 / 32) / np.log(2)
    found = compare_between("mse", ("a", "b"), at[50.0], at[32.0], at[64.0], share, geometric=True)
    assert found.difference == pytest.approx(0, abs=1e-12)
    l0 = {Cell("topk", 8, 32): 32.0, Cell("topk", 8, 64): 64.0, Cell("jumprelu_trained", 8, 50): 50.0}
    units = {cell: at[value] for cell, value in l0.items()}
    matches = matched_by_l0("mse", units, l0, "jumprelu_trained", "topk", geometric=True)
    assert [m.a for m in matches] == ["JumpReLU-STE_exp8x_l50"]
    outside = {**l0, Cell("jumprelu_trained", 8, 50): 65.0}
    assert matched_by_l0("mse", units, outside, "jumprelu_trained", "topk", geometric=True) == []


def test_only_cells_that_differ_in_kind_alone_are_matched() -> None:
    units = {
        cell: Units(np.arange(1.0, 9.0), np.ones(8))
        for cell in (Cell("topk", 4, 32), Cell("topk", 8, 64), Cell("batch_topk", 4, 32), Cell("batch_topk", 8, 32))
    }
    assert [(c.a, c.b) for c in matched("mse", units, "batch_topk", "topk")] == [
        ("BatchTopK_exp4x_k32", "TopK_exp4x_k32")
    ]


def test_the_front_is_what_no_point_beats() -> None:
    rng = np.random.default_rng(0)
    points = [tuple(p) for p in rng.integers(0, 12, (60, 2)).tolist()]
    kept = {points[i] for i in front(points)}
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert kept == set(points) - beaten


def _grid() -> tuple[list[GridRow], dict[str, dict[Cell, Units]]]:
    """A grid in which BatchTopK is 10 % worse in error and wider is 5 % better."""
    rng = np.random.default_rng(5)
    hard, weight = rng.lognormal(0, 0.5, 100), rng.integers(30, 70, 100).astype(float)
    rows, mse, loss = [], {}, {}
    for kind, factor in (("topk", 1.0), ("batch_topk", 1.1), ("jumprelu_trained", 0.9)):
        for expansion in (2, 4):
            for k in (4, 8, 16):
                l0 = k * (1.05 if kind == "jumprelu_trained" else 1.0)
                error = factor * l0**-0.5 * 0.95**expansion
                cell = Cell(kind, expansion, k)  # pyright: ignore[reportArgumentType]
                mse[cell] = Units(error * hard * weight * rng.normal(1, 0.01, 100), weight)
                loss[cell] = Units(error * hard * weight * rng.normal(1, 0.5, 100), weight)
                numbers = {
                    "mse": Number(mse[cell].value, n_tokens=5000),
                    "nmse_pooled": Number(error / 40),
                    "fvu": Number(error, 0.9 * error, 1.1 * error, 5000),
                    "l0": Number(l0),
                    "dead_fraction": Number((0.1 if kind == "batch_topk" else 0.2) * expansion / k, n_tokens=5000),
                    "ce_clean": Number(2.0), "ce_sae": Number(2.0 + error), "ce_mean": Number(6.0),
                    "delta_ce": Number(error), "frac_recovered_mean": Number(1 - error / 4),
                }  # fmt: skip
                rows.append(GridRow(cell, numbers))
    return rows, {"mse": mse, "delta_ce": loss}


def test_findings_say_what_the_numbers_hold() -> None:
    rows, units = _grid()
    recoveries = [Recovery(Cell("topk", e, 4), int(16 * e), 0.2 * e, 0.8, 1.0, 0.1, 4.0) for e in (1, 2, 4)]
    failed = [analysis.FailedCell("TopK_exp8x_k4", "diverged at step 7")]
    found = analysis.analyse(rows, units, failed=failed, recoveries=recoveries)
    text = findings.markdown(findings.findings(found, published.published_rows()))
    assert "BatchTopK has the lower squared error in 0 of 6 matched cells" in text
    assert "TopK in 6 (6 decided)" in text
    assert "fewer dead latents (latents that fire on none of 5,000 held-out tokens) in 6 of 6" in text
    assert "In the published grid TopK has the lower MSE in 10 of 12 cells" in text
    assert "JumpReLU, trained threshold has the lower squared error in 4 of 4 matched cells (4 decided" in text
    assert "rises with every step of width in 1 of 1 settings" in text
    assert "`TopK_exp8x_k4` (diverged at step 7)" in text
    assert "trained once" in text
    wider = [c for c in found.wider if c.verdict == "a"]
    assert len(wider) == len(found.wider) == 9
    questions = {row["question"] for row in found.comparison_rows()}
    assert len(questions) == len(found.answers) + 1


def test_cells_that_fire_otherwise_are_not_called_alike() -> None:
    rows, units = _grid()
    more = [
        GridRow(row.cell, {**row.numbers, "l0": Number(row.cell.number * 1.1)})
        if row.cell.kind == "batch_topk"
        else row
        for row in rows
    ]
    found = analysis.analyse(more, units)
    text = findings.markdown(findings.findings(found, published.published_rows()))
    assert "BatchTopK's L0 on held-out ones is +10.0 to +10.0 % beside TopK's" in text
    assert "BatchTopK against TopK, matched by L0, squared error" in text
    assert "The same k is not" not in findings.markdown(findings.findings(analysis.analyse(rows, units), []))
    wide = [
        GridRow(row.cell, {**row.numbers, "l0": Number(row.cell.number * row.cell.expansion / 2)})
        if row.cell.kind == "jumprelu_trained" else row
        for row in rows
    ]  # fmt: skip
    assert len(analysis.analyse(wide, units).wider) == 6  # those of the trained threshold are twice as dense when wide


def test_nothing_is_said_about_what_was_not_measured() -> None:
    only = [GridRow(Cell("topk", 4, 8), {"l0": Number(8.0), "fvu": Number(0.2)})]
    text = findings.markdown(findings.findings(analysis.analyse(only, {}), published.published_rows()))
    assert "BatchTopK" not in text.replace("TopK or BatchTopK", "") and "Loss recovered" not in text
    assert "`TopK_exp4x_k8`" in text


def test_results_are_read_back_as_they_were_written(tmp_path) -> None:
    rows, _ = _grid()
    compact, full = write_results(tmp_path, rows)
    again = read_results(full)
    assert [r.cell for r in again] == [r.cell for r in analysis.in_order(rows)]
    assert again[0].numbers["fvu"] == analysis.in_order(rows)[0].numbers["fvu"]
    header, first = compact.read_text().splitlines()[:2]
    assert header.startswith("Type,Expansion,K,L0 target,Val MSE,NMSE,L0,Dead %")
    assert first.startswith("TopK,2,4,,")
    line = full.read_text().splitlines()[1].split(",")
    column = full.read_text().splitlines()[0].split(",").index("Frac Rec %")
    assert float(line[column]) == pytest.approx(100 * 2.0 / (2.0 + rows[0].numbers["delta_ce"].value))


def test_plots_are_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    plots = RECIPE.module("plots")

    rows, units = _grid()
    found = analysis.analyse(rows, units, resamples=200)
    question, comparisons = next(iter(found.answers.items()))
    recoveries = [Recovery(Cell("topk", e, 4), int(16 * e), 0.2 * e, 0.8, 1.0, 0.1, 4.0) for e in (1, 2)]
    paths = [
        plots.pareto(tmp_path / "a.png", rows, "fvu", "FVU"),
        plots.dead_latents(tmp_path / "b.png", rows, 5000),
        plots.differences(tmp_path / "c.png", comparisons, question.title, "%"),
        plots.beside_published(tmp_path / "d.png", rows, published.published_rows()),
        plots.recovered_features(tmp_path / "e.png", recoveries, 64),
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    again = plots.pareto(tmp_path / "again.png", rows, "fvu", "FVU")
    assert again.read_bytes() == paths[0].read_bytes()
