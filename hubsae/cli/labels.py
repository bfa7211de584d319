"""hubsae labels: what the features of a release are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out, print_json, print_table

PANEL = "Publish and load"


def command(
    release: options.IndexedRelease,
    sae: options.Sae = None,
    read: Annotated[
        Path | None, typer.Option("--import", help="Add labels from a CSV file with columns feature and text.")
    ] = None,
    write: Annotated[Path | None, typer.Option("--export", help="Write all labels as CSV.")] = None,
    author: Annotated[str, typer.Option(help="Whose labels the file has, where it does not say.")] = "",
    json: options.Json = False,
) -> None:
    """Show, import and export labels. They stand in labels.parquet beside the index and on the feature pages."""
    from dataclasses import asdict

    from hubsae.index import labels
    from hubsae.index.features import FeatureIndex

    index = FeatureIndex.open(release, sae).folder
    if read is not None:
        found = labels.write(index, labels.from_csv(read, author=author))
    else:
        found = labels.read(index)
    if write is not None:
        labels.to_csv(found, write)
    if json:
        print_json([asdict(one) for one in found])
    elif read is not None or write is not None:
        out().print(f"{len(found)} labels" + (f" in {write}" if write else ""), markup=False)
    else:
        rows = [(one.feature, one.text, one.author, one.method, one.score, one.n) for one in found]
        print_table("", ("feature", "text", "author", "method", "score", "n"), rows)
