"""Reconstruction metrics: right by definition, and the same however the rows arrive."""

import numpy as np
import pytest
import torch

from hubsae import evals
from hubsae.activations import ActivationDataset
from hubsae.activations.ranks import Ranks
from hubsae.core.errors import DataError
from hubsae.evals.passes import BLOCK_ROWS, run_pass
from hubsae.evals.reconstruction import prepare


@pytest.fixture(scope="module")
def saes(make_sae):
    return {
        "topk": make_sae(k=8),
        "signed": make_sae(k=8, topk_relu=False, seed=1),
        "batch": make_sae("batch_topk", k=4),
        "threshold": make_sae("batch_topk", k=4, threshold=1.5),
        "jumprelu": make_sae("jumprelu"),
        "relu": make_sae("relu"),
        "gated": make_sae("gated"),
    }


@pytest.fixture(scope="module")
def result(saes, table):
    return evals.reconstruction(saes, table)


def everything(result):
    return result.rows(), result.decile_rows(), result.histogram_rows()


SCOPES = {
    "all": lambda t: torch.ones(len(t["x"]), dtype=torch.bool),
    "no_position_0": lambda t: t["position"] > 0,
    "position_0": lambda t: t["position"] == 0,
    "prompt": lambda t: t["is_prompt"],
    "response": lambda t: ~t["is_prompt"],
    "prompt_no_position_0": lambda t: t["is_prompt"] & (t["position"] > 0),
}


@pytest.mark.parametrize("name", ["topk", "signed", "threshold", "jumprelu", "relu", "gated"])
@pytest.mark.parametrize("scope", list(SCOPES))
def test_metrics_match_their_definition_written_in_float64(name, scope, saes, table, result):
    keep = SCOPES[scope](table)
    x = table["x"][keep].double()
    with torch.no_grad():
        x_hat = saes[name](table["x"]).double()[keep]
        z = saes[name].encode(table["x"]).double()[keep]
    e, n = x - x_hat, len(x)
    sst = (x - x.mean(0)).square().sum()
    fired = (z != 0).sum(0).double()
    share = fired[fired > 0] / fired.sum()
    expected = {
        "mse": e.square().mean(),
        "nmse_pooled": e.square().mean() / x.var(),
        "fvu": e.square().sum() / sst,
        "fve": 1 - e.square().sum() / sst,
        "fve_centred": 1 - (e - e.mean(0)).square().sum() / sst,
        "cosine": torch.nn.functional.cosine_similarity(x, x_hat, dim=1).mean(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_bias": x_hat.square().sum() / (x * x_hat).sum(),
        "l0": (z != 0).sum(1).double().mean(),
        "l1": z.abs().sum(1).mean(),
        "n_dead": (fired == 0).sum(),
        "dead_fraction": (fired == 0).double().mean(),
        "effective_features": 2 ** -(share * share.log2()).sum(),
    }
    for metric, value in expected.items():
        measure = result[name].get(metric, scope)
        assert measure.value == pytest.approx(float(value), rel=2e-6, abs=1e-9), metric
        assert measure.n_tokens == n
        if measure.interval is not None:
            assert measure.interval[0] <= measure.interval[1]


@pytest.mark.parametrize("batch_size", [1777, BLOCK_ROWS, 100_000])
def test_every_number_is_bit_identical_for_any_batch_size(batch_size, saes, table, result):
    assert everything(evals.reconstruction(saes, table, batch_size=batch_size)) == everything(result)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_number_is_bit_identical_for_any_split_into_ranks(world_size, saes, table, result):
    states = [part_of_rank(saes, table, Ranks(r, world_size)) for r in range(world_size)]
    merged = states.pop()
    for state in reversed(states):
        merged.merge(state)
    assert everything(merged.result()) == everything(result)


def part_of_rank(saes, table, ranks):
    rows, named, sums = prepare(saes, table, batch_size=1000 + ranks.rank)
    for block in range(ranks.rank, 3, ranks.world_size):
        run_pass(rows, named, [sums], blocks=(block, block + 1))
    return sums


def test_a_state_that_was_saved_and_loaded_goes_on_to_the_same_bits(saes, table, result, tmp_path):
    rows, named, sums = prepare(saes, table)
    run_pass(rows, named, [sums], blocks=(0, 1))
    first = sums.save(tmp_path / "state.safetensors").read_bytes()
    _, _, other = prepare(saes, table)
    other.load(tmp_path / "state.safetensors")
    assert other.save(tmp_path / "again.safetensors").read_bytes() == first
    run_pass(rows, named, [other], blocks=(1, 3))
    assert everything(other.result()) == everything(result)


def test_states_of_other_scopes_are_not_merged(saes, table):
    _, _, one = prepare(saes, table)
    _, _, other = prepare(saes, table["x"])
    with pytest.raises(DataError, match="different SAEs, widths or scopes"):
        one.merge(other)


def test_an_sae_scores_the_same_alone_and_among_others(saes, table, result):
    alone = evals.reconstruction({"jumprelu": saes["jumprelu"]}, table)
    assert alone["jumprelu"].measures == result["jumprelu"].measures


def test_a_dataset_gives_the_numbers_of_its_tensor(saes, table, result):
    labels = {name: table[name].numpy() for name in ("position", "is_prompt", "sample_id")}
    data = ActivationDataset.from_tensor(table["x"], **labels)
    assert everything(evals.reconstruction(saes, data)) == everything(result)
    plain = evals.reconstruction(saes, ActivationDataset.from_tensor(table["x"]), batch_size=999)
    assert plain.scopes == ["all"]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_direction_and_size_are_right_where_the_reconstruction_is_far_too_small_or_large(scale, make_sae, table):
    sae = make_sae()
    sae.W_dec.mul_(scale)
    sae.b_dec.mul_(scale)
    x = table["x"].double()
    with torch.no_grad():
        x_hat = sae(table["x"]).double()
    result = evals.reconstruction(sae, table["x"])["sae0"]
    assert result.value("cosine") == pytest.approx(float(torch.cosine_similarity(x, x_hat, dim=1).mean()), rel=1e-7)
    assert result.value("relative_bias") == pytest.approx(float(x_hat.square().sum() / (x * x_hat).sum()), rel=1e-7)
    assert result.value("l2_ratio") == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-7)


def test_half_precision_activations_are_widened_not_rounded_again(make_sae, table):
    half = table["x"].half()
    a = evals.reconstruction(make_sae(), half)
    b = evals.reconstruction(make_sae(), half.float())
    assert a.rows() == b.rows()


def test_feature_statistics(saes, table, result):
    with torch.no_grad():
        z = saes["topk"].encode(table["x"]).double()
    features = result["topk"].features
    fires = z != 0
    assert torch.equal(features.count, fires.sum(0))
    assert torch.equal(features.count_position_0, fires[table["position"] == 0].sum(0))
    assert torch.allclose(features.max.double(), z.max(0).values.clamp_min(0))
    mean = torch.where(fires.any(0), z.sum(0) / fires.sum(0).clamp_min(1), 0.0)
    assert torch.allclose(features.mean, mean, atol=1e-5)
    assert torch.allclose(features.density, fires.double().mean(0))
    ghosts = fires.any(0) & ~fires[table["position"] > 0].any(0)
    assert result["topk"].value("position_0_only_fraction") == float(ghosts.double().mean())


def test_histogram_counts_every_latent_once(result):
    for sae in result.saes.values():
        assert sum(bar.n_latents for bar in sae.histogram) == len(sae.features.count)
        assert sae.histogram[0].n_latents == sae.value("n_dead")


def test_deciles_hold_every_token_and_explain_what_a_direct_computation_does(saes, table, result):
    rows = [d for d in result["topk"].deciles if d.scope == "not position_0"]
    assert [d.decile for d in rows] == sorted(d.decile for d in rows)
    keep = table["position"] > 0
    assert sum(d.n_tokens for d in rows) == int(keep.sum())
    x = table["x"][keep].double()
    with torch.no_grad():
        e = x - saes["topk"](table["x"][keep]).double()
    norms, mean = x.norm(dim=1), x.mean(0)
    for d in rows:
        inside = (norms >= d.norm_low * (1 - 1e-9)) & (norms < d.norm_high * (1 - 1e-9))
        assert int(inside.sum()) == d.n_tokens
        fve = 1 - e[inside].square().sum() / (x[inside] - mean).square().sum()
        assert d.fve == pytest.approx(float(fve), rel=1e-6, abs=1e-8)


def test_massive_first_positions_dominate_and_can_be_left_out(result):
    assert result["topk"].value("mse") > 10 * result["topk"].value("mse", "no_position_0")


def test_the_interval_covers_the_truth_about_as_often_as_it_says(make_sae):
    sae = make_sae(d_in=8, d_sae=32, k=4)
    generator = torch.Generator().manual_seed(0)

    def sample(samples):
        level = torch.rand(samples, 1, 1, generator=generator) * 3
        x = torch.randn(samples, 20, 8, generator=generator) * level
        return {"x": x.reshape(-1, 8), "sample_id": torch.arange(samples).repeat_interleave(20)}

    truth = evals.reconstruction(sae, sample(40_000))["sae0"].value("mse")
    hits = []
    for _ in range(60):
        low, high = evals.reconstruction(sae, sample(100))["sae0"].get("mse").interval
        hits.append(low <= truth <= high)
    assert np.mean(hits) >= 0.85


def test_metrics_become_metadata_entries_and_tidy_rows(result, tmp_path):
    entries = result["topk"].metrics()
    entry = next(m for m in entries if m.name == "fvu" and m.scope == "not position_0")
    assert entry.n_tokens == 10_000 - 167 and entry.definition and entry.interval
    assert "whole samples" in entry.interval_kind
    written = result.write(tmp_path)
    assert [p.name for p in written] == ["reconstruction.csv", "norm_deciles.csv", "density_histogram.csv"]
    assert all(p.stat().st_size > 100 for p in written)


def test_an_unknown_metric_or_scope_lists_what_there_is(result):
    with pytest.raises(DataError, match=r"metrics: .*nmse_pooled"):
        result["topk"].value("nmse")
    with pytest.raises(DataError, match=r"scopes: .*not position_0"):
        result["topk"].value("mse", "bos")


def test_a_batch_rule_says_over_how_many_rows_it_selected(result):
    assert result["batch"].batch_rule_rows == BLOCK_ROWS
    assert result["topk"].batch_rule_rows is None
