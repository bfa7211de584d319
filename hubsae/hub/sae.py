"""HubSAE: an SAE with what users do with it: load, publish, attach to a model, hand over to SAELens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import nn

from hubsae.core import intervene
from hubsae.core.intervene import Recorded
from hubsae.core.sae import SAE


class HubSAE(SAE):
    """A sparse autoencoder in the canonical form, to load, use and publish.

    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2), seed=0)
    >>> sae.config.k
    2
    """

    # ---- in a model -------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, hook: Any = None) -> AbstractContextManager[Recorded]:
        """Read the codes at the SAE's hook point during forwards: `with sae.attach(model) as acts: ...`."""
        return intervene.attach(self, model, hook)

    def splice(self, model: nn.Module, hook: Any = None, **options: Any) -> AbstractContextManager[None]:
        """Replace the activations by their reconstruction while the context lasts."""
        return intervene.splice(self, model, hook, **options)

    def steer(
        self, model: nn.Module, feature: int, strength: float, hook: Any = None, **options: Any
    ) -> AbstractContextManager[None]:
        """Add `strength` times a feature's decoder direction to the activations."""
        return intervene.steer(self, model, feature, strength, hook, **options)

    # ---- elsewhere ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, repo_or_path: str | os.PathLike[str], id: str | None = None, **options: Any) -> HubSAE:
        """Load one SAE from the Hub or a local folder.

        `revision, token, cache_dir, local_files_only, force_download, subfolder, device, dtype, features` as
        usual; `layer=`, `stage=`, `k=` and other fields of the release choose where no id is given.
        """
        from hubsae.hub.load import load_pretrained

        return cast("HubSAE", load_pretrained(repo_or_path, id, **options))

    @classmethod
    def iter_pretrained(cls, repo_or_path: str | os.PathLike[str], **options: Any) -> Iterator[tuple[str, HubSAE]]:
        """Every SAE of a release that fits the filters, one at a time, with its id."""
        from hubsae.hub.load import iter_pretrained

        return cast("Iterator[tuple[str, HubSAE]]", iter_pretrained(repo_or_path, **options))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write this SAE as a folder that hubsae and SAELens load."""
        from hubsae.formats.native import write

        write(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish this SAE as a release of its own."""
        from hubsae.hub.push import push_sae

        return push_sae(self, repo_id, **options)

    def to_saelens(self) -> Any:
        """The same SAE as a SAELens object, where SAELens can express it."""
        from hubsae.formats.saelens import to_saelens

        return to_saelens(self)

    @classmethod
    def from_saelens(cls, sae: Any) -> HubSAE:
        """A SAELens SAE (inference or training class) as a HubSAE."""
        from hubsae.formats.saelens import from_saelens

        return cast("HubSAE", from_saelens(sae))
