"""What the activation verbs share: how a dataset is shown."""

from __future__ import annotations

from typing import Any

from hubsae.cli._common import out, print_table


def show_activations(info: dict[str, Any]) -> None:
    """Print what `hubsae.activations.describe` found."""
    console = out()
    console.print(f"[bold]{info['path']}[/bold]: activations, {len(info['configs'])} config(s)")
    rows = []
    for entry in info["configs"]:
        stats = entry["statistics"]
        splits = ", ".join(f"{name} {count:,}" for name, count in entry["splits"].items())
        rows.append(
            [
                entry["config"],
                f"{entry['dtype']} x {entry['d']}",
                entry["scale"],
                splits,
                entry["files"],
                stats["norm_percentiles"]["50"],
                stats["norm_percentiles"]["99"],
                stats["norm_percentiles"]["100"],
                100 * stats["massive_share"],
                stats["position_0"]["mean_norm"],
            ]
        )
    print_table(
        "",
        ["config", "vectors", "scale", "rows", "files", "median norm", "p99", "max", "massive %", "norm at position 0"],
        rows,
    )
    for entry in info["configs"]:
        console.print(f"\n[bold]{entry['config']}[/bold] columns: {', '.join(entry['columns']) or 'none'}")
        for key in ("model", "revision", "stage", "adapter", "hook_point", "mode", "dataset", "model_dtype"):
            if entry["source"].get(key) is not None:
                console.print(f"  {key}: {entry['source'][key]}", markup=False)
        console.print("  token norms:")
        most = max((count for _, _, count in entry["histogram"]), default=1)
        for low, high, count in entry["histogram"]:
            bar = "#" * round(40 * count / most) or ("." if count else "")
            console.print(f"  {low:>10.4g} to {high:<10.4g} {count:>12,} {bar}")
    if info.get("run"):
        console.print(f"\nharvest: {info['run']}", markup=False)
