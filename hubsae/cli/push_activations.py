"""`hubsae push-activations`: publish an activation dataset to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import confirm, err, print_json, print_table
from hubsae.core.text import format_bytes as size

PANEL = "Activations"


def command(
    folder: Annotated[Path, typer.Argument(help="Dataset folder, as written by harvest or convert-activations.")],
    repo_id: Annotated[str | None, typer.Option("--repo-id", help="Dataset repo; default <you>/<folder>.")] = None,
    revision: Annotated[str, typer.Option(help="Branch to push to.")] = "main",
    pr: options.Pr = False,
    private: options.Private = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not check every page first.")] = False,
    allow_secrets: options.AllowSecrets = False,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    as_json: options.Json = False,
) -> None:
    """Publish activations in one commit; an interrupted push is completed by the next."""
    from hubsae.hub.client import HubClient
    from hubsae.hub.datasets import plan_push, push_activations

    client = HubClient(notify=err().print)
    plan = plan_push(
        folder, repo_id or ("OWNER/" + folder.resolve().name if dry_run else None), client=client,
        verify=not no_verify, allow_secrets=allow_secrets,
    )  # fmt: skip
    if as_json and dry_run:
        print_json(
            {"repo_id": plan.repo_id, "bytes": plan.bytes, "splits": plan.rows(), "files": [f.path for f in plan.files]}
        )
        return
    if not as_json:
        rows = [
            (r["config"], r["split"], r["rows"], f"{r['dtype']} x {r['d']}", r["scale"], r["files"], size(r["bytes"]))
            for r in plan.rows()
        ]
        columns = ["config", "split", "rows", "vectors", "scale", "files", "size"]
        print_table(f"{plan.repo_id}: {size(plan.bytes)}", columns, rows)
    if dry_run:
        return
    confirm(f"publish {size(plan.bytes)} to {plan.repo_id}?", yes=yes or as_json)
    done = push_activations(
        folder, plan.repo_id, private=private or None, revision=revision, pr=pr, client=client, plan=plan
    )
    if as_json:
        print_json({"repo_id": done.repo_id, "commit": done.commit, "committed": done.committed, "url": done.url})
    else:
        err().print(f"{'published' if done.committed else 'unchanged'}: {done.url} ({done.commit[:10]})")
