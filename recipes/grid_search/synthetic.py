"""Synthetic activations whose true features are known: a check on the trainer that no real model can give.

    x = Σ_i a_i f_i + bias        f [features, d] unit directions, of which each token has a few active
                                  a_i > 0, feature i active with its own probability, common ones to rare ones

An SAE is right when its decoder holds the directions f: a true feature counts as recovered when some decoder row
has a cosine above 0.9 with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hubsae.core.errors import ConfigError
from hubsae.recipes.sweep import cells_in, train_cells

from .cells import Cell, parse_id
from .configs import train_configs
from .settings import SyntheticSettings, TrainSettings

COSINE = 0.9
"""A true direction counts as recovered above this cosine with its nearest decoder row."""


class World(NamedTuple):
    """The truth behind synthetic activations."""

    directions: Tensor
    """[features, d] unit norm"""
    rates: Tensor
    """[features] probability that a feature is active on a token, falling"""
    bias: Tensor
    """[d]"""

    @property
    def l0(self) -> float:
        """Features active per token, on average."""
        return float(self.rates.sum())


class Recovery(NamedTuple):
    """What one SAE found of the truth."""

    cell: Cell
    d_sae: int
    fraction: float
    """Share of true directions whose best cosine is above COSINE."""
    mean_cosine: float
    """Mean over true directions of their best cosine."""
    at_most: float
    """The share that this many latents could hold: min(1, d_sae / features)."""
    fvu: float | None
    l0: float | None

    def row(self) -> dict[str, Any]:
        """For a table."""
        numbers = {name: getattr(self, name) for name in self._fields[1:]}
        return {"id": self.cell.id, **{k: round(v, 5) if isinstance(v, float) else v for k, v in numbers.items()}}


def make_world(d: int, features: int, l0: float, *, spread: float = 4.0, seed: int = 0) -> World:
    """Draw the truth: unit directions, and rates that fall by `spread` from the commonest feature to the rarest.

    >>> world = make_world(16, 32, 3.0)
    >>> world.directions.shape, round(world.l0, 3)
    (torch.Size([32, 16]), 3.0)
    """
    if not 0 < l0 < features:
        raise ConfigError(f"{l0} features active per token is not between 0 and the {features} there are")
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(features, d, generator=generator), dim=1)
    rates = spread ** -torch.linspace(0, 1, features)
    rates = rates * (l0 / rates.sum())
    if float(rates.max()) > 1:
        raise ConfigError(f"{features} features cannot have {l0} active with a spread of {spread}", hint="lower l0")
    return World(directions, rates, 0.5 * torch.randn(d, generator=generator))


def draw(world: World, tokens: int, *, noise: float = 0.0, seed: int = 1) -> Tensor:
    """`tokens` activations [tokens, d] of a world; amounts are uniform in [0.5, 1.5].

    >>> draw(make_world(16, 32, 3.0), 5).shape
    torch.Size([5, 16])
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, tokens, 8192):  # a block of codes at a time: [8192, features]
        rows = min(8192, tokens - start)
        on = torch.rand(rows, len(world.rates), generator=generator) < world.rates
        codes = on * (0.5 + torch.rand(rows, len(world.rates), generator=generator))
        x = codes @ world.directions + world.bias
        parts.append(x + noise * torch.randn(x.shape, generator=generator) if noise else x)
    return torch.cat(parts)


def recovered(directions: Tensor, decoder: Tensor) -> tuple[float, float]:
    """Share of true directions found by a decoder [d_sae, d], and the mean of their best cosines.

    >>> truth = torch.eye(4)
    >>> recovered(truth, torch.tensor([[2.0, 0, 0, 0], [0, 3.0, 0.1, 0]]))[0]
    0.5
    """
    best = torch.full((directions.shape[0],), -1.0)
    truth = normalize(directions.float(), dim=1)
    for block in decoder.detach().float().split(16384):  # [features, 16384] cosines at a time
        best = torch.maximum(best, (truth @ normalize(block, dim=1).T).amax(1))
    return float((best > COSINE).float().mean()), float(best.mean())


def recover(
    s: SyntheticSettings, training: TrainSettings, seed: int, folder: Path, progress: Any = None
) -> list[Recovery]:
    """Train every cell of the settings on data with known features, and count what came out."""
    world = make_world(s.d_in, s.features, s.l0, spread=s.spread, seed=seed)
    x = draw(world, s.tokens, noise=s.noise, seed=seed + 1)
    held = draw(world, 8192, noise=s.noise, seed=seed + 2)
    settings = TrainSettings(
        epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, jumprelu=training.jumprelu, memory_gb=training.memory_gb
    )
    configs = train_configs(s.sweep().cells(), settings, x, seed=seed)
    ended = train_cells(configs, x, folder, memory=settings.memory_bytes, progress=progress)
    found = []
    for cell in (parse_id(outcome.id) for outcome in ended if outcome.ok):
        sae = cells_in(folder).get(cell.id)
        fraction, cosine = recovered(world.directions, sae.W_dec)
        codes = sae.encode_sparse(held)
        fvu = float((held - sae.decode(codes)).square().sum() / (held - held.mean(0)).square().sum())
        l0 = float((codes.values != 0).sum() / len(held))
        found.append(Recovery(cell, sae.d_sae, fraction, cosine, min(1.0, sae.d_sae / s.features), fvu, l0))
    return found
