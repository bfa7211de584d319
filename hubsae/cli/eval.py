"""`hubsae eval`: measure the SAEs of a release, and write the numbers where its card finds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubsae.cli._common import JsonOption

if TYPE_CHECKING:
    from hubsae.hub.sae import HubSAE

PANEL = "Train and measure"


def command(
    target: Annotated[str, typer.Argument(metavar="REPO_OR_PATH", help="A release: a folder, or a repo on the Hub.")],
    activations: Annotated[
        str | None, typer.Option("--activations", "-a", help="Activations: a folder, a file, or a dataset repo.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Config of the activations; otherwise chosen by each SAE's stage and layer.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split; otherwise validation, then test, then train.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model to splice into: an id or a folder.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            "-t",
            help="Texts for the splice: .txt with one per line, or .jsonl with prompt and response, messages, or text.",
        ),
    ] = None,
    id: Annotated[str | None, typer.Option("--id", help="Only this SAE.")] = None,
    layer: Annotated[int | None, typer.Option(help="Only SAEs of this layer.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only SAEs of this stage.")] = None,
    k: Annotated[int | None, typer.Option(help="Only SAEs with this k.")] = None,
    scope: Annotated[str, typer.Option(help="Splice: all, prompt or response, for the table shown here.")] = "all",
    max_texts: Annotated[int | None, typer.Option(min=1, help="Splice: use only the first N texts.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Splice: cut texts at this many tokens.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Type the model runs in; otherwise as it is stored.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write tables here instead of into the release. Needed for a repo."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure reconstruction on activations, and cross-entropy with the SAE spliced into a model.

    Every number carries its definition, token count, scope and interval; docs/metrics.md has the list.

      hubsae eval release/ --activations acts/
      hubsae eval me/my-saes --activations me/my-acts --out results/
      hubsae eval release/ --model Qwen/Qwen2.5-0.5B-Instruct --text gsm8k.jsonl
    """
    from hubsae.core.errors import ConfigError

    if activations is None and model is None:
        raise typer.BadParameter("give --activations, or --model with --text, or both")
    if (model is None) != (text is None):
        raise typer.BadParameter("--model and --text go together")
    if scope not in ("all", "prompt", "response"):
        raise typer.BadParameter(f"{scope!r} is not all, prompt or response", param_hint="--scope")
    release = _release(target)
    if release is None and out is None:
        raise ConfigError(
            f"{target} is not a release folder, so results cannot be written into it",
            hint="pass --out DIR; or fetch it with `hubsae pull`, evaluate, and push again",
        )
    saes = _load(target, device, id=id, layer=layer, stage=stage, k=k)
    rows: list[dict[str, Any]] = []
    if activations is not None:
        rows += _reconstruct(saes, activations, config, split, release if out is None else None, out)
    if model is not None and text is not None:
        options = {"scope": scope, "max_length": max_length}
        rows += _splice(saes, model, text, max_texts, device, dtype, options, release if out is None else None, out)
    _show(rows, scope, as_json, out or target)


def _release(target: str) -> Any:
    from hubsae.formats.manifest import MANIFEST_NAME
    from hubsae.formats.release import Release

    return Release.open(target) if (Path(target) / MANIFEST_NAME).is_file() else None


def _load(target: str, device: str, **filters: Any) -> dict[str, HubSAE]:
    from hubsae.cli._common import progress
    from hubsae.hub.sae import HubSAE

    chosen = {name: value for name, value in filters.items() if value is not None}
    saes: dict[str, HubSAE] = {}
    with progress("loading SAEs") as advance:
        for name, sae in HubSAE.iter_pretrained(target, device=device, **chosen):
            saes[name] = sae
            advance(1)
    return saes


def _reconstruct(
    saes: dict[str, HubSAE], path: str, config: str | None, split: str | None, release: Any, out: Path | None
) -> list[dict[str, Any]]:
    from hubsae.evals.reconstruction import reconstruction
    from hubsae.evals.record import activation_reader, record_reconstruction, stage_and_layer
    from hubsae.evals.results import ReconstructionResult

    read = activation_reader(path, config=config, split=split)
    together: dict[int, tuple[Any, dict[str, HubSAE]]] = {}
    for name, sae in saes.items():
        data = read(*stage_and_layer(sae))
        together.setdefault(id(data), (data, {}))[1][name] = sae
    measured: dict[str, Any] = {}
    tokens, scopes = 0, []
    for data, group in together.values():
        result = reconstruction(group, data, show=None, name=f"{data.config} {data.split}, {len(group)} SAEs")
        measured.update(result.saes)
        tokens, scopes = tokens + result.n_tokens, result.scopes
    whole = ReconstructionResult(measured, tokens, scopes)
    if release is not None:
        record_reconstruction(release, whole)
    elif out is not None:
        whole.write(out)
    return whole.rows()


def _splice(
    saes: dict[str, HubSAE],
    model_id: str,
    text: Path,
    max_texts: int | None,
    device: str,
    dtype: str | None,
    options: dict[str, Any],
    release: Any,
    out: Path | None,
) -> list[dict[str, Any]]:
    from hubsae.cli._common import progress
    from hubsae.core.extras import require
    from hubsae.core.files import write_csv_atomic
    from hubsae.evals.record import record_splice
    from hubsae.evals.splice import splice_many
    from hubsae.evals.texts import read_texts

    transformers = require("transformers", extra="train")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_id)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_id, dtype=dtype or "auto").to(device)
    texts = read_texts(text)[:max_texts]
    with progress(f"splicing {len(saes)} SAEs", total=len(texts)) as advance:
        results = splice_many(model, tokenizer, saes, texts, on_batch=advance, **options)
    rows = [row for result in results.values() for row in result.rows()]
    if release is not None:
        record_splice(release, results)
    elif out is not None:
        write_csv_atomic(out / "splice.csv", rows)
    return rows


SHOWN = (
    ("nmse_pooled", None),
    ("fve", None),
    ("fve", "not position_0"),
    ("l0", None),
    ("dead_fraction", None),
    ("delta_ce", None),
    ("frac_recovered_mean", None),
    ("frac_recovered_zero", None),
    ("kl", None),
)


def _show(rows: list[dict[str, Any]], scope: str, as_json: bool, where: Any) -> None:
    from hubsae.cli._common import err, print_json, print_table

    if as_json:
        print_json(rows)
        return
    splice_metrics = {"delta_ce", "frac_recovered_mean", "frac_recovered_zero", "kl"}
    found = {(row["sae"], row["metric"], row["scope"]): row for row in rows}
    names = list(dict.fromkeys(row["sae"] for row in rows))
    columns = []
    for metric, fixed in SHOWN:
        wanted = fixed or (scope if metric in splice_metrics else "all")
        if any((name, metric, wanted) in found for name in names):
            columns.append((metric, wanted))
    counts = sorted({row["n_tokens"] for row in rows if row["scope"] == "all"})
    table = [
        [name, *(found.get((name, metric, wanted), {}).get("value") for metric, wanted in columns)] for name in names
    ]
    heads = [metric if wanted == "all" else f"{metric} ({wanted})" for metric, wanted in columns]
    print_table(f"N = {', '.join(f'{n:,}' for n in counts)} tokens", ["sae", *heads], table)
    err().print(f"all metrics with their intervals: {where}")
