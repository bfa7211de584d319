"""The report: the one table, what stands behind it, the published tables beside ours, and the claims judged by both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubsae.recipes.report import Report

from . import published
from .settings import LABELS, Config

Row = dict[str, Any]
SHORT = ("kind", "FAST against", "tokens", "error ratio, same coefficient", "L0 there", "error ratio, equal L0", "low",
         "high", "seeds lower", "holds")  # fmt: skip
OURS = {
    "Standard SAEs: FAST has the lowest MSE": ("standard", "all tokens, as published"),
    "Standard SAEs: FAST has the lowest MSE_st": ("standard", "special tokens, as published"),
    "JumpReLU SAEs: FAST has the lowest MSE": ("jumprelu", "all tokens, as published"),
    "JumpReLU SAEs: FAST has the lowest MSE_st": ("jumprelu", "special tokens, as published"),
}


def findings(advantage: Sequence[Row]) -> list[str]:
    """The table in words: of each kind of SAE, what is left of FAST's advantage on special tokens.

    >>> row = {"kind": "topk", "FAST against": "BT(F)", "tokens": "special tokens, as published", "low": 0.2,
    ...        "high": 0.9, "error ratio, same coefficient": 0.5, "error ratio, equal L0": 0.5, "holds": "yes"}
    >>> findings([row])[0]
    'topk, special tokens, as published: the error of FAST is 0.5 times that of BT(F) at equal L0 [0.2, 0.9] (yes).'
    """
    lines = []
    for row in advantage:
        if row["FAST against"] != "BT(F)" or "special" not in row["tokens"]:
            continue
        ratio, low, high = (row[name] for name in ("error ratio, equal L0", "low", "high"))
        where = f"{row['kind']}, {row['tokens']}: the error of FAST is"
        if ratio is None:
            lines.append(
                f"{where} {row['error ratio, same coefficient']:.3g} times that of BT(F) at the same coefficient; "
                "there is no L0 that all methods reach."
            )
        else:
            interval = f" [{low:.3g}, {high:.3g}]" if low is not None else ""
            lines.append(f"{where} {ratio:.3g} times that of BT(F) at equal L0{interval} ({row['holds']}).")
    return lines


def judged(tables: dict[str, list[Row]]) -> list[Row]:
    """The published claims, what the published tables say of them, and what this run does."""
    rows = []
    for claim in published.claims():
        here = [r for r in tables["advantage"] if (r["kind"], r["tokens"]) == OURS.get(claim.claim)]
        row = {"claim": claim.claim, "published numbers": claim.numbers, "they support it": claim.supported}
        row["this run, same coefficient"] = "; ".join(
            f"{r['error ratio, same coefficient']:.3g} x {r['FAST against']}" for r in here
        )
        row["this run, at equal L0 or beside a control"] = "; ".join(
            "no common L0" if r["error ratio, equal L0"] is None
            else f"{r['error ratio, equal L0']:.3g} x {r['FAST against']} ({r['holds']})"
            for r in here
        ) or _measured(claim.claim, tables)  # fmt: skip
        rows.append(row)
    return rows


def _measured(claim: str, tables: dict[str, list[Row]]) -> str:
    """What this run says of a claim that is not about errors, in one line."""
    if claim.startswith("21.1 %"):
        shares = [f"{r['clear']:.1%} [{r['low']:.1%}, {r['high']:.1%}]" for r in tables["ratings"] if r["features"]]
        names = [r["method"] for r in tables["ratings"] if r["features"]]
        pairs = zip(names[::2], shares[::2], shares[1::2], strict=False)
        return "; ".join(f"{name} {own}, control {other}" for name, own, other in pairs)
    if "signal-to-noise" in claim:
        start = [r for r in tables["gsnr"] if r["weights"] == "one start for all" and r["tokens"] == "all tokens"]
        return "at one start: " + "; ".join(f"{r['kind']} {r['method']} {r['gsnr']:.3g}" for r in start)
    if "loss with an SAE" in claim:
        return "; ".join(f"{r['id']} {r['delta_percent']:+.3g} %" for r in tables["splice"])
    if claim.startswith("steering"):
        strongest = max((r["strength"] for r in tables["steering"]), default=0)
        found = [
            (kind, [r["kl"] for r in tables["steering"] if r["kind"] == kind and r["strength"] == strongest])
            for kind in ("feature", "random feature", "random direction")
        ]
        text = "; ".join(f"{kind} {sum(kl) / len(kl):.3g}" for kind, kl in found if kl)
        return f"mean KL at strength {strongest:g}: {text}" if text else ""
    return ""


def write(folder: Path, config: Config, about: dict[str, Any], tables: dict[str, list[Row]], plots: list[Path]) -> Path:
    """Everything that was measured, and the published numbers."""
    t, advantage = config.train, tables["advantage"]
    left_out = f"; left out of training, which was not published: {', '.join(t.exclude)}" if t.exclude else ""
    report = Report(f"FAST and block training at equal sparsity: {about['label']}, layer {config.data.layer}")
    report.text(
        f"{len(tables['cells'])} SAEs: {', '.join(LABELS[m] for m in t.methods)}, each with {', '.join(t.kinds)} SAEs "
        f"of a sweep of coefficients and seeds {', '.join(map(str, t.seeds))}, {t.tokens:,} training tokens each"
        f"{left_out}. Measured on {about['held']:,} tokens of {about['dataset']} that were put aside, each chat alone "
        "in its template: the distribution of FAST and BT(F); plain texts, on which BT(P) trains, are out of it. "
        "Errors are means over chats of the mean over their tokens, as published; published numbers are their log2. "
        "Ratios below 1 favour FAST; "
        f"intervals are 95 % over {len(t.seeds)} seeds (Student's t)"
        + (", wide by nature: the column `seeds lower` says how many agree." if len(t.seeds) < 4 else ".")
    )
    for method, failed in about["failed"].items():
        for cell, reason in failed.items():
            report.text(f"Not trained, and compared with nothing: {LABELS[method]} {cell}: {reason}.")
    report.heading("Does the advantage survive equal L0, and leaving out position 0?")
    report.table("FAST's error over that of the others", "advantage", advantage, columns=SHORT)
    report.text("\n".join(f"- {line}" for line in findings(advantage)))
    for path in plots:
        report.figure(path.stem.replace("_", " "), os.path.relpath(path, folder))
    report.heading("Every SAE")
    columns = ("id", "l0", "l0_all", "dead_fraction", "log2_mse_all", "log2_mse_st", "mse_all", "mse_st", "fvu_no0")
    report.table(
        "L0 without position 0, errors as log2 and as they are", "cells", tables["cells"], columns=columns, most=60
    )
    report.table("By group of tokens, of SAEs at about equal L0", "groups", tables["chosen_groups"])
    report.table("The model with an SAE in place, of SAEs at about equal L0", "splice", tables["splice"])
    report.heading("Gradients")
    report.text(
        "Gradient signal-to-noise ratio on batches of each method's own training tokens: Σ (E g)² / Σ Var g, and the "
        "mean over parameters of their own ratio. At their own weights a worse SAE has larger gradients, which agree "
        "better, so the ratio also says how far training got; at one and the same start only the data differs."
    )
    report.table("GSNR", "gsnr", tables["gsnr"])
    report.heading("Features")
    report.text(
        f"Judge: {about['judge']}. The published rubric on {config.interpret.features} random features of each SAE, "
        "and on as many sets of contexts of different features; detection and fuzzing with the labels of other "
        "features as control. A share of 128 features has an interval of about 14 points."
    )
    report.table("Scored 4 or 5", "ratings", tables["ratings"])
    report.table("Detection and fuzzing", "scores", tables["scores"])
    report.heading("Steering")
    report.table("The features that special tokens excite most", "special_features", tables["special_features"])
    columns = ("direction", "strength", "kl", "kl_low", "kl_high", "perplexity", "repetition", "length", "said")
    report.table(
        "Added to the activations at every position, beside random features and directions of the same norm",
        "steering", tables["steering"], columns=columns, most=60,
    )  # fmt: skip
    report.heading("The published claims")
    report.table("What their tables support, and what this run does", "claims", judged(tables))
    report.table("Published: settings in which each method has the lowest error", "published_wins",
                 published.win_rows(published.table()))  # fmt: skip
    report.table("Published: the SAE of the abstract, as log2 and as it is", "published_headline", published.beside())
    report.table("Published: FAST's error over that of the others in every setting", "published_settings",
                 published.per_setting(), most=10)  # fmt: skip
    return report.write(folder)
