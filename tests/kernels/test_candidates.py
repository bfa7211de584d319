"""The top-k by way of a bf16 product is the top-k of the float32 product, whatever the numbers look like."""

import pytest
import torch

from hubsae.kernels import select, using
from hubsae.kernels.linear import linear

pytest.importorskip("numba")
from hubsae.kernels import candidates

ROWS, D, N, K = 200, 256, 2048, 24


def numbers(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(ROWS, D, generator=g), torch.randn(N, D, generator=g) / D**0.5
    b = torch.zeros(N)
    if kind == "bias":
        b = torch.randn(N, generator=g)
    elif kind == "norms of latents differ":
        W *= torch.rand(N, 1, generator=g) * 4 + 0.05
    elif kind == "common mean":
        x += torch.randn(D, generator=g)
    elif kind == "sparse directions":
        x = torch.zeros(ROWS, D).scatter_(1, torch.randint(0, D, (ROWS, 6), generator=g), 3.0)
    elif kind == "a huge dimension":
        x[:, 7] = 30.0
    elif kind == "all negative":
        b = torch.full((N,), -9.0)
    elif kind == "tiny":
        x, W = x * 1e-12, W * 1e-12
    return x, W, b


@pytest.mark.parametrize(
    "kind",
    ["plain", "bias", "norms of latents differ", "common mean", "sparse directions", "a huge dimension",
     "all negative", "tiny"],
)  # fmt: skip
def test_the_set_is_that_of_the_exact_product(kind):
    x, W, b = numbers(kind)
    found = candidates.encode_topk(x, W, b, K)
    assert found is not None
    values, indices = found
    exact = x.double() @ W.double().T + b.double()
    assert all(len(set(row)) == K for row in indices.tolist())
    # values are float32 dot products
    tolerance = 1e-6 * (x.norm(dim=1, keepdim=True) * W.norm(dim=1).max() + b.abs().max())
    assert bool(((exact.gather(1, indices) - values).abs() <= tolerance).all())
    # nothing outside is larger than what was chosen, beyond the rounding of float32
    rest = exact.scatter(1, indices, -torch.inf).amax(1, keepdim=True)
    assert bool((exact.gather(1, indices).amin(1, keepdim=True) >= rest - 2 * tolerance).all())


def test_bf16_alone_would_choose_otherwise():
    """The rescoring is not for nothing: the rounded product has another top-k on many rows."""
    x, W, b = numbers("plain")
    rounded = (x.bfloat16() @ W.bfloat16().T).float().topk(K).indices.sort(1).values
    found = candidates.encode_topk(x, W, b, K)
    assert found is not None
    ours = found[1].sort(1).values
    assert float((rounded == ours).all(1).float().mean()) < 0.9
    assert float((linear(x, W, b).topk(K).indices.sort(1).values == ours).all(1).float().mean()) > 0.99


def test_where_the_bound_is_too_wide_it_says_so():
    x, W, b = numbers("plain")
    x[:, 3] = 3000.0
    W[:, 3] = 0.0
    assert candidates.encode_topk(x, W, b, K) is None


def test_rows_with_nan_do_not_spoil_the_others():
    x, W, b = numbers("plain")
    x[5, 0] = torch.nan
    found = candidates.encode_topk(x, W, b, K)
    assert found is not None
    clean = [r for r in range(ROWS) if r != 5]
    expected = select.topk(linear(x, W, b), K)
    assert found[0][5].isnan().all()
    assert torch.allclose(found[0][clean].sort(1).values, expected[0][clean].sort(1).values, atol=1e-5)


def test_equal_latents_are_counted_once_each():
    x, W, b = numbers("plain")
    W[1024:] = W[:1024]
    found = candidates.encode_topk(x, W, b, K)
    assert found is not None
    assert all(len(set(row)) == K for row in found[1].tolist())
    assert torch.allclose(found[0].sort(1).values, linear(x, W, b).topk(K).values.sort(1).values, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 1300])
def test_any_number_of_rows(rows):
    g = torch.Generator().manual_seed(1)
    x, W, b = torch.randn(rows, D, generator=g), torch.randn(N, D, generator=g), torch.randn(N, generator=g)
    found = candidates.encode_topk(x, W, b, K)
    assert found is not None
    assert torch.allclose(found[0].sort(1).values, linear(x, W, b).topk(K).values.sort(1).values, atol=1e-4)


def test_same_bits_twice_and_whatever_the_threads():
    x, W, b = numbers("plain")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(candidates.encode_topk(x, W, b, K))
    finally:
        torch.set_num_threads(before)
    first = results[0]
    assert first is not None
    for other in results[1:]:
        assert other is not None and torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


def test_it_is_asked_only_where_it_may_pay():
    x, W, _ = numbers("plain")
    assert not select.halves(x, W, K), "without the kernels 'numba'"
    with using("numba"):
        assert not select.halves(x[:, :100].contiguous(), W[:, :100].contiguous(), K), "a narrow input"
        assert not select.halves(x, W[:1000], K), "few latents"
        assert not select.halves(x.double(), W.double(), K)
