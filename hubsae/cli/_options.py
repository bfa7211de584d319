"""Options that several verbs take, each said once; and `-s name=value`, choices for the reader of a format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done and stop.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0 ...")]
Port = Annotated[int, typer.Option(help="Port on this machine; 0 takes any free one.", min=0, max=65535)]

# which SAEs
Id = Annotated[str | None, typer.Option("--id", help="Only this SAE.")]
Layer = Annotated[int | None, typer.Option(help="Only SAEs of this layer.")]
Stage = Annotated[str | None, typer.Option(help="Only SAEs of this stage.")]
K = Annotated[int | None, typer.Option(help="Only SAEs with this k.")]
Architecture = Annotated[str | None, typer.Option(help="Only SAEs of this architecture.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag, commit or refs/pr/N.")]
IndexedRelease = Annotated[Path, typer.Argument(help="A release folder with a reverse index.")]
Sae = Annotated[str | None, typer.Argument(help="Id of the SAE.", show_default="the only one")]

# what is said of them
BaseModel = Annotated[str | None, typer.Option(help="Base model, such as Qwen/Qwen2.5-0.5B-Instruct.")]
BaseModelRevision = Annotated[str | None, typer.Option(help="Its commit.")]
Hook = Annotated[str | None, typer.Option(help="Hook point; {layer} is each file's: 'model.layers.{layer}'.")]
License = Annotated[str | None, typer.Option(help="License of the weights, such as apache-2.0.")]
Datasets = Annotated[
    list[str] | None, typer.Option("--datasets", "--dataset", help="Dataset id on the Hub; may be repeated.")
]
Description = Annotated[str | None, typer.Option(help="What this release is, for its card.")]
Pattern = Annotated[str | None, typer.Option(help="Naming scheme of the files, such as '{stage}_L{layer}_k{k}.pt'.")]
Format = Annotated[str | None, typer.Option(help="Read files as this format; see `hubsae formats`.")]
Choices = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="NAME=VALUE",
        help="A choice for the reader: k=64, architecture=topk, decode_adds_b_pre=true, transposed=false ...",
    ),
]
MixedWidths = Annotated[bool, typer.Option("--mixed-widths", help="Allow SAEs of different input width.")]
Also = Annotated[str, typer.Option(help="Further formats beside each SAE: sparsify,onnx,pt,raw (comma-separated).")]

# cards and repos
Title = Annotated[str | None, typer.Option(help="Title of the card.")]
CardTemplate = Annotated[Path | None, typer.Option("--card-template", help="Your own card template (.md.j2).")]
ForceCard = Annotated[
    bool, typer.Option("--force-card", help="Replace generated card blocks even where edited by hand.")
]
Pr = Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repo private.")]
AllowSecrets = Annotated[bool, typer.Option("--allow-secrets", help="Publish files that look like tokens or keys.")]
Visibility = Annotated[
    bool | None, typer.Option("--private/--public", help="Visibility of a new repo.", show_default=False)
]

# activations and texts
Activations = Annotated[
    str | None, typer.Option("--activations", "-a", help="Activations: a folder, a file, or a dataset repo.")
]
Split = Annotated[str | None, typer.Option(help="Split; otherwise validation, then test, then train.")]
Scale = Annotated[str, typer.Option(help="Power of two for float16, or auto.")]
MaxTexts = Annotated[int | None, typer.Option(min=1, help="Use only the first N texts.")]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Cut texts at this many tokens.")]
Force = Annotated[
    bool, typer.Option("--force", help="Measure an SAE at another layer or in another model than its record names.")
]

# past one machine
Executor = Annotated[
    str | None,
    typer.Option("--executor", help="Cut the work into tasks and let datatrove run them: local, slurm, ray or jobs."),
]
Tasks = Annotated[int, typer.Option("--tasks", help="Number of tasks; any number gives the same bytes.")]
Workers = Annotated[int | None, typer.Option("--workers", help="Tasks that run at the same time.")]
ExecutorSet = Annotated[
    list[str] | None,
    typer.Option(
        "--executor-set", metavar="NAME=VALUE",
        help="A setting of the executor: partition=gpu, time=4:00:00, gpus_per_task=1, bucket=me/shelf ...",
    ),
]  # fmt: skip


def run_job(
    job: Any, executor: str | None, tasks: int, workers: int | None, given: list[str] | None, **here: Any
) -> Any:
    """Do a job in this process, with what is `here` already, or in tasks where an executor is named."""
    if executor is None:
        if tasks != 1 or workers is not None or given:
            raise typer.BadParameter("--tasks, --workers and --executor-set need --executor", param_hint="--executor")
        return job.here(**here)
    from hubsae.scale import run

    settings = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--executor-set")
        settings[name.replace("-", "_")] = setting_of(value)
    done = run(job, executor=executor, tasks=tasks, workers=workers, settings=settings)
    if executor == "jobs":
        typer.echo(done)  # where it lies in the bucket
        raise typer.Exit
    return done


def setting_of(text: str) -> bool | int | float | str:
    """The value of a setting: 4:00:00 is a time to Slurm, and YAML would make a number of it.

    >>> [setting_of(text) for text in ("true", "4", "0.5", "4:00:00", "gpu")]
    [True, 4, 0.5, '4:00:00', 'gpu']
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)", text) else text


def names_of(given: str | None) -> list[str]:
    """A comma-separated list.

    >>> names_of("onnx, pt,"), names_of(None)
    (['onnx', 'pt'], [])
    """
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def parse_choices(given: list[str] | None) -> dict[str, Any]:
    """`["k=64", "topk_relu=false"]` as values, which are read as YAML.

    >>> parse_choices(["k=64", "topk_relu=false", "hook=model.layers.3"])
    {'k': 64, 'topk_relu': False, 'hook': 'model.layers.3'}
    """
    from hubsae.core.settings import parse_override

    out: dict[str, Any] = {}
    for item in given or []:
        if item.find("=") < 1:
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--set")
        name, value = parse_override(item)
        out[name.replace("-", "_")] = value
    return out
