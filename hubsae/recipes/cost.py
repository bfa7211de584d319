"""What the steps of recipes are counted with, for `--dry-run`: machines with their rates, passes of a model, sizes.

Published models are thought of on one H200, worlds on two cores. No rate of the H200 was measured on one.
"""

from __future__ import annotations

from dataclasses import dataclass

from hubsae.recipes.subject import WORLDS, ModelSettings

DISK = 2e9
"""Bytes a second that a disk reads or writes."""


@dataclass(frozen=True)
class Machine:
    """What a run is thought of on."""

    name: str
    flops: float
    """Floating-point operations a second that passes of a model reach there"""
    weight: int
    """Bytes of a weight of the model"""
    device: str


GPU, CPU = Machine("one H200", 4e14, 2, "cuda"), Machine("two cores", 1e11, 4, "cpu")


def machine_of(model: ModelSettings) -> Machine:
    """The machine for a model.

    >>> machine_of(ModelSettings(id="small")).name, machine_of(ModelSettings(id="Qwen/Qwen3-8B")).name
    ('two cores', 'one H200')
    """
    return CPU if model.id in WORLDS else GPU


def forward(model: ModelSettings, layer: int | None = None) -> float:
    """Operations on one token, through the whole model or up to a layer: two per weight.

    >>> forward(ModelSettings(id="tiny", parameters=1000, layers=4), layer=1)
    1000.0
    """
    return 2.0 * model.parameters * (1.0 if layer is None else (layer + 1) / model.layers)


def sae_bytes(d: int, width: int) -> int:
    """An SAE in float32, its matrices.

    >>> sae_bytes(896, 7168)
    51380224
    """
    return 8 * d * width
