"""Whether anything moved: the policy by its reward, its weights, and the SAEs beyond what their control does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .settings import ChainConfig

SURE = 2.0
"""A difference counts when it is beyond so many standard errors."""


def conclusions(
    config: ChainConfig,
    accuracy: Mapping[str, Mapping[str, Any]],
    learning: Sequence[Mapping[str, Any]],
    merge: Sequence[Mapping[str, Any]],
    control: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Sentences, each from numbers that the report shows: `control` is drift less that of the control chain."""
    found = [_rewarded(config, learning), _accuracy(config, accuracy), _weights(merge), _saes(config, control)]
    return [sentence for sentence in found if sentence]


def _rewarded(config: ChainConfig, learning: Sequence[Mapping[str, Any]]) -> str | None:
    if config.rl is None or len(learning) < 2:
        return None
    rewards, half = [float(row["reward"]) for row in learning], len(learning) // 2
    # rewards are 0 or 1, so their sum is how many responses were right
    right, total = round(sum(rewards) * config.rl.sequences), len(rewards) * config.rl.sequences
    text = f"In training {right:,} of {total:,} responses were rewarded"
    if not right:
        return f"{text}: there was nothing to learn from, and any movement is noise and the KL penalty."
    first, last = sum(rewards[:half]) / half, sum(rewards[-half:]) / half
    error = _error(first, last, half * config.rl.sequences)
    return (
        f"{text}, {first:.3f} in the first half of the steps and {last:.3f} in the last: {_said(first, last, error)}."
    )


def _accuracy(config: ChainConfig, accuracy: Mapping[str, Mapping[str, Any]]) -> str | None:
    if len(accuracy) < 2:
        return None
    scorer = config.rl.scorer if config.rl is not None else "strict"
    rows = list(accuracy.values())
    before, after = float(rows[0][scorer]), float(rows[-1][scorer])
    error = _error(before, after, int(rows[0]["problems"]))
    return (
        f"Held-out accuracy by `{scorer}` goes from {before:.3f} to {after:.3f} on {int(rows[0]['problems']):,} "
        f"problems: {_said(before, after, error)}."
    )


def _weights(merge: Sequence[Mapping[str, Any]]) -> str | None:
    if not merge:
        return None
    last = merge[-1]
    return f"The weights of `{last['stage']}` differ from the base's by {float(last['update']):.2g} of their norm."


def _saes(config: ChainConfig, control: Sequence[Mapping[str, Any]]) -> str | None:
    rows = [row for row in control if (row["metric"], row["scope"]) == ("fvu", config.sae.scope) and row["low"]]
    if not rows:
        return None
    end = max(float(row["step"]) for row in rows)
    rows = [row for row in rows if float(row["step"]) == end]
    net = [
        (f"layer {row['layer']} k {row['k']}", *(float(row[c]) for c in ("delta_net", "low", "high"))) for row in rows
    ]
    listed = ", ".join(f"{name} {value:+.2g} [{low:+.2g}, {high:+.2g}]" for name, value, low, high in net)
    beyond = sum(low > 0 or high < 0 for _, _, low, high in net)
    return (
        f"FVU of the SAEs since the base, less the control's change: {listed}; "
        f"{beyond} of {len(net)} intervals leave out zero (95 % over held-out prompts, of this seed alone)."
    )


def _error(a: float, b: float, n: int) -> float:
    """Standard error of the difference of two shares, each of `n`; one answer at least is taken to be uncertain."""
    return sum((max(p * (1 - p), 1 / n) / n) for p in (a, b)) ** 0.5


def _said(before: float, after: float, error: float) -> str:
    moved = abs(after - before) > SURE * error
    return f"a difference of {after - before:+.3f} with a standard error of {error:.3f}, " + (
        "so it moved" if moved else "which is not to be told from none"
    )
