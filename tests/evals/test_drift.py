"""Drift along chains: known changes are found, by index and by assignment; rates, control, reports."""

import csv
import json

import numpy as np
import pytest
import torch

from hubsae import evals
from hubsae.core.errors import DataError, NotFoundError
from hubsae.evals.chains import make_groups
from hubsae.evals.comparison import less_control
from hubsae.evals.rates import change, make_series, rate_ratio
from hubsae.evals.report import summary, table_rows
from hubsae.evals.weights import movement
from hubsae.hub.sae import HubSAE

STAGES = ("instruct_base", "ppo_step10", "ppo_step30")


def rotated(sae, angle, seed):
    """Every decoder row and encoder column turned by `angle` radians towards a random orthogonal direction."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(sae.W_dec, dim=1)
    side = torch.randn(unit.shape, generator=generator)
    side = torch.nn.functional.normalize(side - (side * unit).sum(1, keepdim=True) * unit, dim=1)
    W = np.cos(angle) * unit + np.sin(angle) * side
    return HubSAE(sae.config, {**sae.tensors(), "W_dec": W, "W_enc": W.t().contiguous()})


def permuted(sae, order):
    tensors = sae.tensors()
    moved = {"W_dec": tensors["W_dec"][order], "W_enc": tensors["W_enc"][:, order].contiguous()}
    return HubSAE(sae.config, {**tensors, **moved, "b_enc": tensors["b_enc"][order]})


@pytest.fixture(scope="module")
def chain(make_sae):
    base = make_sae(seed=4)
    return {"instruct_base": base, "ppo_step10": rotated(base, 0.1, 1), "ppo_step30": rotated(base, 0.3, 2)}


@pytest.fixture(scope="module")
def activations():
    torch.manual_seed(2)
    x = torch.randn(6000, 32) * torch.rand(32) * 2
    labels = {"position": torch.arange(6000) % 40, "sample_id": torch.arange(6000) // 40}
    return {stage: {"x": x * (1 + i / 10) + i / 5, **labels} for i, stage in enumerate(STAGES)}


@pytest.fixture(scope="module")
def report(chain, activations):
    return evals.drift(chain, activations, name="flexible", control=chain)


def test_known_rotations_are_measured(report):
    moves = {(m.against, m.to_stage): m for m in report.group().moves}
    for stage, angle in (("ppo_step10", 0.1), ("ppo_step30", 0.3)):
        move = moves["base", stage]
        assert move.matching == "index" and move.kept_index == 1
        assert move.decoder_mean == pytest.approx(np.cos(angle), abs=1e-5)
        assert move.encoder_mean == pytest.approx(np.cos(angle), abs=1e-5)
    first = moves["previous", "ppo_step10"]
    assert first.decoder_drift_per_step == pytest.approx((1 - np.cos(0.1)) / 10, abs=1e-6)
    assert sum((first.stable, first.reweighted, first.redirected, first.rotated)) == 128


def test_the_cross_matrix_is_every_sae_on_every_stage(report, chain, activations):
    matrix = report.group().matrix("fvu")
    for i, sae_stage in enumerate(STAGES):
        for j, stage in enumerate(STAGES):
            alone = evals.reconstruction(chain[sae_stage], activations[stage])["sae0"]
            assert matrix[i, j] == alone.value("fvu")
    rows = {row.stage: row for row in report.group().stages}
    assert rows["instruct_base"].nmse_before is None
    assert rows["ppo_step30"].fvu_before == matrix[1, 2]
    assert rows["ppo_step30"].fvu_after == matrix[2, 2]


def test_numbers_of_saes_that_are_not_for_the_first_token_are_about_the_others(make_sae, activations):
    base = make_sae(seed=4)
    chain = {"step0": base, "step1": rotated(base, 0.1, 1)}
    for sae in chain.values():
        sae.metadata.training.exclude = ["position_0"]
    held = dict(activations["instruct_base"])
    held["x"] = torch.where((held["position"] == 0)[:, None], held["x"] * 1000, held["x"])
    report = evals.drift(chain, held)
    group, scope = report.group(), "not position_0"
    alone = {name: evals.reconstruction(sae, held)["sae0"] for name, sae in chain.items()}
    assert [(row.scope, row.n_tokens) for row in group.stages] == [(scope, 5850)] * 2
    assert [row.fvu_after for row in group.stages] == [alone[s].value("fvu", scope) for s in chain]
    assert [row.nmse_after for row in group.stages] == [alone[s].value("nmse_pooled", scope) for s in chain]
    assert group.stages[1].fvu_before == group.matrix("fvu", scope)[0, 1]
    said = summary(report)["groups"][0]
    assert said["scope"] == scope and said["nmse_pooled_change"]["delta"] == pytest.approx(
        group.stages[1].nmse_after - group.stages[0].nmse_after
    )
    assert alone["step0"].value("nmse_pooled", "all") != group.stages[0].nmse_after


def test_births_and_deaths_are_counted(make_sae, activations):
    base = make_sae(seed=4)
    tensors = base.tensors()
    first, second = tensors["b_enc"].clone(), tensors["b_enc"].clone()
    first[:10] -= 1e6
    second[5:12] -= 1e6
    chain = {
        "step0": HubSAE(base.config, {**tensors, "b_enc": first}),
        "step1": HubSAE(base.config, {**tensors, "b_enc": second}),
    }
    rows = evals.drift(chain, activations["instruct_base"]).group().stages
    assert rows[0].births is None
    assert (rows[1].births, rows[1].deaths) == (5, 2)
    assert (rows[0].alive, rows[1].alive) == (118, 121)


def test_permuted_latents_are_found_by_assignment(chain):
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    shuffled = permuted(chain["ppo_step10"], order)
    found = movement(shuffled, chain["instruct_base"])
    assert found.matching == "hungarian"
    assert torch.equal(found.partner, order)
    assert float(found.decoder.mean()) == pytest.approx(np.cos(0.1), abs=1e-5)
    assert float(movement(shuffled, chain["instruct_base"], match="index").decoder.mean()) < 0.5


def test_dictionaries_of_different_size_are_assigned(make_sae):
    small, large = make_sae(d_sae=64), make_sae(d_sae=160, seed=9)
    found = movement(large, small)
    assert found.matching == "hungarian" and len(found.decoder) == 64
    assert len(set(found.partner.tolist())) == 64
    with pytest.raises(DataError, match="matched by index"):
        movement(large, small, match="index")
    with pytest.raises(DataError, match="widths 16 and 32"):
        movement(make_sae(), make_sae(d_in=16))


def test_zero_rows_have_cosine_zero_not_nan(make_sae):
    sae = make_sae()
    sae.W_dec[3] = 0
    found = movement(sae, make_sae())
    assert float(found.decoder[3]) == 0 and bool(torch.isfinite(found.decoder).all())


def test_rates_interpolate_at_matched_steps():
    short, long = make_series([0, 10, 30], [1.0, 0.9, 0.8]), make_series([0, 20, 60], [1.0, 0.9, 0.85])
    full, matched = rate_ratio(short, long, matched=False), rate_ratio(short, long, matched=True)
    assert full.ratio == pytest.approx((0.2 / 30) / (0.15 / 60))
    assert matched.ratio == pytest.approx(0.2 / (0.1 + 0.25 * 0.05))
    assert (matched.steps_a, matched.steps_b) == (30, 30)
    assert change(long, 40).per_step == pytest.approx(-0.125 / 40)
    with pytest.raises(DataError, match="never extrapolated"):
        change(short, 31)
    with pytest.raises(DataError, match="steps must rise"):
        make_series([0, 10, 10], [1, 2, 3])


def test_a_chain_that_does_not_change_has_no_ratio():
    flat, falling = make_series([0, 10], [1.0, 1.0]), make_series([0, 10], [1.0, 0.5])
    assert rate_ratio(falling, flat, matched=True).ratio is None
    assert rate_ratio(flat, falling, matched=True).ratio == 0


def test_differences_between_stages_are_paired(report):
    """The same prompts are drawn for every stage, so a change is known better than its two ends."""
    series = report.group().series["fvu", "not position_0"]
    at_end = change(series, 30.0)
    width = at_end.interval[1] - at_end.interval[0]
    independent = np.sqrt(sum(np.ptp(np.percentile(series.draws[:, i], [2.5, 97.5])) ** 2 for i in (0, -1)))
    assert width < 0.7 * independent


def test_a_chain_less_itself_on_base_activations(report):
    rows = {(r["metric"], r["scope"], r["step"]): r for r in less_control(report)}
    row = rows["fvu", "all", 30.0]
    control = report.control.group().series["fvu", "all"]
    assert row["delta_control"] == pytest.approx(control.values[-1] - control.values[0])
    assert row["delta_net"] == pytest.approx(row["delta_chain"] - row["delta_control"])
    assert row["low"] <= row["delta_net"] <= row["high"]


def test_comparison_of_two_chains_names_what_it_leaves_out(report, chain, activations, make_sae):
    other = evals.drift({k: v for k, v in chain.items() if k != "ppo_step30"}, activations, name="strict")
    compared = evals.compare(other, report)
    rows = {(r["metric"], r["scope"], r["comparison"]): r for r in compared.rows()}
    # the shorter chain is the first part of the longer: the same change at the same step
    assert rows["fvu", "all", "matched"]["ratio_of_rates"] == pytest.approx(1)
    wider = {stage: make_sae(k=4) for stage in STAGES}
    left = evals.compare(report, evals.drift(wider, activations, name="k4"))
    assert not left.items and left.left_out == ["k8: only in flexible", "k4: only in k4"]


def test_a_report_on_disk(report, tmp_path):
    written = {p.name for p in evals.write_report(report, tmp_path)}
    assert written >= {
        "drift_stages.csv",
        "drift_moves.csv",
        "drift_cross.csv",
        "drift_rates.csv",
        "drift_control.csv",
        "drift.json",
        "drift_latents.safetensors",
        "drift_cross.png",
    }
    summary = json.loads((tmp_path / "drift.json").read_text())
    assert summary["groups"][0]["nmse_pooled_change"]["interval"]
    with open(tmp_path / "drift_cross.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 3 * 3 * 3 * 2  # chain and control, metrics, i, j, scopes
    from safetensors.torch import load_file

    latents = load_file(tmp_path / "drift_latents.safetensors")
    assert latents["k8/ppo_step30/base/decoder_cosine"].shape == (128,)


def test_weights_alone_are_enough_for_directions(chain, tmp_path):
    report = evals.drift(chain, None)
    assert len(report.group().moves) == 4 and not report.group().cross
    names = {p.name for p in evals.write_report(report, tmp_path)}
    assert "drift_cosines.png" in names and "drift_nmse.png" not in names


def test_layers_and_ks_are_separate_groups(make_sae):
    saes = [make_sae(k=k, seed=layer) for layer in (6, 18) for k in (4, 8)]
    for sae, layer in zip(saes, (6, 6, 18, 18), strict=True):
        sae.metadata.hook.layer, sae.metadata.base_model.stage = layer, "ppo_step10"
    assert [g.name for g in make_groups(saes)] == ["layer6_k4", "layer6_k8", "layer18_k4", "layer18_k8"]
    with pytest.raises(DataError, match="more than one SAE of stage ppo_step10"):
        make_groups([saes[0], saes[0]])
    with pytest.raises(DataError, match="only one table of activations"):
        evals.drift(saes, torch.randn(10, 32))


def test_stages_are_ordered_by_step_and_named_when_missing(make_sae, activations):
    given = {"ppo_step30": make_sae(), "instruct_base": make_sae(), "ppo_step10": make_sae()}
    assert [link.stage for link in make_groups(given)[0].links] == list(STAGES)
    with pytest.raises(DataError, match="does not say of which stage"):
        make_groups([make_sae()])
    with pytest.raises(NotFoundError, match="no activations for stage 'ppo_step99'"):
        evals.drift({"ppo_step99": make_sae()}, activations)
    with pytest.raises(DataError, match="no SAEs"):
        evals.drift({}, activations)


def test_activations_by_stage_and_layer_or_by_function(chain, activations):
    by_pair = {(stage, None): table for stage, table in activations.items()}
    by_function = evals.drift(chain, lambda stage, layer: activations[stage])
    plain = evals.drift(chain, activations)
    assert table_rows(by_function, "cross") == table_rows(plain, "cross")
    assert table_rows(evals.drift(chain, by_pair), "stages") == table_rows(plain, "stages")


def test_stages_without_steps_get_no_rates_but_everything_else(make_sae, activations):
    report = evals.drift({"early": make_sae(), "late": make_sae(seed=1)}, activations["instruct_base"])
    assert report.group().series == {} and report.group().moves[0].decoder_drift_per_step is None
    assert len(report.group().cross) == 2 * 2 * 3 * 2
