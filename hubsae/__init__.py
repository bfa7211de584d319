"""Publish and load sparse autoencoders on the Hugging Face Hub.

Names are resolved on first use, so that `import hubsae` costs next to nothing and imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hubsae.core import factory
from hubsae.version import __version__

if TYPE_CHECKING:
    from hubsae.activations.harvesting import harvest
    from hubsae.core.codes import SparseCodes
    from hubsae.core.config import SAEConfig
    from hubsae.core.errors import HubSAEError
    from hubsae.core.hooks import HookPoint
    from hubsae.core.metadata import Metadata
    from hubsae.core.normalizer import Normalizer
    from hubsae.formats.package import package
    from hubsae.formats.registry import convert
    from hubsae.formats.release import Release
    from hubsae.hub.activations import ActivationDataset
    from hubsae.hub.converter import saelens_converter
    from hubsae.hub.cross_layer import read_cross_layer
    from hubsae.hub.listing import list_saes
    from hubsae.hub.load import pull
    from hubsae.hub.probe import load_probe
    from hubsae.hub.push import push
    from hubsae.hub.sae import HubSAE
    from hubsae.train.config import TrainConfig

__all__ = [
    "ActivationDataset",
    "HookPoint",
    "HubSAE",
    "HubSAEError",
    "Metadata",
    "Normalizer",
    "Release",
    "SAEConfig",
    "SparseCodes",
    "TrainConfig",
    "__version__",
    "convert",
    "harvest",
    "list_saes",
    "load_probe",
    "package",
    "pull",
    "push",
    "read_cross_layer",
    "saelens_converter",
]

# public name -> the module that defines it
_HOME = {
    "ActivationDataset": "hubsae.hub.activations",
    "HookPoint": "hubsae.core.hooks",
    "HubSAE": "hubsae.hub.sae",
    "HubSAEError": "hubsae.core.errors",
    "Metadata": "hubsae.core.metadata",
    "Normalizer": "hubsae.core.normalizer",
    "Release": "hubsae.formats.release",
    "SAEConfig": "hubsae.core.config",
    "SparseCodes": "hubsae.core.codes",
    "TrainConfig": "hubsae.train.config",
    "convert": "hubsae.formats.registry",
    "harvest": "hubsae.activations.harvesting",
    "list_saes": "hubsae.hub.listing",
    "load_probe": "hubsae.hub.probe",
    "package": "hubsae.formats.package",
    "pull": "hubsae.hub.load",
    "push": "hubsae.hub.push",
    "read_cross_layer": "hubsae.hub.cross_layer",
    "saelens_converter": "hubsae.hub.converter",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        try:  # a room, such as hubsae.localhub
            return import_module(f"hubsae.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"hubsae.{name}":
                raise
            raise AttributeError(f"module 'hubsae' has no attribute {name!r}") from None
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


factory.provide("SAE", lambda: __getattr__("HubSAE"))
factory.provide("ActivationDataset", lambda: __getattr__("ActivationDataset"))


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
