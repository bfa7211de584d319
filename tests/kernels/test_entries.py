"""Finding and ordering entries with numpy gives what PyTorch's operators give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsae.kernels import entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.5, torch.linspace(-1, 2, 40)])
def test_entries_above_a_threshold(dtype, threshold):
    pre = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    bound = threshold.to(dtype) if isinstance(threshold, torch.Tensor) else threshold
    mask = entries.above(pre, bound)
    assert torch.equal(mask, pre > bound) and entries.count(mask) == int((pre > bound).sum()) > 0
    rows, columns, values = entries.at(pre, mask)
    expected = (pre > bound).nonzero(as_tuple=True)
    assert torch.equal(rows, expected[0]) and torch.equal(columns, expected[1]) and torch.equal(values, pre[expected])


@settings(max_examples=60, deadline=None)
@given(m=st.integers(2, 400), share=st.floats(0.01, 0.99), levels=st.integers(1, 50), seed=st.integers(0, 9))
def test_largest_with_ties_takes_the_first_of_equals(m, share, levels, seed):
    count = min(m - 1, max(1, int(m * share)))
    values = torch.randint(-levels, levels, (m,), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.sort(values, descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(entries.largest(values, count), expected)


@pytest.mark.parametrize("limit", [7, 40_000, 65_536, 65_537, 1 << 20])
def test_order_is_stable_for_narrow_and_wide_keys(limit):
    keys = torch.randint(limit, (5000,), generator=torch.Generator().manual_seed(1)).int()
    keys[:3] = torch.tensor([limit - 1, 0, limit - 1])
    assert torch.equal(entries.stable_order(keys, limit), torch.sort(keys, stable=True).indices)
