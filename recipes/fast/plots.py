"""The pictures: error against L0 by method, errors by group of tokens, the dose-response of steering."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubsae.evals.plots import COLOURS, log_axis, new_figure, save_figure

from .measure import GROUPS
from .settings import IN_WORDS, LABELS

COLOUR = dict(zip(LABELS, COLOURS, strict=False))
Row = dict[str, Any]


def fronts(path: Path, rows: Sequence[Row], expansion: float) -> Path:
    """MSE per sequence against L0: a row of axes per kind, a column per group of tokens, a line per method and seed."""
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    figure, axes = new_figure(len(IN_WORDS), len(kinds))
    for line, kind in zip(axes, kinds, strict=True):
        for ax, (short, words) in zip(line, IN_WORDS.items(), strict=True):
            for method, colour in COLOUR.items():
                for seed in dict.fromkeys(r["seed"] for r in rows):
                    mine = [r for r in rows if (r["kind"], r["method"], r["seed"]) == (kind, method, seed)]
                    mine = sorted((r["l0"], r[f"mse_{short}"]) for r in mine if r["expansion"] == expansion)
                    label = LABELS[method] if seed == rows[0]["seed"] else None
                    ax.plot(*zip(*mine, strict=True), color=colour, marker="o", markersize=3, lw=1, label=label)
            log_axis(ax.xaxis)
            log_axis(ax.yaxis)
            ax.set_title(f"{kind}: {words}", fontsize=8)
            ax.set_xlabel("L0 (without position 0)")
    axes[0][0].set_ylabel("MSE, mean over chats")
    axes[0][0].legend(fontsize=7)
    return save_figure(figure, path)


def by_group(path: Path, groups: Sequence[Row], chosen: Sequence[str]) -> Path:
    """Relative error by group of tokens, of the SAEs that are compared at about equal L0.

    Not FVU: position 0 of a chat is the same vector in all of them, which has no variance.
    """
    kinds = list(dict.fromkeys(r["kind"] for r in groups))
    figure, axes = new_figure(len(kinds))
    for ax, kind in zip(axes[0], kinds, strict=True):
        for shift, (method, colour) in enumerate(COLOUR.items()):
            mine = {r["tokens"]: r for r in groups if (r["kind"], r["method"]) == (kind, method) and r["id"] in chosen}
            places = [GROUPS.index(name) + 0.27 * (shift - 1) for name in mine]
            ax.bar(places, [r["relative_error"] for r in mine.values()], 0.25, color=colour, label=LABELS[method])
        ax.set_yscale("log")
        ax.set_xticks(range(len(GROUPS)), GROUPS, rotation=30, ha="right", fontsize=7)
        ax.set_title(f"{kind}: ‖x − x̂‖ / ‖x‖ at about equal L0", fontsize=8)
    axes[0][0].legend(fontsize=7)
    return save_figure(figure, path)


def doses(path: Path, rows: Sequence[Row]) -> Path:
    """KL, perplexity and repetition against the strength, features beside their controls."""
    wanted = (
        ("kl", "KL to the unsteered model, nats"),
        ("perplexity", "perplexity under it"),
        ("repetition", "repeated trigrams"),
    )
    figure, axes = new_figure(len(wanted))
    for ax, (column, label) in zip(axes[0], wanted, strict=True):
        for colour, kind in zip(COLOURS, ("feature", "random feature", "random direction"), strict=False):
            names = list(dict.fromkeys(r["direction"] for r in rows if r["kind"] == kind))
            for number, name in enumerate(names):
                mine = sorted((r["strength"], r[column]) for r in rows if r["direction"] == name)
                ax.plot(*zip(*mine, strict=True), color=colour, marker="o", markersize=3, lw=1, alpha=0.7,
                        label=kind if not number else None)  # fmt: skip
        ax.set_xlabel("strength: norm of what is added")
        ax.set_ylabel(label)
        if column == "perplexity":
            ax.set_yscale("log")
    axes[0][0].legend(fontsize=7)
    return save_figure(figure, path)
