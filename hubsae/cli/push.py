"""hubsae push: publish SAEs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import err, out, print_json
from hubsae.core.errors import HubSAEError
from hubsae.core.options import pass_on
from hubsae.core.text import format_bytes, printable

if TYPE_CHECKING:
    from hubsae.hub.plan import PushPlan, PushResult

PANEL = "Publish and load"


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A folder of SAE files, one file, a release folder, a recipe's run, or OWNER/NAME on the Hub.",
        ),
    ],
    repo: Annotated[
        str | None, typer.Argument(metavar="[REPO]", help="Where to: name/repo.", show_default="<you>/<folder>")
    ] = None,
    repo_id: Annotated[str | None, typer.Option("--repo-id", "-r", help="Where to, as an option.")] = None,
    base_model: options.BaseModel = None,
    base_model_revision: options.BaseModelRevision = None,
    hook: options.Hook = None,
    license: options.License = None,
    datasets: options.Datasets = None,
    description: options.Description = None,
    activations: Annotated[
        str | None,
        typer.Option(help="Activations to check quality on and to find BatchTopK thresholds: a file or a dataset."),
    ] = None,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    pr: options.Pr = False,
    revision: Annotated[str | None, typer.Option(help="Branch to publish on; made if missing.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag the release, such as v1.0.")] = None,
    private: options.Visibility = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Title of the commit.")] = None,
    also: options.Also = "",
    keep_source: Annotated[bool, typer.Option("--keep-source", help="Ship the original files too.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete SAEs of the repo that are not in this release.")
    ] = False,
    delete: Annotated[
        list[str] | None, typer.Option(help="Delete files of the repo by pattern, in the same commit, e.g. '*.pt'.")
    ] = None,
    pattern: options.Pattern = None,
    format: options.Format = None,
    choices: options.Choices = None,
    mixed_widths: options.MixedWidths = False,
    card_template: options.CardTemplate = None,
    card_kind: Annotated[str | None, typer.Option(help="single, chain, grid or release.")] = None,
    force_card: options.ForceCard = False,
    title: options.Title = None,
    overwrite_config: Annotated[
        bool, typer.Option("--overwrite-config", help="Replace a config.json that is no release manifest.")
    ] = False,
    citation: Annotated[str | None, typer.Option(help="How to cite it, in place of the entry that is made.")] = None,
    limitations: Annotated[
        list[str] | None, typer.Option("--limitation", "--limitations", help="One for the card; may be repeated.")
    ] = None,
    check_saelens: Annotated[
        bool,
        typer.Option(
            "--check-saelens/--no-check-saelens",
            "--saelens-check/--no-saelens-check",
            help="Compare with stock SAELens, if installed.",
        ),
    ] = True,
    allow_secrets: options.AllowSecrets = False,
    json: options.Json = False,
) -> None:
    """Publish SAEs on the Hub: package, verify, show the plan, upload in one commit.

    Run it again after any interruption: it goes on where it stopped. An unchanged push makes no commit.
    """
    from hubsae.hub.push import push

    if repo is not None and repo_id is not None:
        raise typer.BadParameter("the repo is named twice; give it once", param_hint="--repo-id")
    result = pass_on(
        push, locals(), repo_id=repo or repo_id, choices=options.parse_choices(choices) or None,
        also=options.names_of(also), delete=delete or (), mixed_widths=mixed_widths or None,
        notify=lambda line: err().print(line, style="dim", markup=False),
        confirm=None if yes or dry_run else _refuse if json else _confirm,
    )  # fmt: skip
    if json:
        print_json(as_json(result))
    elif result.published is None:
        if dry_run or yes:
            show_plan(result.plan)
        out().print("nothing was published" + (" (dry run)" if dry_run else ""))
    else:
        if yes:
            show_plan(result.plan)
        _show_result(result)


def show_plan(plan: PushPlan) -> None:
    """The plan as a table that a person can check in ten seconds."""
    from rich.table import Table

    from hubsae.formats.table import HEADLINE

    console = out()
    columns = ["SAE", "read as", "selection", "d_in x d_sae", "size", "on the Hub", "SAELens"]
    known = dict.fromkeys(name for row in plan.rows for name in row.metrics)
    recorded = [name for name in HEADLINE if name in known] or list(known)[:4]
    quality = any(row.check.fvu is not None for row in plan.rows)
    table = Table(header_style="bold")
    numbers = [*recorded, *(["FVU now", "L0 now"] if quality else [])]
    for name in columns + numbers:
        table.add_column(name, overflow="fold", justify="right" if name == "size" or name in numbers else "left")
    shown = plan.rows if len(plan.rows) <= 40 else plan.rows[:30]
    for row in shown:
        cells = [
            printable(row.id), row.read_as, row.selection, row.shape, format_bytes(row.size), row.on_hub,
            row.check.saelens, *(f"{row.metrics[m]:.4g}" if m in row.metrics else "" for m in recorded),
        ]  # fmt: skip
        if quality:
            cells += [f"{v:.4g}" if v is not None else "" for v in (row.check.fvu, row.check.l0)]
        table.add_row(*cells)
    if not console.is_terminal:
        console.width = 180
    console.print(table)
    if len(shown) < len(plan.rows):
        console.print(f"... and {len(plan.rows) - len(shown)} more")
    for line in plan.summary():
        console.print(line, markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", style="yellow", markup=False)


def as_json(result: PushResult) -> dict[str, Any]:
    """The outcome for other programs."""
    plan = result.plan
    return {
        "repo_id": plan.repo_id,
        "url": result.url,
        "commit": result.commit,
        "committed": result.committed,
        "dry_run": result.published is None,
        "tag": result.tag,
        "saes": [
            {"id": row.id, "read_as": row.read_as, "selection": row.selection, "bytes": row.size, "on_hub": row.on_hub,
             "saelens": row.check.saelens, "saelens_error": row.check.saelens_error, "scope": row.scope,
             "metrics": row.metrics, "fvu": row.check.fvu, "l0": row.check.l0}
            for row in plan.rows
        ],
        "others": [{"path": path, "bytes": size} for path, size in plan.others],
        "kept": plan.kept,
        "new": [file.path for file in plan.diff.new],
        "changed": [file.path for file in plan.diff.changed],
        "deleted": plan.diff.deleted,
        "unchanged": len(plan.diff.unchanged),
        "notes": plan.notes,
    }  # fmt: skip


def _confirm(plan: PushPlan) -> bool:
    import sys

    show_plan(plan)
    if plan.diff.empty:
        return True
    if not sys.stdin.isatty():
        raise HubSAEError(
            "nobody is here to confirm this plan", hint="add --yes to publish it, or --dry-run to only see it"
        )
    return typer.confirm("Publish?", default=True)


def _refuse(plan: PushPlan) -> bool:
    raise HubSAEError("--json does not ask", hint="add --yes to publish, or --dry-run to only see the plan")


def _show_result(result: PushResult) -> None:
    console = out()
    assert result.published is not None
    if result.published.pr_url:
        console.print(f"proposed: {result.published.pr_url}", style="bold", markup=False)
        console.print(f'try it with revision="{result.published.revision}"', markup=False)
    elif result.committed:
        console.print(f"published: {result.url}", style="bold", markup=False)
        console.print(f"commit {result.commit}" + (f", tag {result.tag}" if result.tag else ""), markup=False)
    else:
        console.print(f"nothing to do: {result.url} already holds all of it", markup=False)
    first = result.plan.rows[0].id
    at = f"@{result.published.revision}" if result.published.revision != "main" else ""
    console.print(f'load it: HubSAE.from_pretrained("{result.plan.repo_id}{at}", "{first}")', markup=False)
