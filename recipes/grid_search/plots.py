"""The pictures of a grid: fronts, dead latents, paired differences, ours beside the published one, true features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hubsae.evals.plots import COLOURS, log_axis, new_figure, save_figure

from .analysis import front_rows
from .cells import KINDS, LABELS
from .paired import Comparison
from .published import PublishedRow
from .synthetic import Recovery
from .table import GridRow

BLUE, ORANGE, GREEN, GREY = *COLOURS[:3], "#7F7F7F"
COLORS = {"topk": BLUE, "batch_topk": ORANGE, "jumprelu_fixed": GREY, "jumprelu_trained": GREEN}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))


def pareto(path: Path, rows: Sequence[GridRow], metric: str, label: str) -> Path:
    """L0 against a metric, with the front of all cells."""
    figure, axes = _figure()
    have = [r for r in rows if r.value("l0") and r.value(metric) is not None]
    _cells(axes, have, metric)
    for r in have:
        number = r.numbers[metric]
        if number.low is not None:
            axes.vlines(r.value("l0"), number.low, number.high, color=COLORS[r.cell.kind], linewidth=0.8, alpha=0.5)
    best = front_rows(have, "l0", metric)
    axes.plot(
        [r.value("l0") for r in best], [r.value(metric) for r in best],
        color="black", linewidth=5, alpha=0.12, zorder=1, solid_capstyle="round",
    )  # fmt: skip
    if have and min(r.value(metric) or 0.0 for r in have) > 0:
        log_axis(axes.yaxis)
    axes.set_ylabel(label)
    axes.set_title(f"{label} against sparsity; grey band: the Pareto front", fontsize=10)
    return save_figure(figure, path)


def dead_latents(path: Path, rows: Sequence[GridRow], n_tokens: int | None) -> Path:
    """Share of latents that never fire, against L0."""
    figure, axes = _figure()
    _cells(axes, [r for r in rows if r.value("l0") and r.value("dead_fraction") is not None], "dead_fraction", 100)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("dead latents, %")
    tokens = f" on {n_tokens:,} held-out tokens" if n_tokens else ""
    axes.set_title(f"Latents that never fire{tokens}", fontsize=10)
    return save_figure(figure, path)


def differences(path: Path, comparisons: Sequence[Comparison], title: str, label: str) -> Path:
    """Paired differences with their intervals, as a share of the second cell's value; left of zero the first wins."""
    figure, axes = _figure(height=1.4 + 0.32 * max(len(comparisons), 3))
    for place, c in enumerate(reversed(comparisons)):
        scale = 100 / abs(c.value_b) if c.value_b else math.nan
        color = {"a": GREEN, "b": ORANGE, "open": GREY}[c.verdict]
        axes.plot([c.low * scale, c.high * scale], [place, place], color=color, linewidth=1.6, solid_capstyle="butt")
        axes.plot(c.difference * scale, place, "o", color=color, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(comparisons)), [c.a for c in reversed(comparisons)], fontsize=7)
    axes.set_ylim(-0.7, len(comparisons) - 0.3)
    axes.set_xlabel(label)
    axes.set_title(title.replace(" at the ", "\nat the "), fontsize=10)
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    colors = ((GREEN, "first is better"), (ORANGE, "second is better"), (GREY, "not decided"))
    handles = [_handle(color, "o", text) for color, text in colors]
    figure.legend(handles=handles, fontsize=7, frameon=False, loc="outside lower center", ncols=3)
    return save_figure(figure, path)


def beside_published(path: Path, rows: Sequence[GridRow], published: Sequence[PublishedRow]) -> Path:
    """Pooled NMSE and dead share by L0: the published grid left, this one right. Never one scale: other models."""
    figure, axes = new_figure(2, 2, width=4.1, height=3.1)
    theirs: list[tuple[str, float, float, float, float]] = [
        (p.kind, p.expansion, p.l0, p.nmse, 100 * p.dead) for p in published
    ]
    ours = [
        (r.cell.kind, r.cell.expansion, r.value("l0") or 0.0, r.value("nmse_pooled") or math.nan,
         100 * (r.value("dead_fraction") or 0.0))
        for r in rows if r.value("l0")
    ]  # fmt: skip
    for column, (points, title) in enumerate(((theirs, "published (its validation split)"), (ours, "this run"))):
        expansions = sorted({p[1] for p in points})
        for row, (which, name) in enumerate(((3, "pooled NMSE"), (4, "dead latents, %"))):
            panel = axes[row][column]
            for kind in KINDS:
                for number, expansion in enumerate(expansions):
                    mine = sorted((p for p in points if (p[0], p[1]) == (kind, expansion)), key=lambda p: p[2])
                    panel.plot(
                        [p[2] for p in mine], [p[which] for p in mine], color=COLORS[kind], linewidth=0.9,
                        marker=MARKERS[number % len(MARKERS)], markersize=4,
                    )  # fmt: skip
            log_axis(panel.xaxis, 2)
            if row == 0:
                log_axis(panel.yaxis)
                panel.set_title(title, fontsize=10)
            else:
                panel.set_ylim(bottom=0)
                panel.set_xlabel("L0", fontsize=8)
            if column == 0:
                panel.set_ylabel(name, fontsize=8)
    kinds = [k for k in KINDS if any(p[0] == k for p in (*theirs, *ours))]
    handles = [_handle(COLORS[kind], "", LABELS[kind]) for kind in kinds]
    handles += [
        _handle("black", MARKERS[i], place, line=False)
        for i, place in enumerate(("narrowest of its grid", "second", "third"))
    ]
    figure.legend(handles=handles, fontsize=7, frameon=False, loc="outside lower center", ncols=4)
    return save_figure(figure, path)


def recovered_features(path: Path, found: Sequence[Recovery], n_features: int) -> Path:
    """Share of the true directions that were found, against the number of latents."""
    figure, axes = _figure()
    groups = sorted({(r.cell.kind, r.cell.number) for r in found}, key=lambda g: (list(KINDS).index(g[0]), g[1]))
    seen: dict[str, int] = {}
    for kind, number in groups:
        mine = sorted((r for r in found if (r.cell.kind, r.cell.number) == (kind, number)), key=lambda r: r.d_sae)
        style = seen[kind] = seen.get(kind, -1) + 1
        letter = {"topk": "k", "batch_topk": "k", "jumprelu_fixed": "t", "jumprelu_trained": "L0 target"}[kind]
        axes.plot(
            [r.d_sae for r in mine], [100 * r.fraction for r in mine], color=COLORS[kind],
            marker=MARKERS[style % len(MARKERS)], linestyle=LINES[style % len(LINES)], linewidth=1.2, markersize=5,
            label=f"{LABELS[kind]}, {letter} {number:g}",
        )  # fmt: skip
    widths = sorted({r.d_sae for r in found})
    axes.plot(
        widths, [100 * min(1.0, w / n_features) for w in widths], color="black", linewidth=0.8, alpha=0.5,
        label="most that many latents can hold",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(w) for w in widths])
    axes.minorticks_off()
    axes.set_ylim(0, 103)
    axes.set_xlabel("latents")
    axes.set_ylabel("true features recovered, %")
    axes.set_title(f"Synthetic data with {n_features} known features: found with cosine above 0.9", fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    return save_figure(figure, path)


# ---- shared ------------------------------------------------------------------------------------------------


def _figure(height: float = 4.4) -> tuple[Any, Any]:
    figure, axes = new_figure(1, width=6.4, height=height)
    return figure, axes[0][0]


def _handle(color: str, marker: str, text: str, *, line: bool = True) -> Any:
    from matplotlib.lines import Line2D

    style = "-" if line else "none"
    return Line2D([], [], color=color, marker=marker, markersize=5, linewidth=0.9, linestyle=style, label=text)


def _cells(axes: Any, rows: Sequence[GridRow], metric: str, unit: float = 1) -> None:
    """A metric of every cell against its L0: colours are kinds, markers are expansions."""
    expansions = sorted({r.cell.expansion for r in rows})
    markers = {e: MARKERS[i % len(MARKERS)] for i, e in enumerate(expansions)}
    kinds = [kind for kind in KINDS if any(r.cell.kind == kind for r in rows)]
    for kind, (expansion, marker) in product(kinds, markers.items()):
        mine = [r for r in rows if (r.cell.kind, r.cell.expansion) == (kind, expansion)]
        points = sorted((r.value("l0") or 0.0, unit * (r.value(metric) or 0.0)) for r in mine)
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=COLORS[kind], marker=marker, linewidth=0.9, markersize=5, alpha=0.9, zorder=3)
    log_axis(axes.xaxis, 2)
    axes.set_xlabel("L0: active latents per token")
    handles = [_handle(COLORS[kind], "", LABELS[kind]) for kind in kinds]
    handles += [_handle("black", marker, f"{e:g}x", line=False) for e, marker in markers.items()]
    axes.legend(handles=handles, fontsize=7, frameon=False)
