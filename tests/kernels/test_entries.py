"""Finding and ordering entries with numpy gives what PyTorch's operators give."""

import pytest
import torch

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


@pytest.mark.parametrize("limit", [7, 40_000, 65_536, 65_537, 1 << 20])
def test_order_is_stable_for_narrow_and_wide_keys(limit):
    keys = torch.randint(limit, (5000,), generator=torch.Generator().manual_seed(1)).int()
    keys[:3] = torch.tensor([limit - 1, 0, limit - 1])
    assert torch.equal(entries.stable_order(keys, limit), torch.sort(keys, stable=True).indices)
