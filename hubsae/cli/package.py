"""`hubsae package FOLDER --out RELEASE`: many SAE files into one release folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubsae.cli._choices import SetOption, parse_choices
from hubsae.cli._common import DryRunOption, JsonOption

if TYPE_CHECKING:
    from hubsae.formats import PackagePlan

PANEL = "Publish and load"


def command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of SAE files, or a single one.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The release folder to make.")] = Path("release"),
    base_model: Annotated[str | None, typer.Option("--base-model", help="Model id, such as Qwen/Qwen3-8B.")] = None,
    base_model_revision: Annotated[str | None, typer.Option("--base-model-revision")] = None,
    hook: Annotated[
        str | None, typer.Option("--hook", help="Hook point; {layer} is each file's layer: model.layers.{layer}")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="Naming scheme of the files: '{stage}_L{layer}_k{k}.pt'")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the release.")] = None,
    license: Annotated[str | None, typer.Option("--license")] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--datasets", "--dataset", help="Dataset id; may be repeated.")
    ] = None,
    description: Annotated[str | None, typer.Option(help="What this release is, for its card.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="Read every file as this format.")] = None,
    choices: SetOption = None,
    spec: Annotated[Path | None, typer.Option("--spec", help="A hubsae.yaml elsewhere than beside the files.")] = None,
    also: Annotated[str, typer.Option("--also", help="Further formats beside each SAE: sparsify,onnx,pt,raw")] = "",
    mixed_widths: Annotated[bool, typer.Option("--mixed-widths", help="Allow different d_in.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a release at --out.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a folder of SAE files into a release: safetensors, records and a manifest, one SAE at a time."""
    import warnings

    from hubsae.cli._common import err, print_json
    from hubsae.cli._common import out as console
    from hubsae.core.progress import progress
    from hubsae.core.text import format_bytes
    from hubsae.formats import PackageSpec, package, plan

    given = PackageSpec.of(
        name=name, base_model=base_model, base_model_revision=base_model_revision, hook=hook, pattern=pattern,
        license=license, datasets=datasets, description=description, format=format,
        choices=parse_choices(choices) or None, mixed_widths=mixed_widths or None,
    )  # fmt: skip
    todo = plan(source, given, spec=PackageSpec.read(spec) if spec is not None else None)
    if dry_run:
        _show(todo, as_json)
        return
    formats = [part.strip() for part in also.split(",") if part.strip()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with progress("packaging", total=len(todo.saes), unit="SAEs") as task:
            release = package(
                todo,
                out,
                also=formats,
                overwrite=overwrite,
                progress=lambda item, number, total: task.update(number),
            )
    for note in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        err().print(note, markup=False)
    if as_json:
        print_json({"release": str(release.path), "saes": [entry.row() for entry in release]})
        return
    size = sum(file.size for file in release.manifest.all_files)
    console().print(f"{release.path}: {len(release)} SAEs, {format_bytes(size)}", markup=False)
    console().print(f"publish it with: hubsae push {release.path}", markup=False)


def _show(todo: PackagePlan, as_json: bool) -> None:
    from hubsae.cli._common import out, print_json, print_table

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
