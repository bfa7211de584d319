"""Metrics of SAEs while they train: what the exported SAEs do on validation rows, one pass for all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.train import data

# rows encoded at once
BLOCK = 4096


def measure(
    saes: Mapping[str, SAE], val: data.Source, selection: data.TokenSelection, *, limit: int
) -> dict[str, dict[str, float]]:
    """Metrics by name of the SAE over up to `limit` rows that take part; errors are those of raw activations."""
    device = next(iter(saes.values())).device
    squares = dict.fromkeys(saes, 0.0)
    fired = {name: torch.zeros(sae.d_sae, dtype=torch.int64, device=device) for name, sae in saes.items()}
    total = torch.zeros(val.d, dtype=torch.float64, device=device)
    spread, rows, shift = torch.zeros_like(total), 0, None
    for part in data.every_row(val, min(BLOCK, val.n_rows), selection):
        x = part.to(device, torch.float32)[: limit - rows]
        for name, sae in saes.items():
            codes = sae.encode_sparse(x, sorted=False)
            squares[name] += float((sae.decode(codes) - x).double().square().sum())
            fired[name] += torch.bincount(codes.indices[codes.values != 0], minlength=sae.d_sae)
        wide = x.double()
        shift = wide.mean(0) if shift is None else shift  # deviations from a near mean keep their digits
        total, spread = total + (wide - shift).sum(0), spread + (wide - shift).square().sum(0)
        rows += len(x)
        if rows >= limit:
            break
    if rows == 0:
        raise DataError("every validation token is left out", hint="leave out fewer (exclude, max_norm_factor)")
    variance = float((spread - total**2 / rows).sum())
    return {
        name: {
            "val_mse": squares[name] / (rows * val.d),
            "val_fvu": squares[name] / max(variance, 1e-30),
            "val_l0": float(fired[name].sum()) / rows,
            "val_dead": float((fired[name] == 0).double().mean()),
            "val_rows": rows,
        }
        for name in saes
    }
