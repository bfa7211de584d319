"""The Triton kernels against dense references: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed (docs/training.md says how to run these)")

from triton.runtime.interpreter import InterpreterBuilder

from hubsae.core.errors import DataError
from hubsae.kernels import cpu, triton_encode, triton_update, using
from hubsae.kernels.active import ActiveSet
from hubsae.kernels.function import topk_autoencode
from hubsae.train import AuxConfig, DeadConfig, SparsityConfig, TrainConfig, select, train
from hubsae.train.estimate import estimate
from hubsae.train.learn import learn, settle
from hubsae.train.parallel import Solo
from hubsae.train.state import Bank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16, so that small problems have many of them, split over programs, with lists cut again and again."""
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    monkeypatch.setattr(triton_encode, "_blocks", lambda *_: sizes)


def whole_numbers(rows: int, n: int, d: int, *, bits: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, W and a bias whose products are exact in float32, in whatever order they are summed."""
    g = torch.Generator().manual_seed(seed)
    top = 1 << bits
    draw = lambda *shape: torch.randint(-top, top + 1, shape, generator=g).float().to(DEVICE)  # noqa: E731
    return draw(rows, d), draw(n, d), draw(n)


def stable_topk(pre: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = pre.sort(dim=1, descending=True, stable=True)
    return found.values[:, :k], found.indices[:, :k]


@pytest.mark.parametrize(("rows", "n", "d", "nnz"), [(6, 20, 5, 31), (4, 9, 1500, 0), (5, 7, 1100, 12), (1, 3, 8, 3)])
def test_sums_and_gradients_equal_the_dense_products(rows, n, d, nnz):
    g = torch.Generator().manual_seed(nnz)
    flat = torch.randperm(rows * n, generator=g)[:nnz].sort().values
    values = torch.randn(nnz, generator=g).to(DEVICE)
    W, residual, x = (torch.randn(s, d, generator=g).to(DEVICE) for s in (n, rows, rows))
    with using("triton"):
        active = ActiveSet.from_entries((flat // n).to(DEVICE), (flat % n).to(DEVICE), values, rows, n)
        out = cpu.decode(active, W)
        found = reference.sparse_gradients(active.by_latent(), residual, x, W)
    torch.testing.assert_close(out, reference.decode(active, W), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found, reference.gradients(active.by_latent(), residual, x, W), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "n", "d", "k"), [(5, 40, 24, 3), (17, 333, 40, 9), (1, 16, 16, 1), (3, 20, 7, 20)])
@pytest.mark.parametrize("precise", [True, False])
def test_encoding_gives_the_k_largest_with_the_lowest_index_first(small_tiles, rows, n, d, k, precise):
    x, W, bias = whole_numbers(rows, n, d)  # small whole numbers are exact in bf16 too, and tie often
    values, indices = triton_encode.topk(x, W, bias, k, precise=precise)
    expected = stable_topk(x @ W.t() + bias, k)
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])


def test_latents_split_over_programs_give_the_same(small_tiles):
    x, W, bias = whole_numbers(4, 1100, 8)
    values, indices = triton_encode.topk(x, W, bias, 5, precise=False)
    expected = stable_topk(x @ W.t() + bias, 5)
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])


@pytest.mark.parametrize("huge", [False, True], ids=["even", "one huge dimension"])
def test_candidates_from_bf16_rescored_are_the_float32_choice(small_tiles, monkeypatch, huge):
    x, W, bias = whole_numbers(17, 200, 24, bits=4 if huge else 9)
    if huge:  # no latent reads it, but rounding it takes away more than what tells latents apart
        x[:, 0], W[:, 0] = 100_001, 0
    again = []
    real = triton_encode._largest
    watch = lambda *a, **o: (again.append(int(o["again"].sum())) if o.get("again") is not None else 0, real(*a, **o))[1]  # noqa: E731
    monkeypatch.setattr(triton_encode, "_largest", watch)
    values, indices = triton_encode.topk(x, W, bias, 6)
    expected = stable_topk(x @ W.t() + bias, 6)
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])
    rounded = x.bfloat16().float() @ W.bfloat16().float().t() + bias
    assert huge or not torch.equal(stable_topk(rounded, 6)[1], expected[1])  # else there was nothing to rescore
    assert again[0] == 17 if huge else again[0] < 17  # rows that the bound could not settle were done again


def test_nan_stands_above_everything_and_stays_in_its_row(small_tiles):
    x, W, bias = whole_numbers(6, 50, 8)
    W[7, 0], W[33, 0], x[2, 3] = float("nan"), float("nan"), float("inf")
    values, indices = triton_encode.topk(x, W, bias, 4)
    expected = stable_topk(x @ W.t() + bias, 4)
    assert indices[0].tolist()[:2] == [7, 33] and torch.equal(indices, expected[1])
    torch.testing.assert_close(values, expected[0], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("precise", [True, False])
def test_entries_above_a_floor_of_each_latent_and_rows_without_room(small_tiles, precise):
    x, W, bias = whole_numbers(9, 70, 12)
    pre = x @ W.t() + bias
    floor = torch.linspace(60, 160, 70, device=DEVICE)
    expected = (pre > floor).nonzero()
    widest = int((pre > floor).sum(1).max())
    rows, latents, values, fits = triton_encode.above(x, W, bias, floor, widest + 1, precise=precise)
    order = (rows * 70 + latents).argsort()
    assert torch.equal(torch.stack([rows, latents], 1)[order], expected) and bool(fits)
    assert torch.equal(values, pre[rows, latents])
    assert not bool(triton_encode.above(x, W, bias, floor, widest - 1, precise=precise)[3])


def test_gradients_through_the_autograd_function_are_those_of_the_dense_one(small_tiles):
    g = torch.Generator().manual_seed(4)
    x = torch.randn(9, 16, generator=g).to(DEVICE)
    leaves = [torch.randn(*s, generator=g).to(DEVICE) for s in ((40, 16), (40,), (40, 16), (16,))]
    ours, theirs = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    with using("triton"):
        (topk_autoencode(x, *ours, k=5)[0] - x).square().mean().backward()
    W_enc, b_enc, W_dec, b_dec = theirs
    dense = reference.topk_codes((x - b_dec) @ W_enc.t() + b_enc, 5) @ W_dec + b_dec
    (dense - x).square().mean().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"project": True, "unit_rows": True}, {"project": True, "norms": 2.0}])
def test_the_update_is_projection_adam_and_norm(options):
    g = torch.Generator().manual_seed(1)
    n, d, rows = 5, 11, 4
    W, m, v = (torch.rand(n, d, generator=g).to(DEVICE) for _ in range(3))
    W = W / W.norm(dim=1, keepdim=True)
    table, weights = torch.randn(rows, d, generator=g).to(DEVICE), torch.randn(7, generator=g).to(DEVICE)
    offsets = torch.tensor([0, 3, 3, 4, 7, 7], dtype=torch.int32, device=DEVICE)
    which = torch.tensor([0, 2, 3, 1, 0, 1, 3], dtype=torch.int32, device=DEVICE)
    gradient = torch.zeros(n, d, device=DEVICE)
    gradient.index_add_(0, torch.tensor([0, 0, 0, 2, 3, 3, 3], device=DEVICE), weights[:, None] * table[which.long()])
    if options.get("project"):
        gradient -= (gradient * W).sum(1, keepdim=True) * W
    expected = torch.nn.Parameter(W.clone())
    optimiser = torch.optim.Adam([expected], lr=1e-2, betas=(0.8, 0.95))
    step = torch.tensor(3.0, device=DEVICE)
    optimiser.state[expected] = {"step": step.cpu() - 1, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    expected.grad = gradient
    optimiser.step()
    theirs = expected.detach()
    if "norms" in options:
        options = {**options, "norms": torch.full((n,), 2.0, device=DEVICE)}
        theirs = 2 * theirs / theirs.norm(dim=1, keepdim=True)
    before = W.clone()
    for moves in (False, True):
        scalars = triton_update.scalars(1e-2, step, (0.8, 0.95), torch.tensor(moves, device=DEVICE))
        triton_update.update((W, m, v), table, which, weights, offsets, scalars, betas=(0.8, 0.95), eps=1e-8, **options)
        torch.testing.assert_close(W, theirs if moves else before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(v, optimiser.state[expected]["exp_avg_sq"])


def tokens(rows: int = 48, d: int = 8) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, d, generator=g) @ torch.randn(d, d, generator=g)


def trained(kernels: str, data: torch.Tensor, **options):
    config = {"d_sae": 24, "batch_size": 16, "lr": 1e-2, "kernels": kernels, "log_every": 2, **options}
    return train(TrainConfig(**config), data, device=DEVICE, quiet=True)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 3},
        {"k": 3, "aux": AuxConfig(coefficient=1 / 32, k=4), "dead": DeadConfig(tokens=20)},
        {"architecture": "batch_topk", "k": 3},
        {"architecture": "jumprelu", "sparsity": SparsityConfig(l0=0.01, l0_target=4.0)},
        {"k": 3, "matryoshka": (8,), "clip": 0.5},
    ],
    ids=["topk", "aux", "batch_topk", "jumprelu", "matryoshka clip"],
)
def test_training_with_triton_takes_the_steps_of_torch(options):
    ours, theirs = (trained(kernels, tokens(), **options) for kernels in ("triton", "torch"))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(getattr(ours.sae, name), getattr(theirs.sae, name), rtol=1e-4, atol=1e-5)
    losses = [[line["loss"] for line in run.history if line["event"] == "train"] for run in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0]


def test_a_batch_whose_tokens_have_no_room_is_selected_from_blocks(monkeypatch):
    monkeypatch.setattr(select, "ROOM_FOR_K", 1)
    fits = []
    above = triton_encode.above
    monkeypatch.setattr(
        triton_encode, "above", lambda *a, **o: (found := above(*a, **o), fits.append(bool(found[3])))[0]
    )
    ours, theirs = (trained(kernels, tokens(), architecture="batch_topk", k=3).sae for kernels in ("triton", "torch"))
    assert ours is not None and theirs is not None and fits and not any(fits)
    torch.testing.assert_close(ours.W_dec, theirs.W_dec, rtol=1e-4, atol=1e-5)


def test_training_in_bf16_stays_near_float32():
    ours, theirs = (trained("triton", tokens(), k=3, precision=p) for p in ("bf16", "fp32"))
    assert ours.metrics["train_loss"] == pytest.approx(theirs.metrics["train_loss"], rel=0.01)
    assert ours.sae is not None and theirs.sae is not None
    assert not torch.equal(ours.sae.W_dec, theirs.sae.W_dec)


def test_data_with_nan_stops_the_run_and_names_the_step():
    data = tokens()
    data[20] = float("nan")
    with pytest.raises(DataError, match=r"step \d: the batch holds NaN"):
        trained("triton", data, k=3, init={"bias": "zeros", "rows": 4}, log_every=3)


class Watch(TorchDispatchMode):
    """What a step makes, and where it would wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.largest, self.waits, self.products = 0, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        ragged = name == "repeat_interleave" and func._overloadname == "Tensor"
        by_mask = name in ("index", "index_put_") and any(
            t is not None and t.dtype is torch.bool for t in args[1] if t is None or isinstance(t, torch.Tensor)
        )
        if name in self.WAITS or ragged or by_mask:
            self.waits.append(str(func))
        self.products += name in ("mm", "addmm", "bmm", "_linear_pointwise")
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_one_product_makes_nothing_of_tokens_by_latents_and_never_waits(small_tiles, monkeypatch, precision):
    n, d, rows = 160, 16, 64
    flops = []
    multiply = InterpreterBuilder.create_dot

    def counted(self, a, b, *rest):
        flops.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return multiply(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    config = TrainConfig(d_sae=n, k=3, batch_size=rows, lr=1e-2, kernels="triton", precision=precision)
    bank = Bank([config], d, device=DEVICE)
    g = torch.Generator().manual_seed(0)
    bank.W_dec.copy_(torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1))
    bank.W_enc.copy_(bank.W_dec)
    x = torch.randn(rows, d, generator=g).to(DEVICE)
    with torch.no_grad(), using("triton"):
        learn(bank, x, Solo(), rows, number=0)
        flops.clear()
        with Watch() as seen:
            learn(bank, x, Solo(), rows, number=1)
        settle(bank)
    expected = estimate(config, d, rows, torch.device("cpu"))
    if DEVICE == "cpu":  # in float32 some rows may be done again
        assert expected.step_flops <= sum(flops) <= expected.step_flops * (1 if precision == "bf16" else 2)
    assert seen.largest < expected.step_bytes
    assert bank.cells[0].failed is None and bank.cells[0].tokens == 2 * rows
    assert seen.waits == [] and seen.products == 0  # the one product is the kernel's
    assert 4 * n * d <= seen.largest < 4 * rows * n / 2


def test_watching_a_step_sees_a_block_of_pre_activations_and_a_wait():
    with Watch() as seen:
        pre = torch.ones(80, 4) @ torch.ones(4, 512)
        float(pre[0, 0])
    assert seen.largest == 4 * 80 * 512 and seen.products == 1 and len(seen.waits) == 1


def started(**options) -> Bank:
    config = TrainConfig(d_sae=24, k=3, batch_size=16, lr=1e-2, kernels="triton", **options)
    bank = Bank([config], 8, device=DEVICE)
    g = torch.Generator().manual_seed(0)
    bank.W_dec.copy_(torch.nn.functional.normalize(torch.randn(24, 8, generator=g), dim=1))
    bank.W_enc.copy_(bank.W_dec)
    return bank


def test_a_step_whose_learning_rate_is_on_the_device_is_the_same():
    banks = [started(), started()]
    banks[1].cells[0].lr = torch.tensor(1e-2, device=DEVICE)  # as in a CUDA graph
    with torch.no_grad(), using("triton"):
        for bank in banks:
            learn(bank, tokens(16).to(DEVICE), Solo(), 16, number=0)
    for name, tensor in banks[0].cells[0].tensors().items():
        torch.testing.assert_close(banks[1].cells[0].tensors()[name], tensor, msg=name)


def test_a_loss_that_is_no_number_moves_nothing_from_its_step_on():
    bank = started()
    x = tokens(16).to(DEVICE)
    with torch.no_grad(), using("triton"):
        learn(bank, x, Solo(), 16, number=0)
        before = {name: tensor.clone() for name, tensor in bank.cells[0].tensors().items() if name[0] in "Wbm"}
        for number, batch in enumerate((x * 1e4, x), start=1):
            learn(bank, batch, Solo(), 16, number=number)
        settle(bank)
    failed = bank.cells[0].failed
    assert failed is not None and "at step 1 " in failed.message
    after = bank.cells[0].tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hubsae.kernels import triton_encode, triton_update

FLOAT, INT = "*fp32", "*i32"


def compiled(kernel, pointers, constants, warps):
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    wide = [n for n in names if types[n].startswith("*") or n in ("d", "n", "rows", "span")]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in wide},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


vectors = dict.fromkeys(("bias", "floor", "x_loss", "x_norm", "w_loss", "w_norm"), FLOAT)
tables = {"x": "*bf16", "weight": "*bf16", "again": INT, "lists": "*i64"}
sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SLOTS": 512, "TOGETHER": 8}
flags = {"FLOOR": False, "BOUND": True, "AGAIN": False, "WIDEN": False}
ptx = compiled(triton_encode._select, vectors | tables, flags | sizes, 8)
assert "wgmma.mma_async" in ptx and "cp.async" in ptx
state = dict.fromkeys(("weight", "m", "v", "weights", "norms", "scalars"), FLOAT)
state |= dict.fromkeys(("rest1", "beta2", "rest2", "eps"), "fp32")
state |= {"table": "*bf16", "rows": INT, "offsets": INT}
ptx = compiled(triton_update._update, state, {"PROJECT": True, "UNIT_ROWS": False, "NORM": True, "BLOCK": 4096}, 8)
assert "ld.global.v4.b32" in ptx and "atom" not in ptx
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100_to_tensor_cores_and_asynchronous_copies():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "compiled", done.stderr
