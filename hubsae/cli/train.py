"""`hubsae train`: train SAEs from a YAML file."""

from __future__ import annotations

from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import print_json, print_table
from hubsae.core.text import format_bytes, format_time

PANEL = "Train and measure"


def command(
    config: Annotated[str, typer.Argument(help="A YAML file, or a config that comes with hubsae (rl-chain-k64, ...).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, as many as needed; k=32 means train.k=32.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Live training: the model that makes the activations.")
    ] = None,
    texts: Annotated[str | None, typer.Option("--texts", help="Live training: its texts, a file or dataset.")] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Live training: hook points, such as 8,15.")] = None,
    targets: Annotated[
        str | None,
        typer.Option("--targets", help="Live training: hook points to predict from --layers (transcoders)."),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option("--exclude", help="Groups of tokens to leave out: position_0,special,massive ...")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on from the last state.")] = False,
    dry_run: options.DryRun = False,
    json_: options.Json = False,
) -> None:
    """Train sparse autoencoders; run the same command again to continue. Also under torchrun and accelerate launch."""
    from hubsae.train.job import load_job

    given = list(overrides or [])
    lists = {"live.layers": layers, "live.targets": targets, "exclude": exclude}
    for key, value in {"live.model": model, "live.texts": texts, **lists}.items():
        if value is not None:
            given.append(f"{key}=[{value}]" if key in lists else f"{key}={value}")
    job = load_job(config, given)
    if dry_run:
        plans = job.plan(resume=not fresh)
        if json_:
            print_json([{**vars(p), "total_bytes": p.total_bytes} for p in plans])
            return
        columns = ["name", "d_in", "d_sae", "parameters", "steps", "tokens", "state", "gradient", "step", "total"]
        columns += ["checkpoint", "time here", "time H200 (roofline)"]
        print_table(
            f"{config}: nothing is trained",
            columns,
            [
                [p.name, p.d_in, p.d_sae, f"{p.parameters:,}", f"{p.steps:,}", f"{p.tokens:,}"]
                + [format_bytes(getattr(p, f"{part}_bytes")) for part in columns[6:11]]
                + ["-" if s is None else format_time(s) for s in (p.seconds, p.h200_seconds)]
                for p in plans
            ],
        )
        return
    results = job.run(resume=not fresh)
    rows = [
        {
            "name": r.name,
            "steps": r.steps,
            "tokens": r.tokens,
            **{k: v for k, v in r.metrics.items() if k != "val_rows"},
            "error": None if r.error is None else r.error.message,
        }
        for r in results
    ]
    if json_:
        print_json(rows)
    else:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        # the loss is in the space that was trained in, what was validated in that of the activations
        spaces = {"train_loss": " (training space)", "val_mse": " (raw)", "val_fvu": " (raw)"}
        columns = [key + spaces.get(key, "") for key in keys]
        print_table(f"written to {job.out}" if job.out else "", columns, [[row.get(k) for k in keys] for row in rows])
    if all(r.error is not None for r in results):
        raise typer.Exit(1)
