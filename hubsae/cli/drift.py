"""`hubsae drift`: how SAEs change along a chain of checkpoints, two chains compared, or a published table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import err, print_json, print_table
from hubsae.cli._common import out as console
from hubsae.core.errors import ConfigError
from hubsae.core.files import write_csv_atomic
from hubsae.core.progress import progress

if TYPE_CHECKING:
    from hubsae.evals.comparison import Comparison
    from hubsae.evals.drift import DriftReport

PANEL = "Train and measure"


def command(
    chain_a: Annotated[
        str | None, typer.Argument(metavar="[CHAIN_A]", help="A release with SAEs of several stages: folder or repo.")
    ] = None,
    chain_b: Annotated[str | None, typer.Argument(metavar="[CHAIN_B]", help="Another chain to compare with.")] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations",
            "-a",
            help="Activations of chain A, a config per stage and layer. Without them only weights are compared.",
        ),
    ] = None,
    activations_b: Annotated[str | None, typer.Option(help="Activations of chain B; otherwise those of A.")] = None,
    control: Annotated[
        str | None, typer.Option(help="A chain trained as long on base activations, to subtract.")
    ] = None,
    split: options.Split = None,
    layer: options.Layer = None,
    k: options.K = None,
    match: Annotated[
        str, typer.Option(help="How latents are matched: index, hungarian, or auto (looks whether the index holds).")
    ] = "auto",
    from_table: Annotated[
        str | None, typer.Option("--from-table", help="Analyse a published CSV table alone; a bundled name works too.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write here instead of into the release of chain A.")
    ] = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Cosines, births and deaths, cross matrix and rates along a chain; two chains at matched steps.

    hubsae drift release/ --activations acts/
    hubsae drift strict/ flexible/ -a acts-strict/ --activations-b acts-flexible/ --control control/
    hubsae drift --from-table chains_reconstruction.csv
    """
    if (chain_a is None) == (from_table is None):
        raise typer.BadParameter("give a chain, or --from-table, not both")
    if match not in ("auto", "index", "hungarian"):
        raise typer.BadParameter(f"{match!r} is not auto, index or hungarian", param_hint="--match")
    if from_table is not None:
        _table(from_table, out, as_json)
        return
    from hubsae.evals.comparison import compare
    from hubsae.evals.drift import drift
    from hubsae.evals.record import activation_reader, record_drift
    from hubsae.evals.report import summary, write_report
    from hubsae.formats.manifest import MANIFEST_NAME
    from hubsae.formats.release import Release
    from hubsae.hub.sae import HubSAE

    root = Path(str(chain_a))
    if out is None and not (root / MANIFEST_NAME).is_file():
        raise ConfigError(f"{chain_a} is not a release folder, so results cannot be written into it", "pass --out DIR")

    def load(chain: str) -> list[HubSAE]:
        return [sae for _, sae in HubSAE.iter_pretrained(chain, device=device, layer=layer, k=k)]

    def read(path: str | None) -> Any:
        return None if path is None else activation_reader(path, split=split)

    with progress("running SAEs over activations", unit="passes") as task:
        how: dict[str, Any] = {"match": match, "on_pass": lambda _: task.advance()}
        beside = None if control is None else load(control)
        report = drift(load(str(chain_a)), read(activations), control=beside, name=root.name, **how)
        comparison = None
        if chain_b is not None:
            other = drift(load(chain_b), read(activations_b or activations), name=Path(chain_b).name, **how)
            comparison = compare(report, other)
    if out is None:
        record_drift(Release.open(root), report, comparison)
    else:
        write_report(report, out)
        if comparison is not None and comparison.items:
            from hubsae.evals.plots import plot_comparison

            write_csv_atomic(out / "drift_comparison.csv", comparison.rows())
            plot_comparison(comparison, out / "drift_comparison.png")
    if as_json:
        print_json({**summary(report), "comparison": None if comparison is None else comparison.rows()})
        return
    _show(report, comparison)
    err().print(f"tables and plots: {out or root / 'results'}")


def _table(path: str, out: Path | None, as_json: bool) -> None:
    from hubsae.recipes.registry import find_recipe

    report = find_recipe("rl_chain").module("tables").analyse_table(path)
    if as_json:
        print_json(report.to_dict())
    else:
        marks = {True: "holds", False: "does not hold", None: "note"}
        for finding in report.findings:
            console().print(f"[{marks[finding['holds']]}] {finding['finding']}", markup=False)
    if out is not None:
        written = report.write(out)
        err().print(f"wrote {len(written)} files to {out}")


def _show(report: DriftReport, comparison: Comparison | None) -> None:
    rows = [[g.name, *(getattr(row, field) for field in SHOWN)] for g in report.groups for row in g.stages]
    print_table(report.name, ["group", *SHOWN], rows)
    moves = [
        [g.name, f"{m.from_stage} → {m.to_stage}", m.matching, m.decoder_mean, m.encoder_mean]
        for g in report.groups
        for m in g.moves
        if m.against == "previous"
    ]
    print_table("directions", ["group", "stages", "matched by", "decoder cosine", "encoder cosine"], moves)
    if comparison is not None:
        table = [
            [f"layer {c.layer} k {c.k}", c.metric, c.scope, c.end_to_end.ratio, c.matched.ratio, c.matched.steps_a]
            for c in comparison.items
        ]
        heads = ["group", "metric", "scope", "rate ratio end to end", "at matched step", "step"]
        print_table(f"{comparison.a} / {comparison.b}", heads, table)
        for note in comparison.left_out:
            err().print(f"not compared: {note}", markup=False)


SHOWN = ("stage", "scope", "nmse_before", "nmse_after", "alive", "births", "deaths", "effective_features")
