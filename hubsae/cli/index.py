"""`hubsae index`: what the features of SAEs fire on, from activations or from a model and texts; merges parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out as console
from hubsae.cli._common import print_json
from hubsae.cli._saes import load, together
from hubsae.core.errors import HubSAEError
from hubsae.core.progress import say

PANEL = "Train and measure"


def command(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RELEASE | merge PARTS...",
            help="A release: a folder, or a repo on the Hub. Or `merge` and tables of parts, or folders of them.",
        ),
    ],
    activations: options.Activations = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model: for tokens and logits, and with --texts for activations."),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", "-t", help="Texts to run the model on: .txt, .jsonl or .json.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Config of the activations; otherwise by stage and layer.")] = None,
    split: options.Split = None,
    id: options.Id = None,
    layer: options.Layer = None,
    stage: options.Stage = None,
    k: options.K = None,
    top: Annotated[int, typer.Option(min=1, help="Strongest tokens and samples kept of each feature.")] = 10,
    random: Annotated[int, typer.Option(min=0, help="Firings of any strength kept of each feature.")] = 10,
    window: Annotated[int, typer.Option(min=0, help="Tokens shown before and after.")] = 8,
    scope: Annotated[str | None, typer.Option(help="Tokens that count; otherwise those that each SAE is for.")] = None,
    max_texts: options.MaxTexts = None,
    max_length: options.MaxLength = None,
    device: options.Device = "cpu",
    force: options.Force = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write here; otherwise RELEASE/reverse-index. Needed for a repo.")
    ] = None,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Make the reverse index of SAEs: what each feature fires on, in which context, and what it promotes.

    A run that was stopped goes on where it was. docs/index.md describes the files.

      hubsae index release/ --activations acts/ --model M
      hubsae index release/ --model M --texts chats.jsonl --layer 15
      hubsae index merge parts-a/ parts-b/ --out merged/
    """
    if targets[0] == "merge" and len(targets) > 1 and not Path("merge").is_dir():
        _merge(targets[1:], model, out)
        return
    if len(targets) != 1:
        raise typer.BadParameter("give one release")
    if (activations is None) == (texts is None):
        raise typer.BadParameter("give --activations, or --model with --texts")
    if texts is not None and model is None:
        raise typer.BadParameter("--texts needs --model")
    root = Path(targets[0])
    if out is None and not root.is_dir():
        raise typer.BadParameter(f"{root} is not a folder here, so pass --out DIR", param_hint="--out")
    from hubsae.index.build import Settings, index_activations, index_texts
    from hubsae.index.files import FOLDER

    saes: Any = load(targets[0], device, id=id, layer=layer, stage=stage, k=k)
    settings = Settings(top=top, random=random, window=window, scope=scope)
    where = out or root / FOLDER
    loaded, tokenizer = _model(model, device)
    written = []
    if texts is not None:
        from hubsae.evals.texts import read_texts

        how = {"tokenizer_id": model, "max_length": max_length, "force": force}
        written += index_texts(saes, loaded, tokenizer, read_texts(texts)[:max_texts], where, settings, **how)
    else:
        for data, group in together(saes, str(activations), config, split):
            name = model or data.info.get("model")
            read = tokenizer if model else _tokenizer(name)
            how = {"tokenizer": read, "tokenizer_id": name, "model": loaded, "force": force}
            written += index_activations(group, data, where, settings, **how)
    if out is None:
        from hubsae.index.page import build

        written.append(build(root))  # the page that shows them, hubsae view
    if as_json:
        print_json([str(path) for path in written])
    for path in written if not as_json else []:
        console().print(f"wrote {path}", markup=False)


def _model(name: str | None, device: str) -> tuple[Any, Any]:
    if name is None:
        return None, None
    from hubsae.activations.models import load_model, load_tokenizer

    return load_model(name, device=device), load_tokenizer(name)


def _tokenizer(name: str | None) -> Any:
    """The tokenizer the activations name, where it can be had; without one tokens are shown by number."""
    from hubsae.activations.models import load_tokenizer

    try:
        return load_tokenizer(name) if name else None
    except HubSAEError as error:
        say(f"tokens are shown by number: {error}")
        return None


def _merge(paths: list[str], model: str | None, out: Path | None) -> None:
    from hubsae.index.build import merge_parts, write_merged

    if out is None:
        raise typer.BadParameter("merge needs --out", param_hint="--out")
    table = merge_parts(paths)
    if out.suffix == ".safetensors":
        table.save(out)
    else:
        write_merged(table, out, tokenizer=_tokenizer(model))
    console().print(f"wrote {out}: {table.n_tokens:,} tokens", markup=False)
