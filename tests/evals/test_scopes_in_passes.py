"""Scopes are data: any label column is a scope by name, an SAE's own is measured by itself, massive tokens are said."""

import warnings

import numpy as np
import pytest
import torch

from hubsae import evals
from hubsae.activations import ActivationDataset
from hubsae.activations.ranks import Ranks
from hubsae.core.errors import DataError
from hubsae.evals.passes import BLOCK_ROWS, run_pass


@pytest.fixture(scope="module")
def chat(table):
    rows = len(table["x"])
    role = np.where(np.arange(rows) // 7 % 2 == 0, "user", "assistant")
    return {**table, "role": role, "is_special": torch.arange(rows) % 7 == 0}


def fvu(sae, x):
    with torch.no_grad():
        e = x.double() - sae(x).double()
    x = x.double()
    return float(e.square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize(
    ("scope", "keep"),
    [
        ("special", lambda t: t["is_special"]),
        ("role=user", lambda t: torch.from_numpy(t["role"] == "user")),
        ("not special & not position_0", lambda t: ~t["is_special"] & (t["position"] > 0)),
        ("massive", lambda t: t["x"].norm(dim=1) > 300),
        ("response & role=assistant", lambda t: ~t["is_prompt"] & torch.from_numpy(t["role"] == "assistant")),
    ],
)
def test_any_label_column_is_a_scope_by_name(scope, keep, chat, make_sae):
    sae = make_sae()
    sae.metadata.training.massive_above = 300.0
    measure = evals.reconstruction({"a": sae}, chat, scopes=[scope])["a"].get("fvu", scope)
    kept = keep(chat)
    assert measure.n_tokens == int(kept.sum())
    assert measure.value == pytest.approx(fvu(sae, chat["x"][kept]), rel=1e-6)


def test_a_datasets_columns_are_scopes_and_a_part_of_it_is_read_by_rows(chat, make_sae):
    labels = {name: np.asarray(chat[name]) for name in ("position", "is_prompt", "sample_id", "role", "is_special")}
    data = ActivationDataset.from_tensor(chat["x"], **labels)
    sae = make_sae()
    whole = evals.reconstruction({"a": sae}, data, scopes=["role=user"])
    assert whole.rows() == evals.reconstruction({"a": sae}, chat, scopes=["role=user"]).rows()
    part = evals.reconstruction({"a": sae}, data, scopes=["role=user"], ranks=Ranks(1, 3))
    kept = torch.from_numpy(chat["role"][BLOCK_ROWS : 2 * BLOCK_ROWS] == "user")
    assert part["a"].get("mse", "role=user").n_tokens == int(kept.sum())


def test_what_an_sae_was_trained_on_is_measured_by_itself(chat, make_sae):
    sae = make_sae()
    sae.metadata.training.exclude = ["position_0", "special"]
    result = evals.reconstruction({"a": sae}, chat)
    assert result["a"].own_scope == "not position_0 & not special"
    kept = ~chat["is_special"] & (chat["position"] > 0)
    assert result["a"].value("fvu", result["a"].own_scope) == pytest.approx(fvu(sae, chat["x"][kept]), rel=1e-6)


def test_a_missing_label_column_is_said(table, make_sae):
    sae = make_sae()
    with pytest.raises(DataError, match=r"needs the label column 'role'"):
        evals.reconstruction(sae, table, scopes=["role=user"])
    sae.metadata.training.exclude = ["special"]
    with pytest.warns(UserWarning, match="no column 'is_special'"):
        evals.reconstruction(sae, table)


def test_a_scope_with_massive_tokens_says_so_and_one_without_does_not(table, make_sae):
    result = evals.reconstruction(make_sae(), table)["sae0"]
    assert "massive tokens" in result.get("fvu").note
    assert "massive tokens" in result.get("mse", "position_0").note
    assert result.get("fvu", "not position_0").note is None
    assert result.get("l0").note is None


def test_means_over_sequences_stand_beside_means_over_tokens(make_sae):
    sae = make_sae()
    lengths = [3, 50, 7, 200, 1, 9000]
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    x = torch.randn(len(sample), 32) * (1 + sample[:, None])
    with torch.no_grad():
        error = (x - sae(x)).double().square().mean(1)
    expected = np.mean([float(error[sample == s].mean()) for s in range(len(lengths))])
    result = evals.reconstruction(sae, x, sample_id=sample)["sae0"]
    assert result.value("mse_per_sequence") == pytest.approx(expected, rel=1e-6)
    assert result.value("l0_per_sequence") == pytest.approx(8, abs=0.5)
    assert result.value("mse_per_sequence") != pytest.approx(result.value("mse"), rel=1e-2)


class Norms:
    """An accumulator as a user would write one."""

    columns = ("norm", "position")

    def __init__(self):
        self.total, self.codes, self.starts = 0.0, 0, []

    def add(self, block):
        self.total += float(block.labels["norm"].sum())
        self.codes += int((block.codes["a"].values != 0).sum())
        self.starts.append((block.start, len(block)))

    def merge(self, other):
        raise NotImplementedError

    def save(self, path):
        raise NotImplementedError

    def load(self, path):
        raise NotImplementedError

    def result(self):
        return self.total


def test_several_accumulators_share_one_pass(table, make_sae):
    sae, one, two = make_sae(), Norms(), Norms()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_pass(table, {"a": sae}, [one, two]) == [one.total, one.total]
    assert one.total == pytest.approx(float(table["x"].norm(dim=1).double().sum()), rel=1e-6)
    assert one.starts == two.starts == [(0, 4096), (4096, 4096), (8192, 1808)]
    with torch.no_grad():
        assert one.codes == int((sae.encode(table["x"]) != 0).sum())
