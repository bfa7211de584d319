"""The report of a chain: how the policy learned, what the SAEs do, how they drift, and the published numbers beside."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubsae.core.files import read_csv
from hubsae.core.text import stage_step
from hubsae.recipes.report import Report
from hubsae.rl.config import METHOD

from .conclusions import conclusions
from .settings import ChainConfig
from .verdicts import Band, compare, summary_of

Rows = list[dict[str, Any]]

HEADLINES = {
    "mse": "mse", "nmse": "nmse_pooled", "fvu": "fvu", "n_dead": "n_dead", "l_sae": "ce_sae", "delta_ce": "delta_ce",
    "frac_rec": "frac_recovered_mean", "kl": "kl",
}  # fmt: skip
"""Columns of the published table and ours, and the names of the measures they are."""

METRICS = ("mse", "nmse", "n_dead", "l_sae", "frac_rec")
"""Columns of the published table."""

SHORT = ("strict", "flexible", "verl_flexible", "lm_eval_strict", "length", "problems")


def write_chain_report(
    folder: Path,
    config: ChainConfig,
    *,
    accuracy: Mapping[str, dict[str, Any]],
    merge: Sequence[dict[str, Any]],
    measures: Mapping[str, Sequence[Mapping[str, str]]],
    drift: Path,
    learning: Path | None,
    published: Path,
) -> dict[str, Any]:
    """Write `report.md` with its tables; returns the summary a caller may show."""
    report = Report(f"Chain {config.name}")
    if config.about:
        report.text(config.about)
    steps = read_csv(learning / "metrics.csv") if learning is not None else []
    net = drift / "drift_control.csv"
    moved = conclusions(config, accuracy, steps, merge, read_csv(net) if net.is_file() else [])
    if moved:
        report.heading("Did anything move?")
        report.text(" ".join(moved))
    _learning(report, config, accuracy, merge, learning, folder)
    headline = headline_rows(config, measures)
    report.heading("The SAEs, each on held-out activations and texts of its own stage")
    report.table("Measures", "reconstruction", headline)
    report.text(
        f"Activations: {config.harvest.train_on}; scope of these numbers and of those on drift: {config.sae.scope}, "
        "which is what the SAEs are for. `nmse` divides by the pooled variance of all elements, which a few "
        "massive coordinates can dominate; `fvu` does not. `n_dead` depends on the number of "
        "tokens (`n_tokens`). All measures, with scopes and intervals, are in `measures.csv` of the release."
    )
    _drift(report, config.sae.scope, drift, folder)
    verdicts = _published(report, config, accuracy, headline, drift, published)
    report.write(folder)
    base, last = accuracy[config.base_stage], accuracy[config.harvested_stages()[-1]]
    lines = [f"{name} accuracy {base[name]:.3f} -> {last[name]:.3f}" for name in ("strict", "flexible")]
    return {
        "accuracy": {name: {"base": base[name], "last": last[name]} for name in ("strict", "flexible")},
        "verdicts": verdicts,
        "lines": [*lines, *(f"published {title}: {text}" for title, text in verdicts.items())],
    }


def headline_rows(config: ChainConfig, measures: Mapping[str, Sequence[Mapping[str, str]]]) -> Rows:
    """One row per SAE with the columns of the published table."""
    rows: Rows = []
    for stage, found in measures.items():
        members: dict[tuple[str, str], dict[str, Any]] = {}
        for row in found:
            if row["scope"] != config.sae.scope or row["texts"] not in (config.harvest.train_on, "held-out"):
                continue
            member = members.setdefault(
                (row["chain"], row["layer"]),
                {"chain": config.name, "stage": stage, "layer": int(row["layer"]), "k": int(row["k"])},
            )
            for column, name in HEADLINES.items():
                if row["metric"] == name and row["value"]:
                    member[column] = float(row["value"])
            if row["metric"] == "mse":
                member["n_tokens"] = int(row["n_tokens"])
        rows += members.values()
    return rows


def _learning(
    report: Report,
    config: ChainConfig,
    accuracy: Mapping[str, dict[str, Any]],
    merge: Sequence[dict[str, Any]],
    learning: Path | None,
    folder: Path,
) -> None:
    report.heading("The policy")
    if config.warmup is not None:
        report.text(
            f"Before everything else {config.warmup.steps} supervised steps of {config.warmup.batch} given answers "
            f"taught the answer format; `{config.base_stage}` is the model after them, not the one it is named for."
        )
    if config.rl is not None and config.runs_rl:
        rl = config.rl
        gold = ", against the gold of other problems" if rl.shuffled_gold else ""
        report.text(
            f"{METHOD}. Reward: scorer `{rl.scorer}`{gold}. {rl.steps} steps of {rl.sequences} "
            f"responses, {rl.minibatches} updates each; KL coefficient {rl.kl_coef}; "
            + (f"LoRA r {rl.lora.r}, alpha {rl.lora.alpha}." if rl.lora else "all weights.")
        )
    elif config.control_steps:
        report.text("No reinforcement learning: every stage is the base model, and only the SAEs train on.")
    else:
        report.text("Stages are checkpoints that existed already.")
    rows = [{"stage": stage, **{name: found[name] for name in SHORT}} for stage, found in accuracy.items()]
    report.table("Held-out accuracy by scorer", "accuracy", rows)
    temperature = config.evaluation.accuracy_temperature
    report.text(f"Sampled at temperature {temperature:g}." if temperature else "Greedy decoding.")
    if learning is not None and (folder / "learning.png").is_file():
        report.figure("Reward, KL, length and entropy by step", "learning.png")
    if merge:
        report.table("Size of the update, and what storing a stage in fewer bits loses of it", "merge_loss", merge)
        report.text(
            "`update`: norm of the change since the base over that of the weights. `unchanged`: share of the changed "
            "elements that the format rounds back to the base's value. Stages here are merged in float32."
        )


def _drift(report: Report, scope: str, drift: Path, folder: Path) -> None:
    report.heading("Drift")
    moves = [row for row in read_csv(drift / "drift_moves.csv") if row["against"] == "previous"]
    columns = ["chain", "layer", "k", "from_stage", "to_stage", "decoder_mean", "encoder_mean"]
    columns += ["encoder_decoder_correlation", "decoder_drift_per_step"]
    report.table(
        "Cosine of each latent to the stage before, the control below the chain", "moves", moves, columns=columns
    )
    if (drift / "drift_control.csv").is_file():
        every = read_csv(drift / "drift_control.csv")
        rows = [row for row in every if row["scope"] == scope and row["metric"] in ("nmse_pooled", "fvu")]
        report.table("Change since the base, the control's at the same step, and what remains", "less_control", rows)
        report.text(
            "A warm-started chain improves by training alone. The control trains as long on the base model's "
            "activations; only what remains after subtracting it can belong to the policy. "
            "Other metrics and scopes: `drift_control.csv`."
        )
    if (drift / "comparison.csv").is_file():
        every = read_csv(drift / "comparison.csv")
        rows = [row for row in every if row["scope"] == scope and row["metric"] in ("nmse_pooled", "fvu")]
        report.table("Beside other chains", "comparison", rows)
        report.text(
            "Rates include what training alone does: where the control falls as far as the chains, their agreement "
            "says nothing about the policies, and the changes less the control are to be compared. "
            "`end_to_end` divides each chain's change by its own number of steps, `matched` compares both at the same "
            "steps. Curves flatten, so the first favours whichever chain is shorter."
        )
    for plot in sorted(drift.glob("*.png")):
        report.figure(plot.stem.replace("_", " "), os.path.relpath(plot, folder))


def _published(
    report: Report,
    config: ChainConfig,
    accuracy: Mapping[str, dict[str, Any]],
    headline: Rows,
    drift: Path,
    folder: Path,
) -> dict[str, str]:
    name = config.published_as
    if name is None:
        return {}
    report.heading("Beside the published numbers")
    tendencies = _tendencies(config, name, accuracy, headline, drift, folder)
    if not config.same_model:
        report.text(
            f"This run used {config.model.label}, not the published model, so single numbers cannot be compared and no "
            "verdict is given; `--profile full` gives verdicts. What can be compared is which way things go."
        )
        report.table("Tendencies of both", "tendencies", tendencies)
        return {}
    report.table("Tendencies of both", "tendencies", tendencies)
    everything = read_csv(folder / "published_reconstruction.csv")
    rows = [row for row in everything if row["chain"] == name]
    ours = [{**row, "chain": name} for row in headline]
    tables = {
        "reconstruction": compare(
            ours, rows, keys=["chain", "stage", "layer", "k"], metrics=METRICS,
            bands=replicate_bands(everything, config.base_stage),
        ),
        "accuracy": _accuracy(config, name, accuracy, folder),
        "decoder_cosine": _cosines(config, name, drift, folder),
    }  # fmt: skip
    for title, found in tables.items():
        report.table(f"Published {title.replace('_', ' ')}: {summary_of(found)}", f"published_{title}", found, most=24)
    report.text(
        "Bands are the range of the replicates that the published work has: three trainings of the base stage per "
        "layer, and two runs under the strict reward. Differences in cross-entropy below 0.006 mean nothing: that is "
        "how far two published baselines of one model lie apart."
    )
    return {title: summary_of(found) for title, found in tables.items()}


def replicate_bands(published: Sequence[Mapping[str, str]], base_stage: str) -> list[Band]:
    """The range of each number of the base stage over the chains: there it is the same model, trained on again.

    >>> rows = [{"stage": "base", "layer": "6", "k": "64", "mse": m} for m in (".0238", ".0235", ".0251")]
    >>> band = replicate_bands(rows, "base")[0]
    >>> band.low, band.high
    (0.0235, 0.0251)
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in published:
        for metric in METRICS if row["stage"] == base_stage else ():
            if row.get(metric):
                found.setdefault((row["layer"], row["k"], metric), []).append(float(row[metric]))
    return [
        Band({"stage": base_stage, "layer": layer, "k": k}, metric, min(values), max(values))
        for (layer, k, metric), values in found.items()
        if len(values) > 1
    ]


def _accuracy(config: ChainConfig, name: str, accuracy: Mapping[str, dict[str, Any]], folder: Path) -> Rows:
    """Each chain was scored by its own reward."""
    every = read_csv(folder / "published_accuracy.csv")
    runs = sorted({row["run"] for row in every if row["run"].rpartition("_")[0] == name or row["run"] == name})
    steps: dict[int, list[float]] = {}
    for row in every:
        if row["run"] in runs:
            steps.setdefault(int(row["step"]), []).append(float(row["accuracy"]))
    scorer = config.rl.scorer if config.rl is not None else "strict"
    measured = {stage_step(stage): found.get(scorer) for stage, found in accuracy.items()}
    published = [{"step": s, "accuracy": sum(v) / len(v)} for s, v in sorted(steps.items()) if s in measured]
    bands = [Band({"step": s}, "accuracy", min(v), max(v)) for s, v in steps.items() if len(v) > 1]
    ours = [{"step": step, "accuracy": value} for step, value in measured.items()]
    return compare(ours, published, keys=["step"], metrics=["accuracy"], bands=bands)


def _cosines(config: ChainConfig, name: str, drift: Path, folder: Path) -> Rows:
    published = [row for row in read_csv(folder / "published_decoder_cosine.csv") if row["chain"] == name]
    ours = [
        {
            "layer": row["layer"], "k": row["k"], "from_step": row["from_step"], "to_step": row["to_step"],
            "mean_decoder_cosine": row["decoder_mean"],
        }
        for row in read_csv(drift / "drift_moves.csv")
        if row["against"] == "previous" and row["chain"] == config.name
    ]  # fmt: skip
    keys = ["layer", "k", "from_step", "to_step"]
    return compare(ours, published, keys=keys, metrics=["mean_decoder_cosine"])


def _tendencies(
    config: ChainConfig, name: str, accuracy: Mapping[str, dict[str, Any]], headline: Rows, drift: Path, folder: Path
) -> Rows:
    """What can be said of two different models: changes from the first stage to the last, and the first cosine."""
    every = read_csv(folder / "published_accuracy.csv")
    run = next((r["run"] for r in every if r["run"].partition("_")[0] == name), None)
    curve = [float(row["accuracy"]) for row in every if row["run"] == run]
    scorer = config.rl.scorer if config.rl is not None else "strict"
    mine = [found[scorer] for found in accuracy.values()]
    rows: Rows = [{"what": f"accuracy by its own reward ({scorer}), first -> last", "published": _span(curve),
                   "measured": _span(mine)}]  # fmt: skip
    published = [row for row in read_csv(folder / "published_reconstruction.csv") if row["chain"] == name]
    rows.append(
        {
            "what": "nmse of the last stage / of the base, over layers",
            "published": _range(_ratios(published)),
            "measured": _range(_ratios(headline)),
        }
    )
    cosines = [r for r in read_csv(folder / "published_decoder_cosine.csv") if r["chain"] == name]
    moves = [r for r in read_csv(drift / "drift_moves.csv") if r["against"] == "previous" and r["chain"] == config.name]
    first = moves[0]["from_stage"] if moves else None
    rows.append(
        {
            "what": "mean decoder cosine, base -> first stage, over layers",
            "published": _range([float(r["mean_decoder_cosine"]) for r in cosines if r["from_step"] == "0"]),
            "measured": _range([float(r["decoder_mean"]) for r in moves if r["from_stage"] == first]),
        }
    )
    return rows


def _ratios(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """nmse of the last stage over that of the first, for every layer and k."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.get("nmse") not in (None, ""):
            groups.setdefault((str(row["layer"]), str(row["k"])), []).append(float(row["nmse"]))
    return [values[-1] / values[0] for values in groups.values() if len(values) > 1 and values[0]]


def _range(values: Sequence[float]) -> str | None:
    return f"{min(values):.3g} to {max(values):.3g}" if values else None


def _span(values: Sequence[float]) -> str | None:
    return f"{values[0]:.3g} -> {values[-1]:.3g}" if values else None
