"""`hubsae convert-activations`: rewrite activations of another layout into a dataset everyone can load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubsae.cli import _options as options

PANEL = "Activations"


def command(
    path: Annotated[
        Path, typer.Argument(help="SAELens cache, folder of .pt/.npy/.safetensors/.parquet files, or one file.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float16 or float32; default as in the source.")] = None,
    scale: options.Scale = "auto",
    config: Annotated[str | None, typer.Option(help="Name of the config, where there is only one.")] = None,
    vector: Annotated[str | None, typer.Option(help="Column or tensor with the vectors.")] = None,
    model: Annotated[str | None, typer.Option(help="Model the activations come from, for the card.")] = None,
    executor: options.Executor = None,
    tasks: options.Tasks = 1,
    workers: options.Workers = None,
    executor_set: options.ExecutorSet = None,
    as_json: options.Json = False,
) -> None:
    """Rewrite cached activations (SAELens, .pt piles, .npy, safetensors, Parquet) as an activation dataset."""
    from hubsae.activations.manifest import describe
    from hubsae.cli._activations import show_activations
    from hubsae.scale.jobs import Convert

    how = {"dtype": dtype, "scale": scale if scale == "auto" else float(scale), "config": config, "vector": vector}
    job = Convert(path=str(path), out=str(out), options={**how, "source": {"model": model} if model else None})
    options.run_job(job, executor, tasks, workers, executor_set)
    show_activations(describe(out), as_json)
