"""hubsae verify: hash a release, activations, a training's states or the cache of a repo anew."""

from __future__ import annotations

from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out, print_json

PANEL = "Tools"


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder, or name/repo for what is cached of it.")],
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete damaged files of the cache; the next load fetches them again.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Compare every file with the hash it was written with; exit code 1 where any differs. Asks no Hub."""
    from hubsae.hub.verify import verify

    found = verify(path, remove=remove)
    if as_json:
        facts = {name: getattr(found, name) for name in ("path", "kinds", "files", "bytes", "whole", "problems")}
        print_json(facts)
    else:
        for line in found.lines():
            out().print(line, markup=False, no_wrap=True)
    if not found.whole:
        raise typer.Exit(1)
