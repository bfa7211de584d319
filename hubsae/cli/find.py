"""hubsae find: SAEs for a model, registered with SAELens or tagged on the Hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import err, out, print_json, print_table
from hubsae.core.text import printable

PANEL = "Publish and load"


def command(
    base_model: Annotated[
        str,
        typer.Option("--base-model", "-m", metavar="MODEL", help="Its id on the Hub, or a short name (gemma-2-2b)."),
    ],
    limit: Annotated[int, typer.Option(min=1, help="At most so many repos of the Hub for each tag.")] = 100,
    json: options.Json = False,
) -> None:
    """Find SAEs for a model: releases that SAELens registers, and repos on the Hub tagged as SAEs of it."""
    from hubsae.hub.find import find_saes

    found = find_saes(base_model, limit=limit)
    if json:
        print_json(asdict(found))
        return
    if found.registered:
        rows = [(row["name"], row["saes"], row["repo"]) for row in found.registered]
        print_table(f"Registered for {found.base_model}", ["name to load by", "SAEs", "repo"], rows)
    if found.tagged:
        rows = [(row["repo"], row["library"] or "", row["downloads"] or 0) for row in found.tagged]
        print_table(f"Tagged on the Hub for {found.base_model}", ["repo", "library", "downloads"], rows)
    if not found.registered and not found.tagged:
        out().print(f"no SAEs found for {printable(found.base_model)}", markup=False)
    for note in found.notes:
        err().print(f"note: {printable(note)}", markup=False)
