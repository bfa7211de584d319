"""One thread: at these sizes a second one only waits for the first."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sparse_data(rows: int, d: int = 32, true: int = 64, active: float = 0.05, seed: int = 0) -> torch.Tensor:
    """Sparse sums of fixed directions around a mean: what an SAE can learn."""
    fixed = torch.Generator().manual_seed(1234)
    directions = torch.randn(true, d, generator=fixed)
    directions /= directions.norm(dim=1, keepdim=True)
    g = torch.Generator().manual_seed(seed)
    strength = (torch.rand(rows, true, generator=g) + 0.5) * (torch.rand(rows, true, generator=g) < active)
    return strength @ directions + 0.5


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return sparse_data(4096)


@pytest.fixture(scope="session")
def held_out() -> torch.Tensor:
    return sparse_data(512, seed=1)
