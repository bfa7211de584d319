"""HubSAE: an SAE with what users do with it: load, publish, attach to a model, hand over to SAELens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from hubsae.core import intervene
from hubsae.core.errors import named_options
from hubsae.core.intervene import Recorded
from hubsae.core.sae import SAE

if TYPE_CHECKING:
    from hubsae.hub.plan import PushPlan, PushResult


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

    @named_options
    def push_to_hub(
        self,
        repo_id: str,
        *,
        id: str | None = None,
        revision: str | None = None,
        tag: str | None = None,
        pr: bool = False,
        private: bool | None = None,
        message: str | None = None,
        base_model: str | None = None,
        license: str | None = None,
        datasets: str | Sequence[str] | None = None,
        description: str | None = None,
        activations: str | os.PathLike[str] | Tensor | None = None,
        also: Sequence[str] = (),
        prune: bool = False,
        delete: Sequence[str] = (),
        overwrite_config: bool = False,
        title: str | None = None,
        citation: str | None = None,
        limitations: Sequence[str] | None = None,
        card_template: str | os.PathLike[str] | None = None,
        card_kind: str | None = None,
        force_card: bool = False,
        check_saelens: bool = True,
        allow_secrets: bool = False,
        dry_run: bool = False,
        confirm: Callable[[PushPlan], bool] | None = None,
        notify: Callable[[str], None] | None = None,
        bar: bool | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
    ) -> PushResult:
        """Publish this SAE as a release, in one commit or not at all; as `hubsae.push(sae, repo_id)`.

        Where to:
            repo_id: `name/repo`.
            id: its name in the release; it lies at the root of the repo unless given.
            revision: branch to publish on; made if missing.
            tag: tag for the release, such as `v1.0`; never moved.
            pr: open a pull request against main instead of committing.
            private: visibility of a new repo.
            message: title of the commit.
        About it:
            base_model, license, datasets, description: for the record and the card.
            activations: a tensor, file or dataset to check quality on and to find a BatchTopK threshold with.
            also: further formats beside it: sparsify, onnx, pt, raw.
        What is there already:
            prune: delete SAEs of the repo that are not in this release.
            delete: patterns of files of the repo to delete in the same commit.
            overwrite_config: replace a `config.json` that is no release manifest.
        The card:
            title, citation, limitations: words of yours.
            card_template, card_kind: a template of your own, or one of single, chain, grid, release.
            force_card: replace generated blocks even where they were edited by hand.
        How:
            check_saelens: compare with stock SAELens, if it is installed.
            allow_secrets: publish what looks like a token or key.
            dry_run: only plan.
            confirm: is shown the plan and may decline.
            notify: gets one line for whatever happens on the way.
            bar: a progress bar; where standard error is a terminal unless said.
            token, endpoint: as for every tool of the Hub.
        """
        from hubsae.hub.push import push

        return push(
            self, repo_id, id=id, revision=revision, tag=tag, pr=pr, private=private, message=message,
            base_model=base_model, license=license, datasets=datasets, description=description,
            activations=activations, also=also, prune=prune, delete=delete, overwrite_config=overwrite_config,
            title=title, citation=citation, limitations=limitations, card_template=card_template,
            card_kind=card_kind, force_card=force_card, check_saelens=check_saelens, allow_secrets=allow_secrets,
            dry_run=dry_run, confirm=confirm, notify=notify, bar=bar, token=token, endpoint=endpoint,
        )  # fmt: skip

    def to_saelens(self) -> Any:
        """The same SAE as a SAELens object, where SAELens can express it."""
        from hubsae.formats.saelens import to_saelens

        return to_saelens(self)

    @classmethod
    def from_saelens(cls, sae: Any) -> HubSAE:
        """A SAELens SAE (inference or training class) as a HubSAE."""
        from hubsae.formats.saelens import from_saelens

        return cast("HubSAE", from_saelens(sae))
