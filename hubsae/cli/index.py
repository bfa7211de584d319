"""`hubsae index`: what the features of SAEs fire on, from activations or from a model and texts; merges parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out as console
from hubsae.cli._common import print_json
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
    executor: options.Executor = None,
    tasks: options.Tasks = 1,
    workers: options.Workers = None,
    executor_set: options.ExecutorSet = None,
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
    if out is None and not Path(targets[0]).is_dir():
        raise typer.BadParameter(f"{targets[0]} is not a folder here, so pass --out DIR", param_hint="--out")
    from hubsae.scale.jobs import Index

    filters = {"id": id, "layer": layer, "stage": stage, "k": k}
    job = Index(
        release=targets[0], out=None if out is None else str(out), activations=activations, model=model,
        texts=None if texts is None else str(texts), config=config, split=split, filters=filters,
        settings={"top": top, "random": random, "window": window, "scope": scope}, max_texts=max_texts,
        max_length=max_length, device=device, force=force,
    )  # fmt: skip
    written = options.run_job(job, executor, tasks, workers, executor_set)
    if as_json:
        print_json([str(path) for path in written])
    for path in written if not as_json else []:
        console().print(f"wrote {path}", markup=False)


def _merge(paths: list[str], model: str | None, out: Path | None) -> None:
    from hubsae.index.build import merge_parts, write_merged
    from hubsae.scale.jobs import tokenizer_of

    if out is None:
        raise typer.BadParameter("merge needs --out", param_hint="--out")
    table = merge_parts(paths)
    if out.suffix == ".safetensors":
        table.save(out)
    else:
        write_merged(table, out, tokenizer=tokenizer_of(model, say))
    console().print(f"wrote {out}: {table.n_tokens:,} tokens", markup=False)
