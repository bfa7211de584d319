"""HubSAE: an SAE with what users do with it: load, publish, attach to a model, hand over to SAELens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hubsae.core import intervene
from hubsae.core.config import Architecture, TokenNorm
from hubsae.core.errors import ConfigError
from hubsae.core.fingerprint import Check, check
from hubsae.core.hooks import HookPoint
from hubsae.core.intervene import Recorded, hook_of
from hubsae.core.options import named_options, pass_on
from hubsae.core.sae import SAE
from hubsae.formats import native, saelens
from hubsae.formats.table import html_table
from hubsae.hub.load import load_each, what_is_asked

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

    def attach(self, model: nn.Module, hook: str | int | HookPoint | None = None) -> AbstractContextManager[Recorded]:
        """Read the codes at the SAE's hook point during forwards: `with sae.attach(model) as acts: ...`.

        Args:
            model: A transformers decoder model; it is not changed.
            hook: Another place than the SAE's own: `model.layers.18`, `blocks.18.hook_resid_post`, or a block's number.
        """
        return intervene.attach(self, model, hook)

    def splice(
        self, model: nn.Module, hook: str | int | HookPoint | None = None, *, mask: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Replace the activations by their reconstruction while the context lasts.

        Args:
            model: A transformers decoder model.
            hook: Another place than the SAE's own: `model.layers.18`, `blocks.18.hook_resid_post`, or a block's number.
            mask: Where to replace them [batch, seq]; everywhere without one.
        """
        return intervene.splice(self, model, hook, mask=mask)

    def steer(
        self,
        model: nn.Module,
        feature: int,
        strength: float,
        hook: str | int | HookPoint | None = None,
        *,
        unit: bool = True,
    ) -> AbstractContextManager[None]:
        """Add a feature's decoder direction to the activations at every position while the context lasts.

        Args:
            model: A transformers decoder model.
            feature: Number of the latent.
            strength: Length of what is added; negative pushes away from it.
            hook: Another place than the SAE's own.
            unit: Scale the decoder row to norm one first, so that strengths compare across features; with False it is
                added as it is, `strength` times: the scale of the latent's own values.
        """
        return intervene.steer(self, model, feature, strength, hook, unit=unit)

    def _repr_html_(self) -> str:
        """In a notebook: what this SAE is, and its metrics in the scope that it is for."""
        meta, own = self.metadata, self.metadata.own_scope
        where = meta.hook.module_path or meta.hook.transformer_lens
        model = " ".join(part for part in (meta.base_model.id, meta.base_model.stage) if part)
        known = {
            "selection": self.config.selection, "size": f"{self.d_in} -> {self.d_sae}, {self.dtype}", "model": model,
            "hook point": where, "tokens it is for": None if own == "all" else own,
        }  # fmt: skip
        rows = [(name, value) for name, value in known.items() if value]
        return html_table((), rows + [(m.name, f"{m.value:.4g}") for m in meta.metrics if (m.scope or "all") == own])

    # ---- elsewhere ---------------------------------------------------------------------------------------

    @classmethod
    @named_options
    def from_pretrained(
        cls,
        repo_or_path: str | os.PathLike[str],
        id: str | None = None,
        *,
        layer: int | None = None,
        stage: str | None = None,
        k: int | None = None,
        architecture: Architecture | None = None,
        d_in: int | None = None,
        d_sae: int | None = None,
        hook_point: str | None = None,
        base_model: str | None = None,
        base_model_revision: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        features: Sequence[int] | None = None,
        format: str | None = None,
        topk_relu: bool | None = None,
        threshold: float | None = None,
        decode_adds_b_pre: bool | None = None,
        apply_b_dec_to_input: bool | None = None,
        transposed: bool | None = None,
        token_norm: TokenNorm | None = None,
        input_scale: float | None = None,
        hook: str | None = None,
        hook_out: str | None = None,
        map: str | Mapping[str, str] | None = None,
    ) -> HubSAE:
        """Load one SAE from the Hub or from a local folder or file; without an `id` the filters choose it.

        Args:
            repo_or_path: `owner/name`, `owner/name@revision`, a folder, a file, or a name that SAELens registers.
            id: The SAE's id in the release, or the path of its folder or file.
            layer: Choose by block (from 0). This and the next eight also tell the reader what a bare file lacks.
            stage: Choose by checkpoint, such as `ppo_step116`.
            k: Choose by latents per token.
            architecture: Choose by selection rule: relu, topk, batch_topk, jumprelu, gated.
            d_in: Choose by width of the activations.
            d_sae: Choose by number of latents.
            hook_point: Choose by module, such as `model.layers.18`.
            base_model: Choose by model.
            base_model_revision: Choose by commit of the model.
            revision: Branch, tag, commit or `refs/pr/N`.
            token: Access token; False sends none, None the one that is logged in.
            endpoint: Address of the Hub, in place of HF_ENDPOINT.
            cache_dir: Cache folder, in place of the usual one.
            local_files_only: Ask no Hub; use what is cached.
            force_download: Fetch again what is cached.
            subfolder: Folder of the repo that `id` is relative to.
            device: Where the weights go.
            dtype: Type of the weights, if another than the stored one.
            features: Load only these latents, by slicing the file.
            format: Read files that no metadata.json describes as this format (`hubsae formats` lists them).
            topk_relu: For such files: whether a ReLU follows the top-k.
            threshold: For such files: inference threshold of a batch-top-k SAE.
            decode_adds_b_pre: For such files: whether the decoder adds the pre-bias back.
            apply_b_dec_to_input: For such files: whether b_dec is subtracted before encoding.
            transposed: For square matrices of no fixed orientation: True where W_enc is stored [d_sae, d_in].
            token_norm: For such files: norm of every token: none, layer_norm, unit_norm, constant_norm.
            input_scale: For such files: scalar that the activations were multiplied by in training.
            hook: For such files: where the SAE reads, in any spelling.
            hook_out: For such files: where a transcoder writes.
            map: For files of no known layout: which tensor is which (`W_enc=enc.weight.T,b_enc=enc.bias,...`).
        """
        asked = what_is_asked(locals())
        found = load_each(
            repo_or_path,
            f"{subfolder.strip('/')}/{id}" if subfolder and id else id or subfolder,
            **asked,
            one=True,
        )
        return cast("HubSAE", next(found)[1])

    @classmethod
    @named_options
    def iter_pretrained(
        cls,
        repo_or_path: str | os.PathLike[str],
        id: str | None = None,
        *,
        layer: int | Sequence[int] | None = None,
        stage: str | Sequence[str] | None = None,
        k: int | Sequence[int] | None = None,
        architecture: Architecture | Sequence[Architecture] | None = None,
        d_in: int | None = None,
        d_sae: int | Sequence[int] | None = None,
        hook_point: str | Sequence[str] | None = None,
        base_model: str | None = None,
        base_model_revision: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        features: Sequence[int] | None = None,
        format: str | None = None,
        topk_relu: bool | None = None,
        threshold: float | None = None,
        decode_adds_b_pre: bool | None = None,
        apply_b_dec_to_input: bool | None = None,
        transposed: bool | None = None,
        token_norm: TokenNorm | None = None,
        input_scale: float | None = None,
        hook: str | None = None,
        hook_out: str | None = None,
        map: str | Mapping[str, str] | None = None,
    ) -> Iterator[tuple[str, HubSAE]]:
        """(id, SAE) for every SAE of one commit that fits; one is in memory at a time.

        Args:
            repo_or_path: `owner/name`, `owner/name@revision`, a folder, a file, or a name that SAELens registers.
            id: Only SAEs in this folder of it.
            layer, stage, k, architecture, d_in, d_sae, hook_point, base_model, base_model_revision: Only SAEs that fit;
                of most, several values choose several.
            revision, token, endpoint, cache_dir, local_files_only, force_download: As for `from_pretrained`.
            device, dtype, features: Of each SAE, as for `from_pretrained`.
            format, topk_relu, threshold, decode_adds_b_pre, apply_b_dec_to_input, transposed, token_norm, input_scale,
                hook, hook_out, map: For files that no metadata.json describes, as for `from_pretrained`.
        """
        return cast("Iterator[tuple[str, HubSAE]]", load_each(repo_or_path, id, **what_is_asked(locals())))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write this SAE as a folder that hubsae and SAELens load.

        Args:
            folder: Where; made if it is not there, each file written whole or not at all.
        """
        native.write(self, folder)

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

        return pass_on(push, locals(), source=self)

    def check(self, model: nn.Module, tokenizer: Any = None, *, hook: Any = None) -> Check:
        """Whether `model` gives this SAE what it was trained on, by the fingerprint that came with it.

        Says in words what is wrong: the wrong layer, other processing, a missing BOS, another revision. `hook` is where
        the SAE is to be used, if not where its record says.

        >>> found = sae.check(model, tokenizer)  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
        wrong layer: these are the activations of layers.11, and layers.12 was asked for
        """
        if self.fingerprint is None:
            raise ConfigError(
                "this SAE came without a fingerprint, so there is nothing to compare with",
                hint="where it is at home: sae.fingerprint = Fingerprint.take(model, tokenizer, hook), and save it; "
                "for a release: hubsae check RELEASE --model MODEL --take",
            )
        return check(self.fingerprint, model, tokenizer, hook_of(self, hook))

    def to_saelens(self) -> Any:
        """The same SAE as a SAELens object, where SAELens can express it."""
        return saelens.to_saelens(self)

    @classmethod
    def from_saelens(cls, sae: Any) -> HubSAE:
        """`sae`, a SAELens SAE (inference or training class), as a HubSAE."""
        return cast("HubSAE", saelens.from_saelens(sae))
