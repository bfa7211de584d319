"""What a harvest says of massive activations: which tokens have them, and what a training should leave out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hubsae.activations import ActivationDataset, ActivationWriter
from hubsae.activations.manifest import finalize
from hubsae.core.scopes import excluding


def write(folder, x, labels, parts=1):
    """Vectors in `parts` files."""
    with ActivationWriter(folder, d=x.shape[1], config="layers.1", columns={"is_special": "bool"}) as writer:
        for rows in np.array_split(np.arange(len(x)), parts):
            writer.write(x[rows], **{name: values[rows] for name, values in labels.items()})
            writer.commit()
    return ActivationDataset.open(folder)


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    x = torch.randn(3000, 16)
    position, sample = np.tile(np.arange(30), 100), np.repeat(np.arange(100), 30)
    token = rng.integers(5, 90, 3000)
    x[position == 0] *= 300
    spikes = np.flatnonzero((position == 7) & (sample % 10 == 0))
    x[spikes] *= 150
    token[spikes] = 3
    labels = {"token_id": token, "position": position, "sample_id": sample, "is_prompt": position < 9}
    return x, labels | {"is_special": token == 3}, spikes


@pytest.mark.parametrize("parts", [1, 7])
def test_massive_tokens_are_named_and_an_exclusion_is_proposed(tmp_path, table, parts):
    x, labels, spikes = table
    stats = write(tmp_path, x, labels, parts).stats
    norms = x.half().float().norm(dim=1).numpy()
    assert stats.proposal() == ["position_0", "massive"]
    assert stats.massive_above == pytest.approx(10 * np.median(norms), rel=0.012)
    massive = norms > stats.massive_above
    assert (massive == ((labels["position"] == 0) | np.isin(np.arange(3000), spikes))).all()
    found = stats.summary()
    assert list(found["largest"]) == [3] and found["largest"][3] == pytest.approx(norms[spikes].max(), rel=1e-3)
    assert found["groups"]["is_special"]["count"] == len(spikes)
    assert found["groups"]["is_special"]["mean_norm"] == pytest.approx(norms[spikes].mean(), rel=1e-3)
    # what is left behind the proposed exclusion has no massive token
    scope = excluding(stats.proposal(), stats.massive_above)
    assert norms[scope.mask({**labels, "norm": norms})].max() < stats.massive_above


def test_usual_norms_propose_nothing(tmp_path, table):
    _, labels, _ = table
    stats = write(tmp_path, torch.randn(3000, 16), labels).stats
    assert stats.proposal() == [] and stats.summary()["largest"] == {}


def test_the_card_says_what_to_leave_out_and_names_the_tokens(tmp_path, table):
    x, labels, _ = table
    write(tmp_path, x, labels)
    finalize(tmp_path, decode=lambda token: f"<t`{token}|\x1b>")
    card = (tmp_path / "README.md").read_text()
    assert "`exclude: [position_0, massive]`" in card and "t'3" in card and "\x1b" not in card
    finalize(tmp_path)  # without a tokenizer the names stay
    assert json.loads((tmp_path / "activations.json").read_text())["tokens"] == {"3": "<t`3|\x1b>"}


def test_statistics_of_files_without_groups_still_load(tmp_path, table):
    from hubsae.activations.stats import ActivationStats

    x, labels, _ = table
    write(tmp_path, x, labels)
    data = ActivationDataset.open(tmp_path).sources[0].stats.to_json()
    del data["groups"], data["tops"]
    assert ActivationStats.from_json(data).count == 3000
