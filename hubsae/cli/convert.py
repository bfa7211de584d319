"""`hubsae convert IN OUT --to FORMAT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubsae.cli._choices import SetOption, parse_choices

PANEL = "Publish and load"


def command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An SAE file or folder in any known format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="What to write.")],
    to: Annotated[
        str, typer.Option("--to", help="native, saelens, sparsify, dictionary_learning, onnx, pt or raw.")
    ] = "native",
    format: Annotated[str | None, typer.Option("--format", help="Read IN as this format.")] = None,
    choices: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over OUT if it exists.")] = False,
) -> None:
    """Convert one SAE between formats, exactly; what the target cannot express is said or refused."""
    import warnings

    from hubsae.cli._common import err, out
    from hubsae.core.errors import HubSAEError
    from hubsae.formats import fidelity, read, write

    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise HubSAEError(f"{target} exists", hint="choose another name, or pass --overwrite")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = read(source, format, **parse_choices(choices))
    for note in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        err().print(f"[yellow]note[/] {note}", markup=True)
    written = write(sae, target, to)
    config = sae.config
    out().print(
        f"{source} ({sae.metadata.provenance.source_format or 'native'}) -> {written} ({to}): "
        f"{config.selection}, d_in {config.d_in}, d_sae {config.d_sae}"
    )
    if to in ("native", "saelens") and not fidelity(config).exact:
        err().print(f"[yellow]note[/] {fidelity(config).note}", markup=True)
