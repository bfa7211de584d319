"""Several SAEs on one stream equal those trained alone; failures stay theirs; chains carry an SAE along and compare."""

import pytest
import torch

from hubsae.core.errors import ConfigError, TrainingError
from hubsae.train import AuxConfig, DeadConfig, SparsityConfig, TrainConfig, data, train, train_chain, train_many
from hubsae.train.trainer import Run


def cell(name: str, **values) -> TrainConfig:
    return TrainConfig(**{"name": name, "d_sae": 96, "batch_size": 128, "lr": 2e-3, "epochs": 2, **values})


CELLS = [
    cell("topk", k=4),
    cell("wide", k=8, d_sae=None, expansion=8, seed=3),
    cell("batch", architecture="batch_topk", k=4, matryoshka=(24,)),
    cell("jump", architecture="jumprelu", loss="sum", sparsity=SparsityConfig(l0=1e-3, bandwidth=0.05)),
    cell("relu", architecture="relu", loss="sum", sparsity=SparsityConfig(l1=0.05)),
    cell("gated", architecture="gated", loss="sum", sparsity=SparsityConfig(l1=0.05), lr=1e-3),
    cell("aux", k=2, aux=AuxConfig(k=8), dead=DeadConfig(tokens=1000)),
]


def test_each_cell_equals_the_sae_trained_alone(tokens, held_out):
    together = train_many(CELLS, tokens, val=held_out)
    for config, many in zip(CELLS, together, strict=True):
        alone = train(config, tokens, val=held_out)
        assert many.sae is not None and alone.sae is not None and many.name == config.name
        assert many.metrics["val_mse"] == pytest.approx(alone.metrics["val_mse"], rel=2e-3), config.name
        assert float((many.sae.W_dec - alone.sae.W_dec).abs().max()) < 5e-3, config.name
        assert [line["event"] for line in many.history] == [line["event"] for line in alone.history]


def test_data_is_read_once(tokens, monkeypatch):
    reads = []
    real = data.TensorSource.batches

    def counted(self, *args, **kwargs):
        for batch in real(self, *args, **kwargs):
            reads.append(1)
            yield batch

    monkeypatch.setattr(data.TensorSource, "batches", counted)
    train_many(CELLS[:3], tokens)
    assert len(reads) == 64


def test_a_cell_that_fails_leaves_the_others_alone(tokens, held_out):
    broken = [
        cell("explodes", k=4, lr=1e12, unit_norm=False),
        cell("too many", k=500, d_sae=None, expansion=2),
    ]
    results = train_many([CELLS[0], *broken, CELLS[1]], tokens, val=held_out)
    assert [r.error is None for r in results] == [True, False, False, True]
    assert "the loss became" in str(results[1].error) and "k=500 is larger than d_sae=64" in str(results[2].error)
    for r, config in ((results[0], CELLS[0]), (results[3], CELLS[1])):
        alone = train(config, tokens, val=held_out)
        assert r.metrics["val_mse"] == pytest.approx(alone.metrics["val_mse"], rel=2e-3)


def test_cells_that_cannot_share_a_stream_are_grouped(tokens, tmp_path):
    configs = [cell("a", k=4), cell("b", k=4, batch_size=256), cell("c", k=2)]
    results = train_many(configs, tokens, out=tmp_path)
    assert [r.steps for r in results] == [64, 32, 64]
    assert (tmp_path / "group_00" / "sae" / "a").is_dir() and (tmp_path / "group_00" / "sae" / "c").is_dir()
    again = train_many(configs, tokens, out=tmp_path)
    for one, two in zip(results, again, strict=True):
        assert one.sae is not None and two.sae is not None and torch.equal(one.sae.W_dec, two.sae.W_dec)


def test_layers_have_their_own_data(tokens, held_out):
    other = tokens.flip(1).contiguous()
    results = train_many([cell("layer1", k=4), cell("layer2", k=4)], [tokens, other])
    alone = train(cell("layer2", k=4), other)
    assert results[1].sae is not None and alone.sae is not None
    assert torch.equal(results[1].sae.W_dec, alone.sae.W_dec)


def test_names_must_differ(tokens):
    with pytest.raises(ConfigError, match="a occurs twice"):
        train_many([cell("a", k=2), cell("a", k=4)], tokens)
    with pytest.raises(ConfigError, match="2 activations for 1 configs"):
        train_many([cell("a", k=2)], [tokens, tokens])


def test_a_killed_group_resumes_to_the_same_bits(tokens, tmp_path, monkeypatch):
    expected = train_many(CELLS, tokens)
    real = Run._train

    def dies(self, x):
        real(self, x)
        if self.step == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train", dies)
        with pytest.raises(KeyboardInterrupt):
            train_many(CELLS, tokens, out=tmp_path)
    for one, two in zip(expected, train_many(CELLS, tokens, out=tmp_path), strict=True):
        assert one.sae is not None and two.sae is not None
        assert torch.equal(one.sae.W_enc, two.sae.W_enc) and torch.equal(one.sae.W_dec, two.sae.W_dec)


# ---- chains ------------------------------------------------------------------------------------------------


def stages(tokens: torch.Tensor, held_out: torch.Tensor):
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    near = 0.9 * torch.eye(32) + 0.1 * turn
    shift = {"base": torch.eye(32), "step10": near, "step20": near @ near}
    return {k: tokens @ m for k, m in shift.items()}, {k: held_out @ m for k, m in shift.items()}


@pytest.mark.parametrize("normalize", ["none", "mean_std"])
def test_chain_starts_each_stage_from_the_one_before_and_measures_both_sides(normalize, tokens, held_out):
    train_on, val = stages(tokens, held_out)
    chain = train_chain(cell("c", k=4, normalize=normalize), train_on, val=val)
    assert [s.stage for s in chain.stages] == ["base", "step10", "step20"]
    for before, stage in zip(chain.stages, chain.stages[1:], strict=False):
        x = val[stage.stage]
        mse = float((before.sae(x) - x).square().mean())
        assert stage.before["val_mse"] == pytest.approx(mse, rel=1e-3)
        assert stage.after["val_mse"] < stage.before["val_mse"]
        assert stage.sae.metadata.base_model.stage == stage.stage
        assert stage.sae.metadata.training.warm_start is not None
    control = chain.control
    assert [s.stage for s in control] == ["base"] * 3 and control[0] is chain.stages[0]
    assert control[1].sae.metadata.base_model.stage == "base"
    assert control[1].after["val_mse"] != chain.stages[1].after["val_mse"]
    row = chain.table()[1]
    assert {"stage", "val_mse_before", "val_mse_after", "val_mse_control"} <= set(row)


def test_chain_resumes_and_reports_the_same(tokens, held_out, tmp_path, monkeypatch):
    train_on, val = stages(tokens, held_out)
    c = cell("c", k=4, checkpoint_every=10)
    expected = train_chain(c, train_on, val=val).table()
    real, steps = Run._train, []

    def dies(self, x):
        real(self, x)
        steps.append(1)
        if len(steps) == 100:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train", dies)
        with pytest.raises(KeyboardInterrupt):
            train_chain(c, train_on, val=val, out=tmp_path)
    resumed = train_chain(c, train_on, val=val, out=tmp_path)
    assert resumed.table() == expected
    assert (tmp_path / "chain.csv").read_text().startswith("number,stage")
    assert (tmp_path / "01_step10" / "sae" / "metadata.json").exists()


def test_a_chain_without_validation_data_measures_on_training_rows(tokens):
    chain = train_chain(cell("c", k=4), {"a": tokens, "b": tokens * 1.1}, control=False)
    assert chain.control == [] and chain.stages[1].after["val_mse"] > 0


def test_a_stage_that_explodes_says_which(tokens):
    with pytest.raises(TrainingError, match="c_b"):
        train_chain(
            cell("c", k=4), {"a": tokens, "b": torch.where(torch.arange(4096)[:, None] > 4000, 1e20, 1.0) * tokens}
        )
