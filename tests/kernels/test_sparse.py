"""Sparse decode and gradients against the dense reference, in float64, and by finite differences."""

import pytest
import reference
import torch

from hubsae.kernels import cpu
from hubsae.kernels.active import ActiveSet
from hubsae.kernels.function import topk_autoencode


def problem(rows=12, n=40, d=9, nnz=70, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    flat = torch.randperm(rows * n, generator=g)[:nnz].sort().values
    values = torch.randn(nnz, generator=g, dtype=dtype)
    active = ActiveSet.from_entries(flat // n, flat % n, values, rows, n)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    return active, make(n, d), make(rows, d), make(rows, d)


@pytest.mark.parametrize("nnz", [0, 1, 70, 480])
def test_decode_equals_the_dense_product(nnz):
    active, W_dec, _, _ = problem(nnz=nnz)
    torch.testing.assert_close(cpu.decode(active, W_dec), reference.decode(active, W_dec))


@pytest.mark.parametrize("nnz", [0, 1, 70, 480])
def test_sparse_gradients_equal_dense_ones(nnz):
    active, W_dec, residual, x = problem(nnz=nnz)
    entries = active.by_latent()
    for ours, theirs in zip(
        reference.sparse_gradients(entries, residual, x, W_dec),
        reference.gradients(entries, residual, x, W_dec),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradients_equal_autograd_of_the_dense_loss():
    active, W_dec, _, x = problem()
    W_dec.requires_grad_()
    z = torch.zeros(active.n_rows, active.n_latents, dtype=torch.float64)
    z[active.rows.long(), active.latents.long()] = active.values
    z.requires_grad_()
    loss = (z @ W_dec - x).square().sum()
    loss.backward()
    residual = 2 * (cpu.decode(active, W_dec.detach()) - x)
    entries = active.by_latent()
    dz, _, gW_dec, _ = reference.sparse_gradients(entries, residual, x, W_dec.detach())
    latents = torch.repeat_interleave(torch.arange(40), entries.offsets.diff())
    assert z.grad is not None
    torch.testing.assert_close(dz, z.grad[entries.rows.long(), latents])
    torch.testing.assert_close(gW_dec, W_dec.grad)


def test_segment_sums_do_not_lose_small_segments_behind_large_ones():
    values = torch.tensor([1e8, -3e7, 1e-3, 2e-3, 5e8])
    sums = cpu.segment_sum(values, torch.tensor([0, 2, 4, 4, 5], dtype=torch.int32))
    torch.testing.assert_close(sums, torch.tensor([7e7, 3e-3, 0.0, 5e8]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("relu", [True, False])
def test_autograd_function_passes_gradcheck(relu):
    g = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    x, W_enc, b_enc, W_dec, b_dec = make(5, 4), make(12, 4), make(12), make(12, 4), make(4)

    def call(*args):
        out, values, _ = topk_autoencode(*args, k=3, relu=relu)
        return out, values

    assert torch.autograd.gradcheck(call, (x, W_enc, b_enc, W_dec, b_dec), eps=1e-7, atol=1e-6)


def test_autograd_function_equals_the_dense_reference():
    g = torch.Generator().manual_seed(4)
    x = torch.randn(33, 16, generator=g)
    leaves = [torch.randn(*s, generator=g) for s in ((64, 16), (64,), (64, 16), (16,))]
    ours, theirs = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    out, _, _ = topk_autoencode(x, *ours, k=5)
    (out - x).square().mean().backward()
    W_enc, b_enc, W_dec, b_dec = theirs
    dense = reference.topk_codes((x - b_dec) @ W_enc.t() + b_enc, 5) @ W_dec + b_dec
    (dense - x).square().mean().backward()
    for mine, reference_leaf in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference_leaf.grad, rtol=1e-4, atol=1e-6)
