"""hubsae ls: the SAEs of a repo or folder."""

from __future__ import annotations

from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out, print_json

PANEL = "Publish and load"


def command(
    repo: Annotated[str, typer.Argument(help="name/repo, name/repo@revision, or a local folder.")],
    id: Annotated[str | None, typer.Argument(help="Only SAEs in this folder of it.")] = None,
    layer: options.Layer = None,
    stage: options.Stage = None,
    k: options.K = None,
    architecture: options.Architecture = None,
    revision: options.Revision = None,
    every: Annotated[bool, typer.Option("--all", help="All columns: every metric in every scope.")] = False,
    json: options.Json = False,
) -> None:
    """List the SAEs of a release, with layer, stage, k and headline metrics in its own scope; no weights are read."""
    from hubsae.hub.listing import list_saes

    table = list_saes(repo, id, revision=revision, layer=layer, stage=stage, k=k, architecture=architecture)
    if json:
        print_json(list(table))
    else:
        out().print(table.text(every), markup=False, no_wrap=True)
