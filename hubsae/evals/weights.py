"""How far an SAE's directions moved between two stages: cosines per latent, by index or by assignment."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.core.errors import DataError
from hubsae.core.extras import require
from hubsae.core.sae import SAE

Matching = Literal["auto", "index", "hungarian"]
# "auto" looks up this many latents, and trusts the index when most of them are nearest to their own.
PROBES = 512
# An assignment over more latents than this needs more than 8 GB.
MOST_ASSIGNED = 30_000


class Movement(NamedTuple):
    """Cosines of the latents of one SAE with those of an earlier one."""

    matching: str
    """index or hungarian"""
    partner: Tensor
    """[matched] index in the earlier SAE"""
    latent: Tensor
    """[matched] index in this SAE"""
    decoder: Tensor
    """[matched] cosine of decoder rows; 0 where a row is zero"""
    encoder: Tensor
    """[matched] cosine of encoder columns"""

    @property
    def kept_index(self) -> float:
        """Share of latents matched to the one with their own index."""
        return float((self.partner == self.latent).double().mean())

    def correlation(self) -> float | None:
        """Pearson r between decoder and encoder cosines; None where one of them does not vary."""
        a, b = self.decoder.double(), self.encoder.double()
        a, b = a - a.mean(), b - b.mean()
        scale = float(a.norm() * b.norm())
        return float(a @ b) / scale if scale > 1e-12 else None

    def quadrants(self) -> dict[str, int]:
        """Latents by a median split of both cosines."""
        high_dec = self.decoder > self.decoder.median()
        high_enc = self.encoder > self.encoder.median()
        return {
            "stable": int((high_dec & high_enc).sum()),
            "reweighted": int((high_dec & ~high_enc).sum()),
            "redirected": int((~high_dec & high_enc).sum()),
            "rotated": int((~high_dec & ~high_enc).sum()),
        }


def unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to norm one; zero rows stay zero."""
    wide = rows.detach().float()
    norms = wide.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, wide / norms.clamp_min(1e-30), 0.0)


def movement(now: SAE, before: SAE, *, match: Matching = "auto", seed: int = 0) -> Movement:
    """Compare an SAE with an earlier one.

    By index where latents keep it (a warm-started chain), by Hungarian assignment on the decoder cosines
    where they do not; "auto" looks whether most latents are still nearest to their own index.

    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2))
    >>> moved = movement(sae, sae)
    >>> moved.matching, round(float(moved.decoder.mean()), 6)
    ('index', 1.0)
    """
    if now.d_in != before.d_in:
        raise DataError(f"SAEs of widths {before.d_in} and {now.d_in} cannot be compared")
    new, old = unit_rows(now.W_dec), unit_rows(before.W_dec).to(now.device)
    how = match
    if match == "auto":
        how = "index" if now.d_sae == before.d_sae and _index_holds(new, old, seed) else "hungarian"
    if how == "index":
        if now.d_sae != before.d_sae:
            raise DataError(
                f"{before.d_sae} and {now.d_sae} latents cannot be matched by index", hint="use match='hungarian'"
            )
        latent = partner = torch.arange(now.d_sae)
    else:
        latent, partner = _assign(new, old)
    enc_new, enc_old = unit_rows(now.W_enc.t()), unit_rows(before.W_enc.t()).to(now.device)
    here, there = latent.to(now.device), partner.to(now.device)
    return Movement(
        matching=how,
        partner=partner,
        latent=latent,
        decoder=torch.linalg.vecdot(new[here], old[there]).clamp(-1, 1).cpu(),
        encoder=torch.linalg.vecdot(enc_new[here], enc_old[there]).clamp(-1, 1).cpu(),
    )


def _index_holds(new: Tensor, old: Tensor, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randperm(new.shape[0], generator=generator)[:PROBES].to(new.device)
    nearest = (new[probes] @ old.t()).argmax(1)
    return bool((nearest == probes).double().mean() >= 0.5)


def _assign(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    optimize = require("scipy.optimize", extra="train")
    if max(new.shape[0], old.shape[0]) > MOST_ASSIGNED:
        raise DataError(
            f"assigning {new.shape[0]} to {old.shape[0]} latents needs more memory than is sensible",
            hint=f"up to {MOST_ASSIGNED} latents can be assigned; match='index' where a warm start keeps indices",
        )
    rows, columns = optimize.linear_sum_assignment((new @ old.t()).cpu().numpy(), maximize=True)
    return torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(columns))
