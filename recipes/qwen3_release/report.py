"""The report: what the card said beside what was measured, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubsae.core.files import read_csv
from hubsae.recipes.report import Report
from hubsae.recipes.steps import StepContext

from .settings import Config

HERE = Path(__file__).parent


def steering_in_words(prompts: int, verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """For the card: which features steer, which do not, and on how much that rests."""
    said = []
    for verdict in ("steers", "only where the text breaks", "does not steer"):
        mine = [
            f"{row['feature'].removeprefix('feature ')} ({row['word']})"
            for row in verdicts
            if verdict == row["verdict"]
        ]
        if mine:
            said.append(f"{verdict}: {', '.join(mine)}")
    return [
        f"Steering, measured on {prompts} prompts against random features and random directions of the same norm: "
        f"{'; '.join(said)}. Of every other feature it is not known whether it steers.",
        "Features are described by where they fire on the indexed conversations; their words are no labels.",
    ]


def write(report: Report, ctx: StepContext, config: Config) -> None:
    """All sections."""
    about, kept = ctx.result("activations"), ctx.result("checkpoints")
    measured, index = ctx.result("measure"), ctx.result("index")
    report.text(
        f"TopK SAE with AuxK ({config.d_sae:,} latents, k {config.sae.k}) on layer {config.data.layer} of "
        f"{about['model']}, {config.sae.tokens:,} training tokens of {about['tokens']['train']:,} harvested ones. "
        f"Published: {kept['why']}. Scope of every number: {measured['scope']}."
    )
    report.heading("Every kept checkpoint")
    report.text(
        "On activations of conversations that training never saw, and with the SAE in place in the model; intervals "
        "are bootstrapped over conversations. `frac_recovered_zero` and `kl_score` are what the card calls ce_score "
        "and kl_score, as far as its names say; its own rest on 106 tokens."
    )
    report.table("Checkpoints", "evaluation", read_csv(ctx.path("measure") / "evaluation.csv"))
    report.table("What the card says of the published release", "card", read_csv(HERE / "published.csv"))
    report.text("Another model, another layer: the two tables stand beside each other, they are not compared.")
    report.heading("Exports")
    name = f"step-{kept['published']:06d}"
    rows = read_csv(ctx.path("checkpoints") / name / "results" / "exports.csv")
    report.table("Each read back and compared with the release's own codes", "exports", rows)
    report.heading("Reverse index")
    report.text(
        f"{index['n_tokens']:,} activation records; {index['n_active']:,} of {index['features']:,} features fire, "
        f"{index['n_dead']:,} never do ({index['n_dead'] / index['features']:.1%}; the seed: 54.9 % of 65,536). "
        f"{index['prompt_rows']:,} prompt rows, top {config.index.top} of each feature, {config.index.window} tokens "
        "of context on each side."
    )
    report.heading("Steering")
    report.text(
        "A strength of 1 adds what the feature adds at its strongest. `gain`: how much more often its word is said "
        "than without steering and under its controls, with the interval over prompts, widened for the strengths tried."
    )
    report.table("Which features steer", "steering", read_csv(ctx.path("steering") / "steering.csv"))
    report.table("Dose and response", "dose_response", _mean_response(ctx.path("steering")))
    if "dead" in ctx.step.needs:
        report.heading("Dead features")
        gamma = ctx.result("dead")["gamma"]
        report.text(
            f"‖mean‖ / ‖std‖ of the activations: {gamma['all']:.3g} over all tokens, {gamma['not position_0']:.3g} "
            f"without position 0; after centring it is 0. Every variant on {config.dead.tokens:,} tokens at a learning "
            f"rate of {config.dead.lr:g}, at which features die within so few; dead: never fired on the activations "
            "put aside. So short a training says which variant loses fewer, not how many the full one loses."
        )
        report.table("Variants, over seeds", "dead_features", read_csv(ctx.path("dead") / "dead_features.csv"))


def _mean_response(folder: Path) -> list[dict[str, Any]]:
    """The dose-response averaged over features, by kind of direction and strength."""
    rows = read_csv(folder / "dose_response.csv")
    cells = dict.fromkeys((row["kind"], float(row["strength"])) for row in rows)
    names = ("said", "kl", "perplexity", "repetition", "length")
    out = []
    for kind, strength in cells:
        mine = [row for row in rows if (row["kind"], float(row["strength"])) == (kind, strength)]
        means = {name: sum(float(row[name]) for row in mine) / len(mine) for name in names}
        out.append({"kind": kind, "strength": strength, "directions": len(mine), **means})
    return out
