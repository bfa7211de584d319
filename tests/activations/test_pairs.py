"""Pairs of hook points: the same tokens at both, in step under shuffling, ranks and resumption."""

from __future__ import annotations

import pytest
import torch

from hubsae.activations import ActivationDataset, PairedActivations, harvest
from hubsae.core.errors import ConfigError, DataError


@pytest.fixture
def pairs(tmp_path, tiny_model, token_data):
    found = harvest(
        tiny_model, token_data, ["1.mlp_in", "1.mlp_out", "2.mlp_out"], out=tmp_path, dtype="float32", progress=False
    )
    return found.pair("layers.1.mlp_in", "layers.1.mlp_out")


def test_the_target_is_what_the_mlp_makes_of_the_input(pairs, tiny_model, token_data):
    mlp = tiny_model.model.layers[1].mlp
    rows = 0
    for batch in pairs.batches(100, seed=3, columns=["sample_id"], window_bytes=20_000):
        with torch.no_grad():
            made = mlp(batch.x)
        assert torch.allclose(made, batch.target, atol=1e-5)
        rows += len(batch.labels["sample_id"])
    assert rows == len(pairs) == sum(len(s["input_ids"]) for s in token_data)


def test_ranks_share_pairs_and_a_state_goes_on_in_step(pairs):
    options = {"seed": 1, "window_bytes": 20_000}
    shares = [list(pairs.batches(64, rank=rank, world_size=2, **options)) for rank in range(2)]
    rows = torch.cat([b.x for share in shares for b in share])
    assert len(torch.unique(rows, dim=0)) > 0.95 * len(rows)
    whole = list(pairs.batches(64, **options))
    walk = pairs.batches(64, **options)
    for _ in range(5):
        next(walk)
    pairs.load_state_dict(pairs.state_dict())
    rest = list(pairs.batches(64, **options))
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a.target, b.target) for a, b in zip(rest, whole[5:], strict=True))


def test_widths_may_differ_and_the_rows_stay_in_step():
    x = torch.randn(5000, 6)
    y = torch.cat([x, x[:, :3] * 2], dim=1).half()
    paired = PairedActivations(ActivationDataset.from_tensor(x), ActivationDataset.from_tensor(y))
    for batch in paired.batches(64, window_bytes=10_000):
        assert batch.target.shape[1] == paired.d_out == 9
        assert torch.equal(batch.target[:, :6], batch.x.half())


def test_other_tokens_are_no_pair(tmp_path, tiny_model, token_data):
    one = harvest(tiny_model, token_data, [1], out=tmp_path / "a", progress=False)["layers.1"]
    other = harvest(tiny_model, token_data[::-1], [2], out=tmp_path / "b", progress=False)["layers.2"]
    with pytest.raises(DataError, match=r"layers\.1 and layers\.2 do not hold the same tokens"):
        PairedActivations(one, other)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tiny_model, tokenizer):
    import copy

    foreign = copy.deepcopy(tokenizer)
    foreign.add_tokens([f"<{n}>" for n in range(400)])
    with pytest.raises(ConfigError, match="another model's"):
        harvest(tiny_model, ["Ann"], [1], out=tmp_path, tokenizer=foreign)
