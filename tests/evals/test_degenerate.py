"""Degenerate input: an error that says what, or a value that is defined; never a silent NaN."""

import math

import numpy as np
import pytest
import torch

from hubsae import evals
from hubsae.core.errors import DataError


def no_silent_nan(result):
    for row in result.rows():
        for key in ("value", "low", "high"):
            assert row[key] is None or math.isfinite(row[key]), row
        assert row["value"] is not None or row["note"], row
    for decile in result.decile_rows():
        assert decile["fve"] is None or math.isfinite(decile["fve"])


@pytest.mark.parametrize("constant", [0.0, 3.0, 1e4])
def test_constant_activations_have_no_variance_to_explain(constant, make_sae):
    x = torch.full((500, 32), constant)
    result = evals.reconstruction(make_sae(), x)
    no_silent_nan(result)
    for metric in ("fvu", "fve", "fve_centred", "nmse_pooled"):
        assert result["sae0"].value(metric) is None
        assert result["sae0"].get(metric).note
    assert result["sae0"].value("mse") >= 0


def test_the_same_token_over_and_over_has_pooled_variance_but_no_fvu(make_sae):
    result = evals.reconstruction(make_sae(), torch.randn(1, 32).expand(700, 32).contiguous() * 100)
    no_silent_nan(result)
    assert result["sae0"].value("fvu") is None
    assert result["sae0"].value("nmse_pooled") > 0
    assert result["sae0"].get("fvu").note == "the activations are constant in this scope"


def test_one_token(make_sae):
    result = evals.reconstruction(make_sae(), torch.randn(1, 32))
    no_silent_nan(result)
    assert result["sae0"].get("fvu").note == "one token has no variance"
    assert result["sae0"].get("mse").interval is None


def test_a_constant_beside_tiny_variation_is_not_lost_to_cancellation(make_sae):
    torch.manual_seed(0)
    x = torch.randn(3000, 32).double() * 1e-2
    x[:, 0] += 3000
    x = x.float()
    wide = x.double()
    e = wide - make_sae()(x).double()
    expected = float(e.square().sum() / (wide - wide.mean(0)).square().sum())
    assert evals.reconstruction(make_sae(), x)["sae0"].value("fvu") == pytest.approx(expected, rel=1e-7)


def test_an_sae_with_no_live_feature(make_sae):
    sae = make_sae("jumprelu")
    sae.threshold.fill_(1e9)
    result = evals.reconstruction(sae, torch.randn(300, 32), position=torch.arange(300) % 10)
    no_silent_nan(result)
    one = result["sae0"]
    assert (one.value("l0"), one.value("dead_fraction"), one.value("effective_features")) == (0.0, 1.0, 0.0)
    assert one.value("relative_bias") is None
    assert one.value("cosine") == 0.0
    assert one.histogram[0].n_latents == 128
    assert one.features.max.tolist() == [0.0] * 128


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_row(bad, make_sae):
    x = torch.randn(9000, 32)
    x[5432, 3] = bad
    with pytest.raises(DataError, match="row 5432 is the first"):
        evals.reconstruction(make_sae(), x, batch_size=1000)


def test_weights_that_are_not_finite_name_the_sae(make_sae):
    sae = make_sae()
    sae.W_dec[:, 0] = float("nan")
    with pytest.raises(DataError, match="SAE 'broken' returns NaN"):
        evals.reconstruction({"fine": make_sae(), "broken": sae}, torch.randn(100, 32))


@pytest.mark.parametrize(
    ("activations", "columns", "error"),
    [
        (torch.zeros(0, 32), {}, "no tokens"),
        (torch.randn(4, 5, 32), {}, r"expected \[tokens, d\]"),
        (torch.zeros(4, 32, dtype=torch.int64), {}, "floating-point"),
        (torch.randn(10, 16), {}, "width 16, SAE 'sae0' takes 32"),
        (torch.randn(10, 32), {"position": torch.arange(9)}, "column position"),
        (torch.randn(10, 32), {"is_prompt": np.array(["a"] * 10)}, "expected integers"),
        ("some text", {}, "cannot read activations from str"),
        ({"y": torch.randn(3, 32)}, {}, "no activations in a mapping"),
    ],
)
def test_unusable_activations_are_said_to_be(activations, columns, error, make_sae):
    with pytest.raises(DataError, match=error):
        evals.reconstruction(make_sae(), activations, **columns)


def test_no_saes(make_sae):
    with pytest.raises(DataError, match="no SAEs"):
        evals.reconstruction({}, torch.randn(10, 32))


def test_a_scope_that_holds_no_token_or_every_token_is_not_named(make_sae):
    result = evals.reconstruction(make_sae(), torch.randn(50, 32), is_prompt=torch.ones(50, dtype=torch.bool))
    assert result.scopes == ["all"]


def test_labels_that_a_writer_did_not_know_are_not_taken_for_labels(make_sae):
    x, unknown = torch.randn(500, 32), torch.full((500,), -1)
    result = evals.reconstruction(make_sae(), x, position=unknown, sample_id=unknown)
    assert result.scopes == ["all"]
    measure = result["sae0"].get("mse")
    assert "runs of 64" in measure.interval_kind and measure.interval[0] < measure.interval[1]
    assert result["sae0"].features.count_position_0 is None


def test_text_sample_ids_group_like_numbers(make_sae):
    x = torch.randn(400, 32)
    names = np.repeat([f"prompt-{i}" for i in range(40)], 10)
    measure = evals.reconstruction(make_sae(), x, sample_id=names)["sae0"].get("mse")
    assert "groups of whole samples" in measure.interval_kind


def test_activations_too_large_for_float32_squares_are_still_measured(make_sae):
    x = torch.randn(200, 32) * 1e25
    result = evals.reconstruction(make_sae(), x)
    no_silent_nan(result)
    assert result["sae0"].value("mse") > 1e45
