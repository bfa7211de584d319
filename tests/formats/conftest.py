"""Shared by the format tests: a strict comparison with a peer's own numbers, and weights to compare with."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hubsae import HubSAE

D_IN, D_SAE, K, TOKENS = 48, 192, 6, 257


class Difference(NamedTuple):
    """How far two SAEs are apart on the same tokens."""

    rows_with_other_support: int
    latents: float
    reconstruction: float


@pytest.fixture(scope="session")
def same() -> Callable[..., Difference]:
    """assert that a HubSAE has a peer's latents (same support) and reconstruction (relative error <= 1e-6)."""

    def check(sae: HubSAE, x: Tensor, latents: Tensor, reconstruction: Tensor, *, atol: float = 2e-5) -> Difference:
        with torch.no_grad():
            mine, rebuilt = sae.encode(x), sae(x)
        latents, reconstruction = latents.detach().float(), reconstruction.detach().float()
        assert mine.shape == latents.shape
        assert int((latents != 0).sum()) > 0, "the peer's latents are all zero: the comparison would say nothing"
        other = int(((mine != 0) != (latents != 0)).any(-1).sum())
        scale = float(latents.abs().max().clamp_min(1))
        found = Difference(
            other,
            float((mine - latents).abs().max()) / scale,
            float((rebuilt - reconstruction).norm() / reconstruction.norm()),
        )
        assert other == 0, found
        assert found.latents <= atol, found
        assert found.reconstruction <= 1e-6, found
        return found

    return check


@pytest.fixture(scope="session")
def x() -> Tensor:
    """Activations with a mean, so that subtracting a bias matters."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(TOKENS, D_IN, generator=generator) + 0.5 * torch.randn(D_IN, generator=generator)


@pytest.fixture
def rand() -> Callable[..., Tensor]:
    """Random tensors of a given shape, the same in every run."""
    generator = torch.Generator().manual_seed(11)
    return lambda *shape, scale=1.0: torch.randn(*shape, generator=generator) * scale


@pytest.fixture(scope="session")
def dl() -> types.ModuleType:
    """dictionary_learning, whose package imports an engine for language models that its dictionaries do not use."""
    if "dictionary_learning" not in sys.modules:
        try:
            import dictionary_learning  # noqa: F401
        except ImportError:
            pytest.skip("dictionary_learning cannot be imported here")
    return sys.modules["dictionary_learning"]
