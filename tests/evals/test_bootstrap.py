"""Resampling and its percentiles."""

import numpy as np
import pytest

from hubsae.evals import bootstrap


@pytest.mark.parametrize("size", [1, 2, 10, 999, 1000])
def test_the_interval_holds_numpys_percentiles(size):
    values = np.random.default_rng(size).normal(size=size)
    assert bootstrap.percentile_interval(values) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), rel=1e-13)


def test_undefined_draws_are_left_out_and_too_many_leave_no_interval():
    values = np.arange(1000.0)
    values[:50] = np.nan
    assert bootstrap.percentile_interval(values) == pytest.approx(tuple(np.percentile(values[50:], [2.5, 97.5])))
    values[:101] = np.inf
    assert bootstrap.percentile_interval(values) is None


def test_weights_are_those_of_their_seed():
    assert (bootstrap.weights(7, 50) == bootstrap.weights(7, 50)).all()
    assert (bootstrap.weights(7, 50) != bootstrap.weights(7, 50, seed=1)).any()
