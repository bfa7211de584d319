"""The hand-written step takes the same steps as dense autograd: weights, loss, L0, for every architecture and rule."""

import math

import pytest
import torch
from train import dense

from hubsae.train import select, step, update
from hubsae.train.config import AuxConfig, SparsityConfig, TrainConfig
from hubsae.train.parallel import Solo
from hubsae.train.state import Bank

D, N, ROWS, SOLO = 32, 128, 64, Solo()


def config(**values) -> TrainConfig:
    values.setdefault("architecture", "topk")
    if values["architecture"] in ("topk", "batch_topk"):
        values.setdefault("k", 8)
    return TrainConfig(**{"d_sae": N, "lr": 1e-2, "batch_size": ROWS, **values})


def start(bank: Bank, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for cell in bank.cells:
        W = torch.randn(cell.n, D, generator=g, dtype=torch.float64)
        cell.W_enc.copy_(W / W.norm(dim=1, keepdim=True))
        if bank.d_out != D:
            W = torch.randn(cell.n, bank.d_out, generator=g, dtype=torch.float64)
        cell.W_dec.copy_(W / W.norm(dim=1, keepdim=True))
        for vector in cell.vectors.values():
            vector.copy_(torch.randn(vector.shape, generator=g, dtype=torch.float64) * 0.1)
        if "theta" in cell.vectors:
            cell.vectors["theta"].fill_(0.6)


def one_step(bank: Bank, x: torch.Tensor, target=None) -> tuple[step.Forward, step.Signals]:
    with torch.no_grad():
        f = step.forward(bank, x, SOLO, x.shape[0], target)
        s = step.signals(bank, f, SOLO, x.shape[0])
        if bank.cells[0].config.clip is None:
            update.apply(bank, f, s)
        else:
            update.collect(bank, f, s)
            update.apply_stored(bank, s.vectors, torch.ones(bank.n, dtype=torch.bool), SOLO)
    return f, s


def compare(
    c: TrainConfig,
    *,
    steps: int = 6,
    tolerance: float = 1e-7,
    dead: bool = False,
    norm: float = 1.0,
    d_out: int | None = None,
) -> step.Signals:
    """Take steps both ways in float64; the last signals."""
    bank = Bank([c], D, d_out=d_out, dtype=torch.float64)
    start(bank)
    bank.W_dec *= norm
    cell = bank.cells[0]
    other = dense.DenseTrainer(cell)
    if dead:
        cell.since_fired[::3] = 10**9
    g = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(ROWS, D, generator=g, dtype=torch.float64) + 0.3
        mask = cell.dead() if dead else None
        expected_l0 = (other.codes(x)[1] != 0).sum(1).double().mean()
        target = None if d_out is None else torch.randn(ROWS, d_out, generator=g, dtype=torch.float64) + x[:, :d_out]
        f, s = one_step(bank, x, target)
        mine = sum(float(v[0]) for v in (f.losses, s.penalty, s.aux_loss) if v[0] is not None)
        assert mine == pytest.approx(other.step(x, mask, target), rel=1e-6)
        assert float(s.l0[0]) == pytest.approx(float(expected_l0), abs=1e-9)
    for name, theirs in other.params.items():
        ours = cell.vectors[name] if name in cell.vectors else getattr(cell, name)
        assert float((ours - theirs.detach()).abs().max()) < tolerance, name
    return s


@pytest.mark.parametrize("pre_bias", ["tied", "untied", "none"])
@pytest.mark.parametrize("loss", ["mean", "sum", "fvu"])
def test_topk_with_every_bias_and_loss(pre_bias, loss):
    compare(config(pre_bias=pre_bias, loss=loss))


def test_signed_topk_passes_negative_values():
    s = compare(config(topk_relu=False, k=100))
    assert (s.dz != 0).all()


def test_topk_wider_than_the_positive_latents_gives_zero_values_no_gradient():
    compare(config(k=100))


@pytest.mark.parametrize("options", [{"clip": 1e-3}, {"project": False}, {"unit_norm": False, "project": False}])
def test_clipping_projection_and_norm_are_those_of_the_textbook(options):
    compare(config(**options))


@pytest.mark.parametrize("norm", [0.5, 2.0])
def test_the_projection_is_one_for_rows_of_any_norm(norm):
    compare(config(unit_norm=False), norm=norm)


@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_matryoshka_prefixes_reconstruct_alone(arch):
    compare(config(architecture=arch, matryoshka=(16, 0.5)))


def test_batch_topk_selects_over_the_batch():
    compare(config(architecture="batch_topk"))


@pytest.mark.parametrize("above", [0.0, 2.0], ids=["dense branch", "sparse branch"])
@pytest.mark.parametrize("target", [None, 3.0])
def test_jumprelu_straight_through_in_both_branches(monkeypatch, above, target):
    monkeypatch.setattr(select, "DENSE_ABOVE", above)
    sparsity = SparsityConfig(l0=0.01, l0_target=target, bandwidth=0.1)
    s = compare(config(architecture="jumprelu", loss="sum", sparsity=sparsity))
    assert (s.dense[0] is not None) == (above == 0.0)


@pytest.mark.parametrize("above", [0.0, 2.0], ids=["dense branch", "sparse branch"])
def test_relu_with_l1_in_both_branches(monkeypatch, above):
    monkeypatch.setattr(select, "DENSE_ABOVE", above)
    compare(config(architecture="relu", sparsity=SparsityConfig(l1=0.01)))


def test_gated():
    compare(config(architecture="gated", sparsity=SparsityConfig(l1=0.01)))


@pytest.mark.parametrize("loss", ["mean", "sum", "fvu"])
@pytest.mark.parametrize("options", [{}, {"target": "full"}, {"normalize": True}, {"scale_by_dead": True}])
def test_auxk_of_every_kind(loss, options):
    compare(config(loss=loss, aux=AuxConfig(k=60, **options)), dead=True)


def test_auxk_with_fewer_dead_latents_than_k_and_with_jumprelu():
    compare(config(aux=AuxConfig(k=100, scale_by_dead=True)), dead=True)
    sparsity = SparsityConfig(l0=0.01, bandwidth=0.1)
    compare(config(architecture="jumprelu", loss="sum", sparsity=sparsity, aux=AuxConfig(k=12)), dead=True)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"pre_bias": "untied", "loss": "fvu"},
        {"clip": 1e-3},
        {"matryoshka": (16, 0.5), "loss": "sum"},
        {"architecture": "batch_topk", "aux": AuxConfig(k=60)},
        {"aux": AuxConfig(k=60, target="full")},
        {"architecture": "relu", "sparsity": SparsityConfig(l1=0.01)},
        {"architecture": "jumprelu", "sparsity": SparsityConfig(l0=0.01, bandwidth=0.1), "loss": "sum"},
    ],
    ids=["topk", "clipped", "matryoshka", "batch_topk", "full", "relu", "jumprelu"],
)
def test_transcoders_take_the_steps_of_the_textbook(options, skip):
    compare(config(**{"pre_bias": "none", **options}, skip=skip), dead="aux" in options, d_out=20)


def test_row_chunks_change_nothing(monkeypatch):
    monkeypatch.setattr(select, "rows_at_once", lambda rows, n: 10)
    for arch in ("topk", "batch_topk"):
        compare(config(architecture=arch, aux=AuxConfig(k=12)), dead=True)


def test_tiles_change_nothing(monkeypatch):
    monkeypatch.setattr(update, "TILE_ELEMENTS", 7 * D)
    compare(config(aux=AuxConfig(k=12)), dead=True)


def test_a_step_that_may_not_move_leaves_every_bit():
    bank = Bank([config()], D)
    start(bank)
    bank.W_dec *= 1 + 1e-5  # the norm that is kept is another
    cell, x = bank.cells[0], torch.randn(ROWS, D, generator=torch.Generator().manual_seed(1))
    before = [t.clone() for t in (bank.W_enc, bank.W_dec, bank.m_dec, *cell.vectors.values())]
    with torch.no_grad():
        f = step.forward(bank, x, SOLO, ROWS)
        update.apply(bank, f, step.signals(bank, f, SOLO, ROWS), torch.tensor(False))
    after = (bank.W_enc, bank.W_dec, bank.m_dec, *cell.vectors.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gradient_of_the_loss_by_finite_differences():
    bank = Bank([config(loss="sum", project=False, unit_norm=False)], D, dtype=torch.float64)
    start(bank)
    cell = bank.cells[0]
    x = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        f = step.forward(bank, x, SOLO, ROWS)
        s = step.signals(bank, f, SOLO, ROWS)
        update.collect(bank, f, s)
    g_enc, g_dec = bank.stored_gradients()
    h = 1e-6
    checks = [(cell.W_enc, g_enc, (3, 5)), (cell.W_dec, g_dec, (3, 5)), (cell.W_enc, g_enc, (77, 0))]
    checks += [(cell.vectors[n], s.vectors[0][n], (i,)) for n in ("b_enc", "b_dec") for i in (2, 11)]
    for tensor, gradient, at in checks:
        losses = []
        for sign in (1, -1):
            tensor[at] += sign * h
            losses.append(float(step.forward(bank, x, SOLO, ROWS).losses[0]))
            tensor[at] -= sign * h
        assert float(gradient[at]) == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-5, abs=1e-7)


def test_cells_of_a_bank_do_what_they_do_alone():
    cells = [
        config(name="a"),
        config(name="b", k=3, d_sae=64),
        config(name="c", architecture="batch_topk", matryoshka=(20,)),
        config(name="d", architecture="jumprelu", loss="sum", sparsity=SparsityConfig(l0=0.1, bandwidth=0.2)),
        config(name="e", topk_relu=False, k=100),
        config(name="f", architecture="gated", sparsity=SparsityConfig(l1=0.01)),
        config(name="g", lr=1e-3, aux=AuxConfig(k=9)),
    ]
    together = Bank(cells, D, dtype=torch.float64)
    start(together)
    alone = []
    for cell in together.cells:
        single = Bank([cell.config], D, dtype=torch.float64)
        single.cells[0].load(cell.tensors(), cell.scalars())
        alone.append(single)
    g = torch.Generator().manual_seed(8)
    for _ in range(6):
        x = torch.randn(ROWS, D, generator=g, dtype=torch.float64)
        for bank in (together, *alone):
            bank.cells[-1].since_fired[::4] = 10**9
            one_step(bank, x)
    for cell, single in zip(together.cells, alone, strict=True):
        assert float((cell.W_enc - single.W_enc).abs().max()) < 1e-12
        assert float((cell.W_dec - single.W_dec).abs().max()) < 1e-12
        for name, vector in cell.vectors.items():
            assert float((vector - single.cells[0].vectors[name]).abs().max()) < 1e-12


def test_float32_stays_near_float64_over_many_steps():
    banks = [Bank([config(lr=1e-3)], D, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    for bank in banks:
        start(bank)
    g = torch.Generator().manual_seed(2)
    for _ in range(40):
        x = torch.randn(ROWS, D, generator=g, dtype=torch.float64)
        for bank in banks:
            one_step(bank, x.to(bank.dtype))
    assert float((banks[0].W_dec - banks[1].W_dec).abs().max()) < 1e-4


def test_the_same_seed_gives_the_same_bits_twice():
    ends = []
    for _ in range(2):
        bank = Bank([config(lr=1e-3)], D)
        start(bank)
        g = torch.Generator().manual_seed(2)
        for _ in range(10):
            one_step(bank, torch.randn(ROWS, D, generator=g))
        ends.append(bank.W_enc.clone())
    assert torch.equal(*ends)
    assert not math.isnan(float(ends[0].sum()))
