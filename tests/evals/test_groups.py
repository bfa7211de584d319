"""The error by group of tokens: each token in one group, each group's error by definition."""

import numpy as np
import pytest
import torch

from hubsae.evals.groups import error_by_group, token_groups

# position 0 is a special token too; role names and newlines belong to the template
IDS = np.array([1, 20, 9, 50, 51, 2, 9, 1, 21, 9, 60, 61, 62, 2, 9])
SPECIAL = np.isin(IDS, [1, 2])
TEMPLATE = SPECIAL | np.isin(IDS, [20, 21, 9])
LABELS = {
    "token_id": np.tile(IDS, 40),
    "position": np.tile(np.arange(15), 40),
    "is_special": np.tile(SPECIAL, 40),
    "is_template": np.tile(TEMPLATE, 40),
    "sample_id": np.repeat(np.arange(40), 15),
    "role": np.tile(np.where(np.arange(15) < 7, "user", "assistant"), 40),
}


def test_delimiters_role_names_and_the_newlines_behind_them_are_groups_of_their_own():
    groups = token_groups(LABELS)
    assert groups.names == ["position 0", "#1", "#2", "#1 +1", "#1 +2", "#2 +1", "content assistant", "content user"]
    counts = dict(zip(groups.names, (np.bincount(groups.codes) // 40).tolist(), strict=True))
    assert counts == {
        "position 0": 1, "#1": 1, "#2": 2, "#1 +1": 2, "#1 +2": 2, "#2 +1": 2, "content assistant": 3, "content user": 2
    }  # fmt: skip


def test_the_error_of_a_group_is_that_of_its_tokens(make_sae):
    sae = make_sae()
    sae.metadata.training.exclude = ["position_0"]
    x = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    x[torch.from_numpy(LABELS["position"] == 0)] *= 100
    rows = {row["tokens"]: row for row in error_by_group({"a": sae}, {"x": x, **LABELS})}
    with torch.no_grad():
        e = x.double() - sae(x).double()
    wide, groups = x.double(), token_groups(LABELS)
    mean = wide[torch.from_numpy(LABELS["position"] > 0)].mean(0)
    for code, name in enumerate(groups.names):
        here = torch.from_numpy(groups.codes == code)
        error = e[here].square().sum() / (wide[here] - mean).square().sum()
        assert rows[name]["error"] == pytest.approx(float(error), rel=1e-6)
        assert rows[name]["relative_error"] == pytest.approx(
            float((e[here].norm(dim=1) / wide[here].norm(dim=1)).mean())
        )
        assert rows[name]["n_tokens"] == int(here.sum())
    assert sum(row["share_of_error"] for row in rows.values()) == pytest.approx(1)
    assert rows["position 0"]["share_of_error"] > 0.9
