"""What the activation verbs share: how a dataset is shown."""

from __future__ import annotations

from typing import Any

from hubsae.cli._common import out, print_json, print_table
from hubsae.core.text import printable


def show_activations(info: dict[str, Any], as_json: bool = False) -> None:
    """Print what `hubsae.activations.describe` found."""
    if as_json:
        print_json(info)
        return
    console = out()
    console.print(f"{printable(info['path'])}: activations, {len(info['configs'])} config(s)", markup=False)
    rows = []
    for entry in info["configs"]:
        stats = entry["statistics"]
        splits = ", ".join(f"{name} {count:,}" for name, count in entry["splits"].items())
        stored = [entry["config"], f"{entry['dtype']} x {entry['d']}", entry["scale"], splits, entry["files"]]
        norms = [stats["norm_percentiles"][share] for share in ("50", "99", "100")]
        rows.append([*stored, *norms, 100 * stats["massive_share"], stats["position_0"]["mean_norm"]])
    columns = ["config", "vectors", "scale", "rows", "files", "median norm", "p99", "max", "massive %"]
    print_table("", [*columns, "norm at position 0"], rows)
    for entry in info["configs"]:
        columns = printable(", ".join(entry["columns"]) or "none")
        console.print(f"\n{printable(entry['config'])} columns: {columns}", markup=False)
        for key in ("model", "revision", "stage", "adapter", "hook_point", "mode", "dataset", "model_dtype"):
            if entry["source"].get(key) is not None:
                console.print(f"  {key}: {printable(entry['source'][key])}", markup=False)
        console.print(f"  token norms: {norm_line(entry['histogram'])}", markup=False)
        stats = entry["statistics"]
        for name, group in stats["groups"].items():
            console.print(
                f"  {name}: {group['count']:,} tokens, mean norm {group['mean_norm']:.4g}, "
                f"largest {group['max_norm']:.4g}",
                markup=False,
            )
        if stats["largest"]:
            texts = info.get("tokens", {})
            named = [f"{texts.get(str(t), t)!r} {norm:.4g}" for t, norm in list(stats["largest"].items())[:8]]
            console.print(f"  massive behind position 0: {', '.join(named)}", markup=False)
        if stats["exclude"]:
            console.print(
                f"  leave out in training: exclude: [{', '.join(stats['exclude'])}]  (massive: norm above "
                f"{stats['massive_above']:.4g}, ten times the median)",
                markup=False,
            )
    if info.get("run"):
        console.print(f"\nharvest: {info['run']}", markup=False)


def norm_line(histogram: list[tuple[float, float, int]]) -> str:
    """A histogram in one line; every bar that is not empty shows.

    >>> norm_line([(1.0, 2.0, 8), (2.0, 4.0, 0), (4.0, 8.0, 1)])
    '1 █ ▂ 8'
    """
    if not histogram:
        return "none"
    most = max(count for _, _, count in histogram)
    bars = "".join("▁▂▃▄▅▆▇█"[min(7, 8 * count // most)] if count else " " for _, _, count in histogram)
    return f"{histogram[0][0]:.4g} {bars} {histogram[-1][1]:.4g}"
