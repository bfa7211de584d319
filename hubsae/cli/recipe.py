"""`hubsae recipe`: list, show, run and copy the recipes that reproduce published releases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out as console
from hubsae.cli._common import print_json, print_table
from hubsae.core.text import format_bytes, format_time

PANEL = "Recipes and demo"

app = typer.Typer(help="Reproduce published releases end to end.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="A recipe's name, or a folder that holds a recipe.py.")]
ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="Which variant, where a recipe has several.")]


@app.command("list")
def list_(json_: options.Json = False) -> None:
    """List the recipes, their profiles and configs."""
    from hubsae.recipes.registry import list_recipes

    rows = [
        {"name": r.name, "profiles": r.profiles, "configs": r.configs, "summary": r.summary} for r in list_recipes()
    ]
    if json_:
        print_json(rows)
        return
    columns = ["name", "profiles", "configs", "summary"]
    print_table("", columns, [[_words(row[column]) for column in columns] for row in rows])


@app.command()
def show(
    name: NameArgument,
    config: ConfigOption = None,
    profile: Annotated[str | None, typer.Option(help="Print the complete config of this profile.")] = None,
) -> None:
    """Show a recipe's README, or with --profile or --config its complete config."""
    from hubsae.recipes.registry import describe

    typer.echo(describe(name, profile, config))


@app.command()
def run(
    name: NameArgument,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, as many as needed.")] = None,
    config: ConfigOption = None,
    profile: Annotated[
        str, typer.Option(help="tiny runs offline in minutes on a CPU; full is the real thing.")
    ] = "tiny",
    out: Annotated[
        Path | None, typer.Option(help="The run folder (default: runs/<recipe>-<config>-<profile>).")
    ] = None,
    redo: Annotated[
        list[str] | None, typer.Option(help="Run this step again, and what follows from it: its code was edited.")
    ] = None,
    from_checkpoint: Annotated[
        str | None, typer.Option(help="Train no further: publish what a halted run kept (best, last or a step).")
    ] = None,
    dry_run: options.DryRun = False,
    json_: options.Json = False,
) -> None:
    """Run a recipe; run again to continue, finished steps are skipped."""
    from hubsae.recipes.registry import prepare
    from hubsae.recipes.run import follows, say_event

    given = [*(overrides or []), *([f"from_checkpoint={from_checkpoint}"] if from_checkpoint else [])]
    prepared = prepare(name, profile=profile, variant=config, overrides=given, out=out, notify=say_event, show=None)
    if redo and not dry_run:
        prepared.run.forget(prepared.steps, redo)
    if dry_run:
        _show_plan(prepared, json_)
        return
    outcomes = prepared.execute()
    if follows():
        return  # the first rank of a launch says what came out
    release = prepared.run.path / "release"
    report = prepared.run.path / "report" / "report.md"
    if json_:
        print_json(
            {
                "run": str(prepared.run.path),
                "release": str(release) if release.is_dir() else None,
                "report": str(report) if report.is_file() else None,
                "steps": [{"name": o.name, "ran": o.ran, "seconds": o.seconds} for o in outcomes],
            }
        )
        return
    found = next((o.result for o in outcomes if o.name == "report" and isinstance(o.result, dict)), {})
    for line in found.get("lines", []):
        console().print(line, markup=False)
    if report.is_file():
        console().print(f"report   {report}", markup=False)
    if release.is_dir():
        console().print(f"release  {release}\npublish  hubsae push {release}", markup=False)


@app.command()
def copy(name: NameArgument, to: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Copy a recipe to edit it; `hubsae recipe run ./FOLDER` runs the copy."""
    from hubsae.recipes.registry import copy_recipe

    target = copy_recipe(name, to)
    typer.echo(f"copied to {target}\nrun it: hubsae recipe run ./{target}" if not target.is_absolute() else str(target))


def _show_plan(prepared: Any, json_: bool) -> None:
    states = prepared.run.states(prepared.steps)
    rows = [
        {
            "step": step.name,
            "what": step.estimate.what,
            "disk_bytes": step.estimate.disk,
            "memory_bytes": step.estimate.memory,
            "seconds": step.estimate.seconds,
            "moved_bytes": step.estimate.moved,
            "state": states[step.name].state,
        }
        for step in prepared.steps
    ]
    disk = sum(row["disk_bytes"] for row in rows)
    memory = max((row["memory_bytes"] for row in rows), default=0)
    seconds, moved = (sum(row[name] for row in rows) for name in ("seconds", "moved_bytes"))
    if json_:
        whole = {"disk_bytes": disk, "memory_bytes": memory, "seconds": seconds, "moved_bytes": moved}
        print_json({"run": str(prepared.run.path), "steps": rows, **whole})
        return
    columns = ["step", "what", "disk", "memory", *["time"] * bool(seconds), *["moved"] * bool(moved), "state"]
    cells = [
        {
            **r, "disk": _size(r["disk_bytes"]), "memory": _size(r["memory_bytes"]), "moved": _size(r["moved_bytes"]),
            "time": format_time(r["seconds"]) if r["seconds"] else "-",
        }
        for r in rows
    ]  # fmt: skip
    print_table("", columns, [[row[column] for column in columns] for row in cells])
    more = f", {format_time(seconds)}" * bool(seconds) + f", {format_bytes(moved)} read and written" * bool(moved)
    console().print(
        f"{len(rows)} steps in {prepared.run.path}: {format_bytes(disk)} on disk, "
        f"{format_bytes(memory)} of memory at most{more}. Nothing was run.",
        markup=False,
    )


def _size(count: float) -> str:
    return format_bytes(count) if count >= 1e5 else "-"


def _words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
