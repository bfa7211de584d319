"""`hubsae check`: whether a model gives SAEs what they were trained on."""

from __future__ import annotations

from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out, print_json

PANEL = "Publish and load"


def command(
    target: Annotated[str, typer.Argument(metavar="REPO_OR_PATH", help="A release: a folder, or a repo on the Hub.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model: an id or a folder.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only SAEs of this stage, of which the model is.")] = None,
    id: options.Id = None,
    take: Annotated[
        bool, typer.Option("--take", help="Keep what this model has at the hook points beside the SAEs of a folder.")
    ] = False,
    device: options.Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Type the model runs in; otherwise as it is stored.")] = None,
    as_json: options.Json = False,
) -> None:
    """Say in words whether a model fits: wrong layer, other processing, BOS missing, other revision.

    SAEs carry what their model made of a short text (fingerprint.safetensors, a few kB); exit code 1 where one differs.

      hubsae check me/my-saes --model Qwen/Qwen2.5-0.5B-Instruct
      hubsae check release/ --model Qwen/Qwen2.5-0.5B-Instruct --take
    """
    from hubsae.activations.models import load_model, load_tokenizer
    from hubsae.formats.release import Release
    from hubsae.hub.sae import HubSAE

    tokenizer = load_tokenizer(model, revision=revision)
    loaded = load_model(model, revision=revision, dtype=dtype, device=device)
    if take:
        taken = Release.open(target).add_fingerprints(loaded, tokenizer, stage=stage)
        for name in taken:
            out().print(f"{name}: taken", markup=False)
        if not taken:
            out().print(f"no SAE of {'stage ' + stage if stage else 'no stage'}: name one with --stage", markup=False)
        return
    found = []
    for name, sae in HubSAE.iter_pretrained(target, id, stage=stage):
        result = None if sae.fingerprint is None else sae.check(loaded, tokenizer)
        found.append((name, result))
        if not as_json:
            out().print(f"{name}: {'no fingerprint' if result is None else result}", markup=False)
    if as_json:
        print_json([{"id": name, **(vars(result) if result else {"ok": None})} for name, result in found])
    if any(result is not None and not result.ok for _, result in found):
        raise typer.Exit(1)
