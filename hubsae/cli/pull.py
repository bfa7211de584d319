"""hubsae pull: download SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out, print_json

PANEL = "Publish and load"


def command(
    repo: Annotated[str, typer.Argument(help="name/repo or name/repo@revision.")],
    id: Annotated[str | None, typer.Argument(help="One SAE, or a folder of them; all if left out.")] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", "-o", help="Copy into this folder.", show_default="the Hub cache")
    ] = None,
    layer: options.Layer = None,
    stage: options.Stage = None,
    k: options.K = None,
    architecture: options.Architecture = None,
    revision: options.Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Download again what is cached.")] = False,
    json: options.Json = False,
) -> None:
    """Download SAEs into the Hub cache (for offline use) or into a folder; hashes are checked."""
    from hubsae.hub.load import pull

    where = pull(
        repo, id, out_dir, revision=revision, force_download=force,
        layer=layer, stage=stage, k=k, architecture=architecture,
    )  # fmt: skip
    if json:
        print_json({"path": str(where)})
    else:
        out().print(str(where), markup=False)
