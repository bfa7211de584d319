"""Activations: harvest them from a model, publish them as a dataset, read them at disk speed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubsae.activations.activation_set import ActivationSet, PairedActivations
    from hubsae.activations.dataset import ActivationDataset
    from hubsae.activations.harvesting import harvest
    from hubsae.activations.manifest import describe, finalize
    from hubsae.activations.splits import SplitRule
    from hubsae.activations.stats import ActivationStats
    from hubsae.activations.writer import ActivationWriter, scale_for

_HOMES = {
    "ActivationDataset": "dataset",
    "ActivationSet": "activation_set",
    "PairedActivations": "activation_set",
    "ActivationStats": "stats",
    "ActivationWriter": "writer",
    "SplitRule": "splits",
    "describe": "manifest",
    "finalize": "manifest",
    "harvest": "harvesting",
    "scale_for": "writer",
}
__all__ = [
    "ActivationDataset",
    "ActivationSet",
    "ActivationStats",
    "ActivationWriter",
    "PairedActivations",
    "SplitRule",
    "describe",
    "finalize",
    "harvest",
    "scale_for",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
