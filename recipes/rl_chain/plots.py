"""Pictures of a run of reinforcement learning."""

from __future__ import annotations

from pathlib import Path

from hubsae.core.files import read_csv
from hubsae.evals.plots import house_style, new_figure, save_figure

PANELS = (("reward", "reward"), ("kl", "KL per token"), ("length", "response tokens"), ("entropy", "entropy"))


def plot_learning(folder: Path, path: Path) -> Path:
    """Reward, KL, length and entropy by step, with held-out accuracy beside the reward."""
    rows = read_csv(folder / "metrics.csv")
    tested = read_csv(folder / "accuracy.csv") if (folder / "accuracy.csv").is_file() else []
    with house_style():
        figure, axes = new_figure(len(PANELS))
        steps = [int(row["step"]) for row in rows]
        for axis, (column, title) in zip(axes[0], PANELS, strict=True):
            values = [float(row[column]) if row.get(column) else float("nan") for row in rows]
            axis.plot(steps, values, linewidth=1.2, label="training" if column == "reward" else None)
            axis.set_title(title)
            axis.set_xlabel("step")
        for name, style in (("strict", "o-"), ("flexible", "s--")) if tested else ():
            at = [int(row["step"]) for row in tested]
            axes[0][0].plot(at, [float(row[name]) for row in tested], style, markersize=3, label=f"held-out {name}")
        axes[0][0].set_ylim(0, 1)
        axes[0][0].legend(fontsize="x-small")
        return save_figure(figure, path)
