"""`hubsae convert IN OUT --to FORMAT`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import err, out
from hubsae.core.errors import HubSAEError

if TYPE_CHECKING:
    from hubsae.core.sae import SAE

PANEL = "Publish and load"


def command(
    source: Annotated[
        str,
        typer.Argument(metavar="IN", help="An SAE file or folder in any known format, or OWNER/NAME[@REVISION][/ID]."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="What to write.")],
    to: Annotated[
        str, typer.Option("--to", help="native, saelens, sparsify, dictionary_learning, bundle, onnx, pt or raw.")
    ] = "native",
    format: options.Format = None,
    choices: options.Choices = None,
    key_map: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=TENSOR", help="Which tensor is which: W_enc=enc.weight.T (.T turns it)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over OUT if it exists.")] = False,
) -> None:
    """Convert one SAE between formats, exactly; what the target cannot express is said or refused."""
    import warnings

    from hubsae.formats import fidelity, read, write

    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise HubSAEError(f"{target} exists", hint="choose another name, or pass --overwrite")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen: dict[str, Any] = options.parse_choices(choices) | ({"map": ",".join(key_map)} if key_map else {})
        sae = _of_the_hub(source, format, chosen) or read(source, format, **chosen)
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


def _of_the_hub(source: str, format: str | None, choices: dict[str, Any]) -> SAE | None:
    """The SAE of a repo, or None where something on this disk has that name or it is no id."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+(?:@[^/\s]+)?)(?:/(.+))?", source)
    if found is None or Path(source).exists() or source.startswith("."):
        return None
    from hubsae.hub.sae import HubSAE

    return HubSAE.from_pretrained(found[1], found[2], format=format, **choices)
