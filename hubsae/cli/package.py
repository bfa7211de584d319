"""`hubsae package FOLDER --out RELEASE`: many SAE files into one release folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import err, out, print_json, print_table
from hubsae.cli._common import out as console
from hubsae.core.text import format_bytes

if TYPE_CHECKING:
    from hubsae.formats import PackagePlan

PANEL = "Publish and load"


def command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of SAE files, or a single one.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The release folder to make.")] = Path("release"),
    base_model: options.BaseModel = None,
    base_model_revision: options.BaseModelRevision = None,
    hook: options.Hook = None,
    pattern: options.Pattern = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the release.")] = None,
    license: options.License = None,
    datasets: options.Datasets = None,
    description: options.Description = None,
    format: options.Format = None,
    choices: options.Choices = None,
    spec: Annotated[Path | None, typer.Option("--spec", help="A hubsae.yaml elsewhere than beside the files.")] = None,
    also: options.Also = "",
    mixed_widths: options.MixedWidths = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a release at --out.")] = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Turn a folder of SAE files into a release: safetensors, records and a manifest, one SAE at a time."""
    import warnings

    from hubsae.formats import PackageSpec, package, plan

    read = {"choices": options.parse_choices(choices) or None, "mixed_widths": mixed_widths or None}
    given = PackageSpec.of(locals(), **read)
    todo = plan(source, given, spec=PackageSpec.read(spec) if spec is not None else None)
    if dry_run:
        _show(todo, as_json)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        release = package(todo, out, also=options.names_of(also), overwrite=overwrite)
    for note in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        err().print(note, markup=False)
    if as_json:
        print_json({"release": str(release.path), "saes": [entry.row() for entry in release]})
        return
    size = sum(file.size for file in release.manifest.all_files)
    console().print(f"{release.path}: {len(release)} SAEs, {format_bytes(size)}", markup=False)
    console().print(f"publish it with: hubsae push {release.path}", markup=False)


def _show(todo: PackagePlan, as_json: bool) -> None:
    rows = [
        {
            "id": item.id,
            "file": str(item.source),
            "format": item.format,
            "why": item.why,
            "MB": round(item.size / 1e6, 1),
        }
        for item in todo.saes
    ]
    if as_json:
        print_json({"name": todo.name, "saes": rows, "left_out": [[str(p), why] for p, why in todo.left_out]})
        return
    print_table(todo.name, list(rows[0]), [list(row.values()) for row in rows])
    for path, why in todo.left_out:
        out().print(f"left out: {path}: {why}", markup=False)
    for kind, files in (("results", todo.results), ("plots", todo.plots)):
        if files:
            out().print(f"{kind}: {', '.join(f.name for f in files)}", markup=False)
