"""Plots of drift reports and density histograms, in a plain style that survives printing in grey.

Colour encodes one thing per plot; values are written into small heat maps; every axis names its metric, its
scope and, where it matters, how many tokens it rests on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.extras import require
from hubsae.core.files import atomic_path
from hubsae.evals.accumulate import NOT_FIRST
from hubsae.evals.bootstrap import percentile_interval
from hubsae.evals.comparison import Comparison
from hubsae.evals.drift import DriftReport, GroupDrift
from hubsae.evals.rates import Series
from hubsae.evals.results import DENSITY_EDGES, ReconstructionResult

# Okabe-Ito, distinguishable with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "legend.frameon": False,
}


def new_figure(columns: int, rows: int = 1, *, width: float = 3.1, height: float = 2.6) -> tuple[Any, Any]:
    """A figure that belongs to no window system, and its axes as an array."""
    figures = require("matplotlib.figure", extra="plots")
    require("matplotlib.backends.backend_agg", extra="plots")
    figure = figures.Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def house_style() -> Any:
    """A context in which everything drawn looks alike."""
    return require("matplotlib", extra="plots").rc_context(STYLE)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def log_axis(axis: Any, base: int = 10) -> None:
    """A logarithmic axis (`axes.xaxis`, say) with few plain numbers on it."""
    ticker = require("matplotlib.ticker", extra="plots")
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=base)
    axis.set_major_locator(ticker.LogLocator(base, subs=(1, 2, 5) if base == 10 else (1,), numticks=12))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def label_of(group: GroupDrift) -> str:
    """A title such as `layer 18, k=64`."""
    parts = [] if group.layer is None else [f"layer {group.layer}"]
    parts += [] if group.k is None else [f"k={group.k}"]
    return ", ".join(parts) or "SAE"


def drift_plots(report: DriftReport, folder: Path) -> list[Path]:
    """Every plot of a report, as PNG files in a folder."""
    with house_style():
        return [
            draw(report, folder / f"drift_{name}.png")
            for name, draw, of in (
                ("cosines", plot_cosines, "moves"),
                ("nmse", plot_nmse, "series"),
                ("cross", plot_cross, "densities"),
                ("births_deaths", plot_lifecycle, "densities"),
                ("density", plot_densities, "densities"),
            )
            if any(getattr(group, of) for group in report.groups)
        ]


def _panels(count: int, **size: float) -> tuple[Any, list[Any]]:
    """A figure of so many panels, at most four in a row."""
    figure, axes = new_figure(columns := min(count, 4), -(-count // columns), **size)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


def _scope(report: DriftReport, known: set[str]) -> str:
    """What the SAEs are for, where their training left tokens out; else all tokens but the first, where known."""
    own = {row.scope for group in report.groups for row in group.stages} - {"all"}
    return next((scope for scope in (*sorted(own), NOT_FIRST) if scope in known), "all")


def plot_nmse(report: DriftReport, path: Path, metric: str = "nmse_pooled") -> Path:
    """A metric along steps, one panel per layer; the control dashed; bands are bootstrap intervals."""
    scope = _scope(report, {scope for g in report.groups for name, scope in g.series if name == metric})
    shown = [g for g in report.groups if (metric, scope) in g.series]
    figure, axes = _panels(len(shown))
    control = {(g.layer, g.k): g for g in report.control.groups} if report.control else {}
    for axis, group in zip(axes, shown, strict=True):
        _line(axis, group.series[metric, scope], COLOURS[0], "-", report.name)
        before = group.matrix(metric, scope).diagonal(1)
        dots = [(row.step, v) for row, v in zip(group.stages[1:], before, strict=True) if np.isfinite(v)]
        if dots:
            axis.plot(*zip(*dots, strict=True), "o", mfc="none", ms=4, color=COLOURS[0], label="before training")
        other = control.get((group.layer, group.k))
        if other is not None and (metric, scope) in other.series:
            _line(axis, other.series[metric, scope], COLOURS[1], "--", "control")
        axis.set_title(label_of(group))
        axis.set_xlabel("training step of the model")
        axis.margins(y=0.15)
        axis.ticklabel_format(axis="y", useOffset=False)
    axes[0].set_ylabel(f"{metric}\n(scope: {scope})")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) if len(axes) > 1 else 1)
    return save_figure(figure, path)


def _line(axis: Any, series: Series, colour: str, style: str, label: str) -> None:
    axis.plot(series.steps, series.values, style, marker=".", color=colour, label=label)
    if series.draws is None:
        return
    bands = [percentile_interval(series.draws[:, i]) for i in range(len(series.steps))]
    known = [(s, *band) for s, band in zip(series.steps, bands, strict=True) if band is not None]
    if known:
        steps, low, high = zip(*known, strict=True)
        axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def plot_cosines(report: DriftReport, path: Path) -> Path:
    """Mean cosine of decoder and encoder to the previous stage, layers by transitions."""
    figure, axes = new_figure(2, 1, width=_heat_width(report), height=0.42 * len(report.groups) + 1.9)
    image = None
    for axis, (field, title) in zip(axes.flat, (("decoder_mean", "decoder"), ("encoder_mean", "encoder")), strict=True):
        rows, names = [], []
        widest = max((len(g.stages) for g in report.groups), default=1) - 1
        ticks: list[str] = []
        for group in report.groups:
            moves = [m for m in group.moves if m.against == "previous"]
            values = [getattr(m, field) for m in moves]
            rows.append(values + [np.nan] * (widest - len(values)))
            names.append(label_of(group))
            if len(moves) == widest:
                ticks = [f"{_short(m.from_stage)}→{_short(m.to_stage)}" for m in moves]
        table = np.array(rows, float).reshape(len(names), max(widest, 0))
        image = _heat(axis, table, names, ticks, low=min(0.8, _floor(table)), high=1.0, digits=3)
        axis.set_title(f"{title} cosine to the previous stage")
    if image is not None:
        figure.colorbar(image, ax=list(axes.flat), shrink=0.8, label="mean over latents")
    return save_figure(figure, path)


def _heat_width(report: DriftReport) -> float:
    widest = max((len(g.stages) for g in report.groups), default=2)
    return max(3.4, 0.62 * widest + 1.6)


def _floor(table: np.ndarray) -> float:
    return float(np.floor(np.nanmin(table) * 10) / 10) if np.isfinite(table).any() else 0.0


def _short(stage: str) -> str:
    """`instruct_base` as base, `ppo_step116` as 116.

    >>> _short("ppo_step116"), _short("instruct_base")
    ('116', 'base')
    """
    head, _, tail = stage.rpartition("_")
    if tail == "base":
        return "base"
    digits = tail.removeprefix("step")
    return digits if head and digits.isdigit() else stage


def _heat(
    axis: Any, table: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, low: float, high: float, digits: int
) -> Any:
    axis.grid(False)
    image = axis.imshow(np.ma.masked_invalid(table), cmap="cividis", vmin=low, vmax=high, aspect="auto")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    middle = (low + high) / 2
    for i, j in np.ndindex(*table.shape):
        if np.isfinite(table[i, j]):
            colour = "white" if table[i, j] < middle else "black"
            axis.text(j, i, _number(float(table[i, j]), digits), ha="center", va="center", fontsize=6.5, color=colour)
    return image


def _number(value: float, digits: int) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def plot_cross(report: DriftReport, path: Path, metric: str = "fvu") -> Path:
    """The cross matrices: SAE of one stage on the activations of another."""
    scope = _scope(report, {r.scope for g in report.groups for r in g.cross})
    most = max(len(g.stages) for g in report.groups)
    size = max(2.6, 0.48 * most + 1.5)
    figure, axes = _panels(len(report.groups), width=size + 0.5, height=size)
    for axis, group in zip(axes, report.groups, strict=True):
        table = group.matrix(metric, scope)
        names = [_short(row.stage) for row in group.stages]
        finite = table[np.isfinite(table)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        image = _heat(axis, table, names, names, low=low, high=max(high, low + 1e-12), digits=3)
        axis.set_title(label_of(group))
        axis.set_xlabel("activations of stage")
        axis.set_ylabel("SAE of stage")
        figure.colorbar(image, ax=axis, shrink=0.85)
    figure.suptitle(f"{metric} (scope: {scope})", fontsize=10)
    return save_figure(figure, path)


def plot_lifecycle(report: DriftReport, path: Path) -> Path:
    """Births above, deaths below the line, one panel per layer."""
    figure, axes = _panels(len(report.groups))
    for axis, group in zip(axes, report.groups, strict=True):
        stages = group.stages[1:]
        places = range(len(stages))
        axis.bar(places, [row.births or 0 for row in stages], color=COLOURS[2], label="births")
        axis.bar(places, [-(row.deaths or 0) for row in stages], color=COLOURS[1], label="deaths")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(list(places), [_short(row.stage) for row in stages], rotation=45, ha="right")
        axis.set_title(label_of(group))
        axis.set_xlabel("stage")
        most = max((max(row.births or 0, row.deaths or 0) for row in stages), default=0)
        # without any, an empty axis of ±1 says so
        axis.set_ylim(-1.15 * max(most, 1), 1.15 * max(most, 1))
        axis.yaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("latents born / died")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return save_figure(figure, path)


def plot_densities(report: DriftReport, path: Path) -> Path:
    """Histogram of log10 firing density, one line per stage, one panel per layer."""
    figure, axes = _panels(len(report.groups))
    colour_maps = require("matplotlib", extra="plots").colormaps
    stages = list(dict.fromkeys(row.stage for group in report.groups for row in group.stages))
    shades = dict(zip(stages, colour_maps["viridis"](np.linspace(0, 0.9, len(stages))), strict=True))
    for axis, group in zip(axes, report.groups, strict=True):
        never, lowest = [], 0.0
        for row in group.stages:
            density = group.densities[row.stage].numpy()
            log = np.log10(density[density > 0])
            never.append(density.size - log.size)
            lowest = min(lowest, float(log.min()) if log.size else 0.0)
            axis.hist(log, bins=list(DENSITY_EDGES), histtype="step", color=shades[row.stage])
        axis.set_title(f"{label_of(group)}\n{_range(never)} never fire (N={group.stages[0].n_tokens:,})", fontsize=8.5)
        axis.set_xlabel("log10 firing density")
        axis.set_xlim(lowest - 0.3, 0.1)
    axes[0].set_ylabel("latents")
    lines = require("matplotlib.lines", extra="plots")
    handles = [lines.Line2D([], [], color=shade) for shade in shades.values()]
    figure.legend(handles, [_short(stage) for stage in stages], loc="outside right center", fontsize=7.5)
    return save_figure(figure, path)


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def plot_histograms(result: ReconstructionResult, path: str | Path) -> Path:
    """Firing densities of the SAEs of one pass, one panel each."""
    with house_style():
        names = list(result.saes)
        figure, axes = _panels(len(names))
        for axis, name in zip(axes, names, strict=True):
            bars = result[name].histogram
            never = bars[0].n_latents
            left = [bar.log10_low for bar in bars[1:]]
            axis.bar(left, [bar.n_latents for bar in bars[1:]], width=0.25, align="edge", color=COLOURS[0])
            used = [bar.log10_low for bar in bars[1:] if bar.n_latents and bar.log10_low is not None]
            axis.set_xlim((min(used) if used else -4) - 0.5, 0.1)
            axis.set_title(name if len(name) < 34 else "…" + name[-33:])
            axis.set_xlabel("log10 firing density")
            axis.text(
                0.02,
                0.96,
                f"{never} never fire\non {result.n_tokens:,} tokens",
                transform=axis.transAxes,
                va="top",
                fontsize=7.5,
            )
            axis.margins(y=0.25)
        for axis in axes[::4]:
            axis.set_ylabel("latents")
        return save_figure(figure, Path(path))


def plot_deciles(result: ReconstructionResult, path: str | Path) -> Path:
    """Explained variance by norm decile, one line per SAE."""
    with house_style():
        figure, axes = new_figure(1, 1, width=5.2, height=3.2)
        axis = axes.flat[0]
        scope = NOT_FIRST if NOT_FIRST in result.scopes else "all"
        for number, sae in enumerate(result.saes.values()):
            points = [(d.decile, d.fve) for d in sae.deciles if d.scope == scope and d.fve is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    marker=".",
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
                    label=sae.name,
                )
        axis.set_xticks(range(1, 11))
        axis.set_xlabel("decile of the token's norm (1: smallest)")
        axis.set_ylabel(f"fve (scope: {scope})")
        if len(result.saes) <= 24:
            figure.legend(loc="outside right upper", fontsize=7)
        return save_figure(figure, Path(path))


def plot_comparison(comparison: Comparison, path: str | Path, metric: str = "nmse_pooled") -> Path:
    """Ratio of rates of two chains by layer, end to end and at matched steps, with intervals."""
    with house_style():
        items = [c for c in comparison.items if c.metric == metric and c.scope == "all"]
        figure, axes = new_figure(1, 1, width=max(4.2, 1.0 * len(items) + 1.8), height=3.0)
        axis = axes.flat[0]
        for offset, colour, name in ((-0.12, COLOURS[1], "end_to_end"), (0.12, COLOURS[0], "matched")):
            for place, item in enumerate(items):
                ratio = getattr(item, name)
                if ratio.ratio is None:
                    continue
                low, high = ratio.interval or (ratio.ratio, ratio.ratio)
                axis.errorbar(
                    place + offset,
                    ratio.ratio,
                    yerr=[[max(ratio.ratio - low, 0)], [max(high - ratio.ratio, 0)]],
                    fmt="o",
                    ms=4,
                    capsize=2,
                    color=colour,
                    label=name.replace("_", " ") if place == 0 else None,
                )
        axis.axhline(1, color="black", linewidth=0.8)
        names = [f"layer {c.layer}\nk={c.k}" for c in items]
        axis.set_xticks(range(len(items)), names)
        axis.set_xlim(-0.5, len(items) - 0.5)
        axis.set_ylabel(f"{comparison.a} / {comparison.b}\nrate of {metric} per step")
        figure.legend(loc="outside lower center", ncols=2)
        return save_figure(figure, Path(path))
