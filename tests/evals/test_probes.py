"""Ridge from sparse codes in one pass: the same as scikit-learn's on a dense matrix, split by problem, no leak."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hubsae.core.config import SAEConfig
from hubsae.core.errors import DataError, FormatError
from hubsae.core.sae import SAE
from hubsae.evals.passes import Rows, run_pass
from hubsae.evals.probes import Predictions, Probe
from hubsae.evals.ridge import RidgeSums

PROBLEMS = 240


@pytest.fixture(scope="module")
def table():
    """Vectors, a score that three latents and some noise make, and the problem of each row."""
    sae = SAE.random(SAEConfig(architecture="topk", d_in=24, d_sae=96, k=6), seed=1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6000, 24, generator=generator)
    z = sae.encode(x).double()
    noise = torch.randn(6000, generator=generator, dtype=torch.float64)
    score = (2 * z[:, 5] - z[:, 17] + 0.5 * z[:, 40] + 0.3 * noise + 0.7).numpy()
    problem = np.arange(6000) * PROBLEMS // 6000
    return sae, x, z.numpy(), {"score": score, "problem": problem}


def summed(sae, x, columns, **options) -> RidgeSums:
    sums = RidgeSums(options.pop("targets", ["score"]), sae="a", group="problem", **options)
    run_pass(x, {"a": sae}, [sums], columns=columns)
    return sums


@pytest.mark.parametrize("alpha", [1e-2, 3.0, 1e4])
def test_weights_are_those_of_scikit_learn_on_the_dense_matrix(table, alpha):
    from sklearn.linear_model import Ridge

    sae, x, z, columns = table
    found = summed(sae, x, columns).fit(alpha=alpha, standardise=False).probe
    theirs = Ridge(alpha=alpha, solver="cholesky").fit(z, columns["score"])
    assert np.abs(found.weights.numpy() - theirs.coef_).max() < 1e-6
    assert abs(found.bias - theirs.intercept_) < 1e-6


def test_standardised_weights_are_those_of_scikit_learn_behind_its_scaler(table):
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sae, x, z, columns = table
    found = summed(sae, x, columns).fit(alpha=50.0).probe(torch.from_numpy(z)).numpy()
    theirs = make_pipeline(StandardScaler(), Ridge(alpha=50.0)).fit(z, columns["score"]).predict(z)
    assert np.abs(found - theirs).max() < 1e-6


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_sparse_and_dense_sums_agree(table, architecture):
    _, x, _, columns = table
    sae = SAE.random(
        SAEConfig(architecture=architecture, d_in=24, d_sae=64, **({"k": 3} if architecture == "topk" else {}))
    )
    columns = {**columns, **{f"z{i}": v for i, v in enumerate(sae.encode(x).numpy().T)}}
    dense = RidgeSums(["score"], inputs=[f"z{i}" for i in range(64)], group="problem")
    run_pass(x, {"a": sae}, [dense], columns=columns)
    a, b = summed(sae, x, columns).fit(), dense.fit()
    assert a.by_penalty == pytest.approx(b.by_penalty, rel=1e-9)
    assert torch.allclose(a.probe.weights, b.probe.weights, atol=1e-9)


def test_raw_vectors_are_fitted_as_they_are(table):
    from sklearn.linear_model import Ridge

    sae, x, _, columns = table
    sums = RidgeSums(["score"], group="problem")
    run_pass(x, {"a": sae}, [sums], columns=columns)
    theirs = Ridge(alpha=2.0).fit(x.double().numpy(), columns["score"])
    assert np.abs(sums.fit(alpha=2.0, standardise=False).probe.weights.numpy() - theirs.coef_).max() < 1e-6


def test_the_error_of_a_fold_left_out_is_that_of_its_rows(table):
    """Read off the sums without seeing a row again: the same as predicting each row."""
    from sklearn.linear_model import Ridge

    from hubsae.activations.splits import uniform

    sae, x, z, columns = table
    y, penalty = columns["score"], 1e-2
    fold = (uniform(columns["problem"].astype(np.uint64), 0) * 5).astype(int)
    scale, sse, sst = z.std(0), 0.0, 0.0
    scale[scale == 0] = 1
    for f in range(5):
        rest, held = fold != f, fold == f
        fitted = Ridge(alpha=penalty * rest.sum()).fit(z[rest] / scale, y[rest])
        sse += ((y[held] - fitted.predict(z[held] / scale)) ** 2).sum()
        sst += ((y[held] - y[rest].mean()) ** 2).sum()
    found = summed(sae, x, columns).fit(penalties=[penalty])
    assert found.by_penalty[penalty] == pytest.approx(1 - sse / sst, abs=1e-9)
    assert found.by_penalty[np.inf] == pytest.approx(0, abs=1e-12)


def test_what_a_feature_adds_is_what_is_lost_without_it(table):
    sae, x, z, columns = table
    fit = summed(sae, x, columns).fit(penalties=[1e-4], top=6)
    assert {c.feature for c in fit.carriers[:3]} == {5, 17, 40}
    best = fit.carriers[0]
    assert best.feature == 5 and best.stable == 1.0 and best.rows == int((z[:, 5] != 0).sum())
    names = {f"z{i}": z[:, i] for i in range(96) if i != 5}
    without = RidgeSums(["score"], inputs=list(names), group="problem")
    run_pass(x, {"a": sae}, [without], columns={**columns, **names})
    assert best.drop == pytest.approx(fit.r2 - without.fit(penalties=[1e-4]).by_penalty[1e-4], abs=1e-9)


def test_a_score_that_belongs_to_problems_by_chance_is_predicted_only_where_the_split_leaks():
    """The rows of a problem look alike. Split by problem nothing is predicted; split by row nearly all is."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE.random(SAEConfig(architecture="topk", d_in=64, d_sae=256, k=8), seed=3)
    centre = torch.randn(60, 64, generator=generator)
    problem = torch.arange(3000) % 60
    x = centre[problem] + 0.1 * torch.randn(3000, 64, generator=generator)
    shuffled = torch.randn(60, generator=generator)[problem]
    columns = {"score": shuffled, "problem": problem, "row": torch.arange(3000)}
    leaks = RidgeSums(["score"], sae="a", group="row")
    honest = RidgeSums(["score"], sae="a", group="problem")
    run_pass(x, {"a": sae}, [leaks, honest], columns=columns)
    assert leaks.fit().r2 > 0.8
    assert honest.fit().r2 < 0.1


def test_parts_merge_to_the_whole_and_survive_the_disk(table, tmp_path):
    sae, x, _, columns = table
    whole = summed(sae, x, columns).fit(top=4)
    halves = []
    for number, part in enumerate((slice(0, 2500), slice(2500, None))):
        half = summed(sae, x[part], {name: value[part] for name, value in columns.items()})
        half.save(tmp_path / f"{number}.safetensors")
        read = RidgeSums(["score"], sae="a", group="problem")
        read.load(tmp_path / f"{number}.safetensors")
        halves.append(read)
    halves[1].merge(halves[0])
    again = halves[1].fit(top=4)
    assert torch.allclose(again.probe.weights, whole.probe.weights, atol=1e-9)
    assert [c.feature for c in again.carriers] == [c.feature for c in whole.carriers]


def test_the_sums_do_not_grow_with_the_tokens(table):
    sae, x, _, columns = table
    once = summed(sae, x, columns)
    more = summed(sae, x.repeat(5, 1), {name: np.tile(value, 5) for name, value in columns.items()})
    assert more.pairs.shape == once.pairs.shape and sum(map(float, more.n)) == 5 * len(x)


def test_a_probe_is_read_back_as_it_was_and_predicts_rows_held_out(table, tmp_path):
    sae, x, z, columns = table
    fit = summed(sae, x[:4800], {name: value[:4800] for name, value in columns.items()}).fit()
    fit.probe.save(tmp_path)
    again = Probe.load(tmp_path)
    assert torch.equal(again.weights, fit.probe.weights) and again.record == fit.probe.record
    assert (tmp_path / "probe.json").is_file()
    rows = Rows(x[4800:], {name: value[4800:] for name, value in columns.items()})
    (found,) = run_pass(rows, {"a": sae}, [Predictions({"codes": again}, ["score", "problem"])])
    assert np.allclose(found["codes"], z[4800:] @ again.weights.numpy() + again.bias)
    assert np.var(found["score"] - found["codes"]) < 0.1 * np.var(found["score"])
    with pytest.raises(FormatError, match="a state of probe"):
        Probe.load(tmp_path / "probe.json")


def test_scores_that_cannot_be_predicted_are_refused_by_name(table):
    sae, x, _, columns = table
    one = {**columns, "problem": np.zeros(len(x))}
    with pytest.raises(DataError, match="1 problem, all in one fold"):
        summed(sae, x, one).fit()
    with pytest.raises(DataError, match=r"all 6000 scores in 'score' are 0.5"):
        summed(sae, x, {**columns, "score": np.full(len(x), 0.5)}).fit()
    holes = columns["score"].copy()
    holes[7] = np.nan
    with pytest.raises(DataError, match=r"1 of 4096 rows from row 0 on .* have no score"):
        summed(sae, x, {**columns, "score": holes})
    with pytest.raises(DataError, match="no row is in the scope"):
        summed(sae, x, {**columns, "step_end": np.zeros(len(x), bool)}, scope="step_end").fit()
    with pytest.raises(DataError, match="needs the label column 'problem'"):
        summed(sae, x, {"score": columns["score"]})
