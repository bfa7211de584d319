"""hubsae export-features: the features of a release for another site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out, print_json
from hubsae.core.errors import HubSAEError

PANEL = "Publish and load"


def command(
    release: options.IndexedRelease,
    target: Annotated[Path, typer.Argument(help="Folder to write into.")],
    sae: Annotated[str | None, typer.Option(help="Id of the SAE.", show_default="the only one")] = None,
    to: Annotated[str, typer.Option(help="For which site: neuronpedia.")] = "neuronpedia",
    model: Annotated[str | None, typer.Option(help="The model's id there, such as qwen3-8b.")] = None,
    source_set: Annotated[
        str, typer.Option(help="Name of the set of SAEs there; with the layer it names one.")
    ] = "hubsae",
    creator: Annotated[str, typer.Option(help="Who made it, as shown there.")] = "",
    creator_id: Annotated[
        str, typer.Option(help="Your user id there; an import by the site's own team fills it in.")
    ] = "",
    repo: Annotated[str | None, typer.Option(help="Repo of the weights on the Hub.")] = None,
    vectors: Annotated[bool, typer.Option("--vectors/--no-vectors", help="With decoder rows, for steering.")] = True,
    json: options.Json = False,
) -> None:
    """Write a reverse index as Neuronpedia imports it: its bulk folder, and batches for its upload call.

    What it cannot take is left out and counted: features that never fire, labels, co-firing.
    """
    from dataclasses import asdict

    from hubsae.index import neuronpedia
    from hubsae.index.features import FeatureIndex

    if to != "neuronpedia":
        raise HubSAEError(f"no export to {to!r}", hint="there is: --to neuronpedia")
    index = FeatureIndex.open(release, sae)
    said = index.summary["sae"]
    base = (said.get("base_model") or "").rsplit("/", 1)[-1].lower()
    if not (model or base):
        raise HubSAEError("the model's id there is not known", hint="--model qwen3-8b")
    names = neuronpedia.Names(model or base, source_set, release.resolve().name, creator, creator_id, repo)
    rows = None
    if vectors:
        from hubsae.hub.sae import HubSAE

        rows = HubSAE.from_pretrained(str(release), said["id"]).W_dec.detach().float().numpy()
    done = neuronpedia.export(index.folder, target, names, vectors=rows)
    if json:
        print_json(asdict(done))
        return
    out().print(f"{done.folder}", markup=False, soft_wrap=True)
    out().print(
        f"{done.features} features with {done.activations} activations in {done.batches} batches, and as "
        f"{done.uploads} upload batches.\nLeft out: {done.dead} features that never fire, {done.labels} labels (their "
        "methods and models must exist there)."
    )
