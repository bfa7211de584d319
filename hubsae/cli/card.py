"""hubsae card: render or update the README of a release folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out
from hubsae.core.files import write_text_atomic

PANEL = "Publish and load"


def command(
    path: Annotated[Path, typer.Argument(help="A release folder.")],
    repo_id: Annotated[
        str | None,
        typer.Option("--repo-id", "-r", help="Repo that the loading snippets name.", show_default="you/<folder>"),
    ] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Write an HTML page to look at instead.")] = False,
    template: options.CardTemplate = None,
    kind: Annotated[str | None, typer.Option(help="single, chain, grid or release.")] = None,
    title: options.Title = None,
    force: options.ForceCard = False,
) -> None:
    """Render the card of a release folder into its README.md; your own words in it are left alone."""
    from hubsae.hub.card import CardOptions, card_of_release, render_card

    readme = path / "README.md"
    name = repo_id or f"you/{path.resolve().name}"
    card = card_of_release(path, name, CardOptions(kind=kind, title=title))
    existing = readme.read_text(encoding="utf-8") if readme.is_file() else None
    merged = render_card(card, existing, template=template, force=force)
    console = out()
    for block in merged.kept_by_hand:
        console.print(f"note: the block {block!r} was edited by hand and left alone (--force-card replaces it)")
    if preview:
        from hubsae.hub.preview import write_preview

        console.print(str(write_preview(merged.text, path)), markup=False)
    else:
        write_text_atomic(readme, merged.text)
        console.print(str(readme), markup=False)
