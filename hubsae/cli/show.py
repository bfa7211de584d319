"""`hubsae show PATH`: what is this file, folder, release or repo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

import typer

from hubsae.cli._choices import SetOption, parse_choices
from hubsae.cli._common import JsonOption
from hubsae.core.errors import HubSAEError

if TYPE_CHECKING:
    from hubsae.formats.describe import Description

PANEL = "Publish and load"


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file, a folder, or a repo id on the Hub.")],
    format: Annotated[str | None, typer.Option("--format", help="Read it as this format.")] = None,
    choices: SetOption = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a repo.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is there: format, selection rule, shapes, norms, hook point, and what is not known."""
    from hubsae.cli._common import print_json

    here = Path(path)
    if not here.exists() and _is_repo_id(path):
        from hubsae import hub

        try:
            found = hub.describe(path, revision=revision)
        except HubSAEError:  # no such model repo, or a dataset
            found = _dataset_repo(path, revision)
            if found is None:
                raise
    elif here.is_dir() and _is_activations(here):
        from hubsae import activations

        found = activations.describe(here)
    else:
        from hubsae.formats.describe import describe

        found = describe(here, format, **parse_choices(choices))
    if as_json:
        print_json(_plain(found))
    elif isinstance(found, dict) and found.get("kind") == "activations":
        from hubsae.cli._activations import show_activations

        show_activations(found)
    elif _is_description(found):
        _print(found, tensors)
    else:
        _print_facts(found)


def _dataset_repo(repo: str, revision: str | None) -> dict[str, Any] | None:
    """What an activation dataset of that name holds, or None if there is none."""
    from hubsae.hub.activations import describe

    try:
        return describe(repo, revision=revision)
    except HubSAEError:
        return None


def _is_description(found: Any) -> TypeGuard[Description]:
    return hasattr(found, "readings") and hasattr(found, "saes")


def _is_repo_id(text: str) -> bool:
    import re

    return bool(re.fullmatch(r"[\w.-]+(/[\w.+=-]+)+(@[\w./-]+)?", text)) and not text.startswith((".", "/"))


def _is_activations(folder: Path) -> bool:
    """Parquet shards, or a folder with an activation manifest, and no SAE."""
    if any((folder / name).exists() for name in ("sae_weights.safetensors", "cfg.json", "metadata.json")):
        return False
    return next(folder.rglob("*.parquet"), None) is not None


def _plain(found: Any) -> Any:
    for name in ("to_dict", "_asdict", "model_dump"):
        if hasattr(found, name):
            return getattr(found, name)()
    return found


def _print(found: Description, all_tensors: bool) -> None:
    from rich.markup import escape

    from hubsae.cli._common import err, out, print_table

    console = out()
    console.print(
        f"[bold]{escape(found.path)}[/]: {found.kind}"
        + (f", {found.format}" if found.format not in (None, found.kind) else "")
    )
    for reading in found.readings:
        console.print(f"  reads as {escape(reading)}")
    if found.config:
        c = found.config
        console.print(f"  {escape(c['selection'])}, d_in {c['d_in']}, d_sae {c['d_sae']}, {c['dtype']}")
        console.print(f"  b_dec subtracted before encoding: {'yes' if c['apply_b_dec_to_input'] else 'no'}")
        if c.get("token_norm", "none") != "none":
            console.print(f"  every token normalised: {c['token_norm']}")
    for name, value in found.facts.items():
        console.print(f"  {name}: {escape(str(value))}")
    if found.norms:
        console.print("  norms (min / median / max):")
        for name, value in found.norms.items():
            console.print(f"    {name}: {value}")
    shown = found.tensors if all_tensors or not found.config else []
    for tensor in shown:
        console.print(f"    {escape(tensor.name)}  {list(tensor.shape)}  {tensor.dtype}")
    if found.saes:
        columns = list(
            dict.fromkeys(key for row in found.saes for key in row if any(r.get(key) is not None for r in found.saes))
        )
        print_table("", columns, [[row.get(key) for key in columns] for row in found.saes])
    for name in found.unknown:
        console.print(f"  [yellow]not known:[/] {escape(name)}")
    for note in found.notes:
        err().print(f"[yellow]note[/] {escape(note)}")


def _print_facts(found: Any) -> None:
    from rich.markup import escape

    from hubsae.cli._common import out

    if hasattr(found, "lines"):
        out().print("\n".join(found.lines()), markup=False)
        return
    plain = _plain(found)
    if not isinstance(plain, dict):
        out().print(escape(str(plain)))
        return
    for name, value in plain.items():
        out().print(f"  {escape(str(name))}: {escape(str(value))}")
