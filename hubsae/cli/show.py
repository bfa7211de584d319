"""`hubsae show PATH`: what is this file, folder, release or repo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import err, out, print_json
from hubsae.core.text import format_bytes, printable

if TYPE_CHECKING:
    from hubsae.formats.describe import Description

PANEL = "Publish and load"
FEW_TENSORS = 12


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file, a folder, or a repo id on the Hub.")],
    format: options.Format = None,
    choices: options.Choices = None,
    revision: options.Revision = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    every: Annotated[bool, typer.Option("--all", help="All columns of a table of SAEs.")] = False,
    as_json: options.Json = False,
) -> None:
    """Say what is there: format, selection rule, shapes, norms, hook point, and what is not known."""
    from hubsae.cli._activations import show_activations
    from hubsae.hub.listing import describe

    found = describe(path, format=format, choices=options.parse_choices(choices), revision=revision)
    if as_json:
        print_json(found.to_dict())
    elif found.activations:
        show_activations(found.activations)
    else:
        _print(found, tensors, every)


def _print(found: Description, all_tensors: bool, all_columns: bool) -> None:
    from hubsae.formats.describe import OTHER_METRICS

    def line(text: Any) -> None:
        out().print(printable(text), markup=False, no_wrap=True)

    form = f", {found.format}" if found.format not in (None, found.kind) else ""
    line(f"{found.path}: {found.kind}{form}")
    for reading in found.readings:
        line(f"  reads as {reading}")
    if found.config:
        c = found.config
        line(f"  {c['selection']}, d_in {c['d_in']}, d_sae {c['d_sae']}, {c['dtype']}")
        line(f"  b_dec subtracted before encoding: {'yes' if c['apply_b_dec_to_input'] else 'no'}")
        if c.get("token_norm", "none") != "none":
            line(f"  every token normalised: {c['token_norm']}")
    for name, value in found.facts.items():
        few = name == OTHER_METRICS and not all_columns
        line(f"  {name}: {f'{len(value)} (--all shows them)' if few else _said(value)}")
    if found.norms:
        line("  norms (min / median / max):")
        for name, value in found.norms.items():
            line(f"    {name}: {value}")
    most = len(found.tensors) if all_tensors else FEW_TENSORS
    for tensor in found.tensors[:most]:
        line(f"    {tensor.name} {list(tensor.shape)} {tensor.dtype}")
    if len(found.tensors) > most:
        line(f"    ... and {len(found.tensors) - most} more tensors (--tensors lists them)")
    for file in found.files:
        line(f"  {file['path']}" + (f"  {format_bytes(file['bytes'])}" if file["bytes"] is not None else ""))
    if found.saes:
        out().print(found.saes.text(all_columns), markup=False, no_wrap=True)
    for name in found.unknown:
        line(f"  not known: {name}")
    for note in found.notes:
        for part in note.splitlines():
            err().print(f"note: {printable(part)}", markup=False)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_said(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
