"""Selection is exact: the same set as torch.topk, whatever the shape, ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsae.kernels import select


@pytest.mark.parametrize(
    ("rows", "n", "k"), [(7, 7168, 64), (3, 4096, 220), (5, 1000, 7), (4, 130, 130), (1, 17, 3), (2, 2052, 1)]
)
def test_topk_is_the_k_largest(rows, n, k):
    pre = torch.randn(rows, n, generator=torch.Generator().manual_seed(n + k))
    values, indices = select.topk(pre, k)
    expected = pre.topk(k, dim=1).values
    assert torch.equal(values.sort(1, descending=True).values, expected)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3000), share=st.floats(0.001, 1.0), levels=st.integers(1, 6), seed=st.integers(0, 9))
def test_topk_with_many_ties_picks_distinct_latents_of_the_right_values(n, share, levels, seed):
    k = max(1, int(n * share))
    g = torch.Generator().manual_seed(seed)
    pre = torch.randint(-levels, levels, (3, n), generator=g).float()
    values, indices = select.topk(pre, k)
    assert torch.equal(values.sort(1, descending=True).values, pre.topk(k, dim=1).values)
    assert torch.equal(pre.gather(1, indices), values)
    stable = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(indices.sort(1).values, stable.sort(1).values)  # each once, the lowest index first


def test_nan_in_a_row_stays_in_its_row_and_indices_stay_in_range():
    pre = torch.randn(4, 4096)
    pre[2] = float("nan")
    values, indices = select.topk(pre, 8)
    assert values[2].isnan().all() and int(indices.min()) >= 0 and int(indices.max()) < 4096
    assert torch.equal(values[:2].sort(1, descending=True).values, pre[:2].topk(8).values)


def test_sorted_topk_comes_largest_first():
    pre = torch.randn(5, 7168)
    values, indices = select.topk(pre, 32, sorted=True)
    assert torch.equal(values, pre.topk(32).values) and torch.equal(indices, pre.topk(32).indices)
