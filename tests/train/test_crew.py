"""Cells stepped side by side in threads: as if alone, the same bits again, failures and resuming as without threads."""

import threading

import pytest
import torch

from hubsae.core.errors import DataError
from hubsae.train import AuxConfig, DeadConfig, SparsityConfig, TrainConfig, train, train_many
from hubsae.train.crew import Crew, deal
from hubsae.train.trainer import Run


@pytest.fixture(autouse=True)
def _two_threads(_one_thread):
    torch.set_num_threads(2)


def cell(name: str, **values) -> TrainConfig:
    return TrainConfig(**{"name": name, "d_sae": 96, "batch_size": 128, "lr": 2e-3, "epochs": 1, **values})


JUMP = SparsityConfig(l0=1e-3, bandwidth=0.05)
CELLS = [
    cell("topk", k=4),
    cell("wide", k=8, d_sae=256, seed=3),
    cell("batch", architecture="batch_topk", k=4, matryoshka=(24,)),
    cell("jump", architecture="jumprelu", loss="sum", sparsity=JUMP),
    cell("gated", architecture="gated", loss="sum", sparsity=SparsityConfig(l1=0.05), lr=1e-3),
    cell("aux", k=2, aux=AuxConfig(k=8), dead=DeadConfig(tokens=1000)),
    cell("untied", k=4, pre_bias="untied", loss="fvu"),
]


def weights(results) -> list[torch.Tensor]:
    return [tensor for r in results for _, tensor in sorted(r.sae.tensors().items())]


def test_cells_in_threads_equal_those_trained_alone_and_repeat_to_the_bit(tokens, held_out):
    workers = set()
    real = Run._train_bank

    class Watched(Run):
        def _train_bank(self, bank, x, rows):
            workers.add(threading.get_ident())
            real(self, bank, x, rows)

    together = Watched(CELLS, tokens, val=held_out).fit()
    assert len(workers) == 2
    for config, many in zip(CELLS, together, strict=True):
        alone = train(config, tokens, val=held_out)
        assert many.sae is not None and alone.sae is not None and many.name == config.name
        assert many.metrics["val_mse"] == pytest.approx(alone.metrics["val_mse"], rel=2e-3), config.name
        assert float((many.sae.W_dec - alone.sae.W_dec).abs().max()) < 5e-3, config.name
        assert [line["event"] for line in many.history] == [line["event"] for line in alone.history]
    again = train_many(CELLS, tokens, val=held_out)
    assert all(torch.equal(a, b) for a, b in zip(weights(together), weights(again), strict=True))
    assert [r.metrics for r in together] == [r.metrics for r in again]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("options", [{"clip": 0.5}, {"accumulate": 2}])
def test_stored_gradients_work_in_threads(options, tokens):
    cells = [config.model_copy(update=options) for config in CELLS[:4]]
    for config, many in zip(cells, train_many(cells, tokens), strict=True):
        alone = train(config, tokens)
        assert many.sae is not None and alone.sae is not None
        assert float((many.sae.W_dec - alone.sae.W_dec).abs().max()) < 5e-3, config.name


def test_a_cell_that_explodes_in_a_thread_leaves_the_others_alone(tokens):
    broken = [cell(f"explodes{i}", k=4, lr=1e12, unit_norm=False) for i in range(2)]
    cells = [CELLS[0], *broken, CELLS[3]]
    results = train_many(cells, tokens)
    assert [r.error is None for r in results] == [True, False, False, True]
    for result in results[1:3]:
        assert "the loss became" in str(result.error) and "failed" in [line["event"] for line in result.history]
    alone = train(CELLS[0], tokens)
    assert results[0].sae is not None and alone.sae is not None
    assert float((results[0].sae.W_dec - alone.sae.W_dec).abs().max()) < 5e-3


def test_broken_data_is_named_from_whichever_thread(tokens):
    broken = tokens.clone()
    broken[3000:3010] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        train_many(CELLS[:4], broken)
    assert torch.get_num_threads() == 2


def test_a_killed_group_resumes_to_the_same_bits(tokens, tmp_path, monkeypatch):
    expected = train_many(CELLS, tokens)
    real = Run._between

    def dies(self, epoch_ended):
        real(self, epoch_ended)
        if self.step == 20:
            raise KeyboardInterrupt

    cells = [config.model_copy(update={"checkpoint_every": 7}) for config in CELLS]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_between", dies)
        with pytest.raises(KeyboardInterrupt):
            train_many(cells, tokens, out=tmp_path)
    resumed = train_many(cells, tokens, out=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(expected), weights(resumed), strict=True))


def test_the_first_of_several_errors_is_raised_after_all_have_ended():
    ended = []

    def work(number: int) -> None:
        ended.append(number)
        if number:
            raise ValueError(str(number))

    with Crew(3) as crew, pytest.raises(ValueError, match="1"):
        crew.map(work, [0, 1, 2])
    assert sorted(ended) == [0, 1, 2]


def test_cells_are_dealt_evenly():
    cells = [cell(str(n), d_sae=n, k=4) for n in (64, 512, 128, 256, 128, 64)]
    dealt = deal(cells, 32, 2)
    assert sorted(number for hand in dealt for number in hand) == list(range(6))
    loads = [sum(cells[number].width(32) for number in hand) for hand in dealt]
    assert max(loads) - min(loads) <= 128
    assert deal(cells[:1], 32, 4) == [[0]]
