"""`hubsae eval`: measure the SAEs of a release, and write the numbers where its card finds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import print_json, print_table
from hubsae.core.errors import ConfigError, HubSAEError
from hubsae.core.files import write_csv_atomic
from hubsae.core.progress import say
from hubsae.core.text import printable

if TYPE_CHECKING:
    from hubsae.hub.sae import HubSAE

PANEL = "Train and measure"


def command(
    target: Annotated[str, typer.Argument(metavar="REPO_OR_PATH", help="A release: a folder, or a repo on the Hub.")],
    activations: options.Activations = None,
    config: Annotated[
        str | None, typer.Option(help="Config of the activations; otherwise chosen by each SAE's stage and layer.")
    ] = None,
    split: options.Split = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model to splice into: an id or a folder.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            "-t",
            help="Texts for the splice: .txt with one per line, or .jsonl with prompt and response, messages, or text.",
        ),
    ] = None,
    id: options.Id = None,
    layer: options.Layer = None,
    stage: options.Stage = None,
    k: options.K = None,
    scope: Annotated[
        str | None,
        typer.Option(help="Tokens the numbers are about, as 'response & not position_0'; otherwise each SAE's own."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude", "-x",
            help="Leave these tokens out, and alone in the splice: position_0, special, massive, any column. "
            "'none' leaves out nothing. Otherwise what the SAE's training left out.",
        ),
    ] = None,
    by_group: Annotated[
        bool, typer.Option("--by-group", help="The error by group of tokens: position 0, special, template, content.")
    ] = False,
    max_texts: options.MaxTexts = None,
    max_length: options.MaxLength = None,
    device: options.Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Type the model runs in; otherwise as it is stored.")] = None,
    force: options.Force = False,
    executor: options.Executor = None,
    tasks: options.Tasks = 1,
    workers: options.Workers = None,
    executor_set: options.ExecutorSet = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write tables here instead of into the release. Needed for a repo."),
    ] = None,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Measure reconstruction on activations, and cross-entropy with the SAE spliced into a model.

    Every number carries its definition, token count, scope and interval; docs/metrics.md has the list.

      hubsae eval release/ --activations acts/
      hubsae eval me/my-saes --activations me/my-acts --out results/
      hubsae eval release/ --model Qwen/Qwen2.5-0.5B-Instruct --text gsm8k.jsonl
      hubsae eval release/ --activations acts/ --by-group
    """
    from hubsae.core.scopes import excluding, parse
    from hubsae.hub.measured import load

    if executor is not None and (activations is None or text is not None or by_group):
        raise typer.BadParameter("tasks measure reconstruction: --activations, without --text and --by-group")
    if activations is None and model is None:
        raise typer.BadParameter("give --activations, or --model with --text, or both")
    if (text is not None or activations is None) and (model is None) != (text is None):
        raise typer.BadParameter("--model and --text go together")
    try:
        replace = None if not exclude else excluding([] if exclude == ["none"] else exclude).name
        scope = scope if scope is None else parse(scope).name
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    if executor == "jobs" and (target.startswith((".", "/")) or Path(target).exists()):
        raise ConfigError(
            f"in jobs on Hugging Face eval takes a release on the Hub; {target} is a folder",
            hint="push it, then name OWNER/NAME; from Python, hubsae.scale.Evaluate takes a folder of the bucket too",
        )
    if _release(target) is None and out is None and not by_group:
        raise ConfigError(
            f"{target} is not a release folder, so results cannot be written into it",
            hint="pass --out DIR; or fetch it with `hubsae pull`, evaluate, and push again",
        )
    saes = load(target, "cpu" if executor else device, id=id, layer=layer, stage=stage, k=k)
    shown = {name: scope or replace or sae.metadata.own_scope for name, sae in saes.items()}
    for one in sorted(set(shown.values())):
        why = "as asked for" if scope or replace else "what these SAEs are for, by their record"
        say(f"scope: {one} ({why})")
    if by_group:
        _by_group(saes, activations, config, split, model, force, as_json)
        return
    rows: list[dict[str, Any]] = []
    if activations is not None:
        from hubsae.scale.jobs import Evaluate

        job = Evaluate(
            release=target, activations=activations, out=None if out is None else str(out), config=config, split=split,
            filters={"id": id, "layer": layer, "stage": stage, "k": k}, scopes=[s for s in (scope, replace) if s],
            device=device, force=force,
        )  # fmt: skip
        rows += options.run_job(job, executor, tasks, workers, executor_set, saes=saes)
    if model is not None and text is not None:
        how = {"scope": scope or replace, "replace": replace, "max_length": max_length, "force": force}
        into = _release(target) if out is None else None
        rows += _splice(saes, model, text, max_texts, device, dtype, how, into, out)
    _show(rows, shown, as_json, out or target)


def _release(target: str) -> Any:
    from hubsae.formats.manifest import MANIFEST_NAME
    from hubsae.formats.release import Release

    return Release.open(target) if (Path(target) / MANIFEST_NAME).is_file() else None


def _by_group(
    saes: dict[str, HubSAE], path: str | None, config: str | None, split: str | None, model: str | None, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from hubsae.evals.groups import error_by_group
    from hubsae.hub.measured import together

    if path is None:
        raise typer.BadParameter("--by-group needs --activations")
    rows = []
    for data, group in together(saes, path, config, split):
        tokenizer = None
        name = model or data.info.get("model")
        if name:
            from hubsae.activations.models import load_tokenizer

            try:
                tokenizer = load_tokenizer(name)
            except HubSAEError as error:
                if model:
                    raise
                say(f"no tokenizer to tell special and template tokens by: {error.message}")
        rows += error_by_group(group, data, tokenizer, force=force, show=None)
    if as_json:
        print_json(rows)
        return
    heads = ["sae", "tokens", "n_tokens", "error", "relative_error", "share_of_error"]
    table = [[row["sae"], printable(row["tokens"]), *(row[column] for column in heads[2:])] for row in rows]
    print_table("error by group of tokens", heads, table)


def _splice(
    saes: dict[str, HubSAE], model_id: str, text: Path, max_texts: int | None, device: str, dtype: str | None,
    how: dict[str, Any], release: Any, out: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    from hubsae.activations.models import load_model, load_tokenizer
    from hubsae.evals.record import record_splice
    from hubsae.evals.splice import splice_many
    from hubsae.evals.texts import read_texts

    tokenizer = load_tokenizer(model_id)
    model = load_model(model_id, dtype=dtype, device=device)
    results = splice_many(model, tokenizer, saes, read_texts(text)[:max_texts], show=None, **how)
    rows = [row for result in results.values() for row in result.rows()]
    if release is not None:
        record_splice(release, results)
    elif out is not None:
        write_csv_atomic(out / "splice.csv", rows)
    return rows


SHOWN = (
    "fvu", "fve", "nmse_pooled", "l0", "dead_fraction",
    "delta_ce", "frac_recovered_mean", "frac_recovered_zero", "kl",
)  # fmt: skip


def _show(rows: list[dict[str, Any]], scopes: dict[str, str], as_json: bool, where: Any) -> None:
    if as_json:
        print_json(rows)
        return
    found = {(row["sae"], row["metric"], row["scope"]): row for row in rows}
    names = list(dict.fromkeys(row["sae"] for row in rows))
    columns = [m for m in SHOWN if any((name, m, scopes[name]) in found for name in names)]
    counts = sorted({row["n_tokens"] for row in rows if row["scope"] == scopes[row["sae"]]})
    table = [
        [name, scopes[name], *(found.get((name, m, scopes[name]), {}).get("value") for m in columns)] for name in names
    ]
    print_table(f"N = {', '.join(f'{n:,}' for n in counts)} tokens", ["sae", "scope", *columns], table)
    notes = {
        row["note"] for row in rows if row["note"] and row["scope"] == scopes[row["sae"]] and row["metric"] in columns
    }
    for note in sorted(notes):
        say(f"note: {note}")
    say(f"all metrics with their intervals: {where}")
