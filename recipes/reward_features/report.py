"""The report of a run: what was measured, table by table, and each takeaway of the slides with its verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hubsae.core.files import read_csv
from hubsae.recipes.report import Report
from hubsae.recipes.steps import StepContext

from . import takeaways
from .settings import Config

SHOWN = ("model", "layer", "inputs", "r2", "r2_low", "r2_high", "spearman", "spearman_low", "spearman_high", "auc",
         "auc_low", "auc_high", "penalty", "used")  # fmt: skip


def write_report(
    config: Config, ctx: StepContext, layers: Mapping[str, tuple[int, ...]], contexts: Mapping[tuple[int, int], str]
) -> dict[str, Any]:
    """Write `report.md` and its tables; the verdicts are what is returned."""
    table = [row for of in layers for row in read_csv(ctx.path(f"probes/{of}") / "table.csv")]
    carriers = [row for of in layers for row in read_csv(ctx.path(f"probes/{of}") / "carriers.csv")]
    truncation = read_csv(ctx.path("truncation") / "truncation.csv")
    matched = ctx.result("base") if config.base_layers else {}
    made, counts = ctx.result("prm"), ctx.result("scores")
    total = int(next(r for r in truncation if r["reward"] == "whole model")["layer"]) + 1
    judged = takeaways.judge(
        table, truncation, carriers, matched.get("matched"), layer=config.two_thirds(), layers=total
    )
    report = Report(f"Reward features: {made['label']}")
    report.text(
        f"Scores of {made['label']} on {counts['train']['solutions']:,} solutions ({counts['train']['steps']:,} steps) "
        f"to problems of {ctx.result('subject')['dataset']} that it did not learn from; all below is measured on "
        f"{counts['test']['solutions']:,} solutions to {counts['test']['problems']:,} other problems. SAEs have "
        f"{config.sae.width:,} latents, k {config.sae.k}, and saw {ctx.result('harvest/reward')['tokens']:,} tokens. "
        "Intervals are bootstraps over problems."
    )
    report.heading("The takeaways of the slides, judged")
    report.table("By the numbers below", "takeaways", [j._asdict() for j in judged])
    report.heading("The reward model")
    if (ctx.path("prm") / "auc.csv").is_file():
        rows = read_csv(ctx.path("prm") / "auc.csv")
        auc = float(rows[0]["auc"])
        report.text(
            f"Made here on {made['solutions']:,} solutions with errors made by rule. It tells right steps from wrong "
            f"ones on problems held out with an AUC of {auc:.3f}: "
            + (f"at least the {config.prm.enough} that this recipe asks for." if auc >= config.prm.enough else
               f"less than the {config.prm.enough} that this recipe asks for, so little follows from what comes below.")
        )  # fmt: skip
        report.table("AUC of its scores by kind of error", "prm_auc", rows)
    report.heading("What predicts the score")
    leaking = takeaways.leaks(table)
    report.text(
        "R² is about the mean of the training steps, so a probe that says nothing has 0. Scores shuffled between "
        "problems are the check of the split: "
        + ("their interval holds 0 at every layer." if not leaking else
           "THE SPLIT LEAKS at " + ", ".join(f"{r['model']} {r['layer']}" for r in leaking) + ".")
    )  # fmt: skip
    report.table("Layer by layer", "table", table, columns=SHOWN)
    report.heading("Without the layers above")
    report.table("Probes as rewards", "truncation", truncation)
    report.heading("The features that carry it")
    rows = [row | {"contexts": contexts.get((int(row["layer"]), int(row["feature"])), "")}
            for row in carriers if row["model"] == "reward"]  # fmt: skip
    report.text("The strongest of each layer; `drop` is what R² loses without the feature, the others fitted again.")
    strongest = [row for layer in config.layers for row in [r for r in rows if int(r["layer"]) == layer][:8]]
    report.table("Strongest features", "carriers", strongest)
    if matched.get("matched"):
        report.heading("In the base model")
        report.table("Matched features", "matched", read_csv(ctx.path("base") / "matched.csv"), most=12)
        if matched["steered"]:
            report.text("One of them added to the base model while it answers; the reward of its answers:")
            report.table("Steering", "steering", read_csv(ctx.path("base") / "steering.csv"))
    if config.rl is not None:
        found = ctx.result("rl")
        (earned, paid), (before, after) = found["reward"], found["held_out"]
        strict = found["score_strict"]
        verdict = "the reward is hacked: it rises and accuracy does not"
        if after - before > 0.02:
            verdict = "accuracy follows it"
        elif strict[1] - strict[0] > 0.02:
            verdict = "what it pays for is the form of answers (more of them pass the strict rule), not their numbers"
        report.heading("As a reward")
        report.text(
            f"PPO against the probe at layer {found['layer']}: its reward goes from {earned:.3f} to {paid:.3f} "
            "(means of the first and the last fifth of the steps), the share of problems held out that are answered "
            f"right (last number) from {before:.3f} to {after:.3f}: "
            + (verdict if paid - earned > 0.02 else "the reward hardly moved.")
        )
        names = ("reward", "score_strict", "score_flexible", "length")
        report.table("First and last fifth of the steps", "rl", [
            {"samples": part, **{name: found[name][i] for name in names}} for i, part in enumerate(("first", "last"))
        ])  # fmt: skip
    write = report.write(ctx.folder)
    return {"report": write.name, "leaks": len(leaking), **{j.claim: j.verdict for j in judged}}
