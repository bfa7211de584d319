"""Methods compared at equal L0, beside the comparison as it was published: at equal coefficients, at any L0.

Within a method and a seed, log2 of an error is interpolated over log2 of L0 between the SAEs of a sweep of
coefficients, at levels of L0 that both methods reach with every seed. TopK needs no interpolation: its L0 is chosen.
Methods share seeds (of the weights and of the order of the data), so differences are taken within a seed; their
interval is over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .settings import IN_WORDS, LABELS

Row = dict[str, Any]


def levels(rows: Sequence[Row], count: int) -> list[float]:
    """Levels of L0 that every method and seed of these rows reaches, evenly spread in log; none where there are none.

    >>> rows = [{"method": m, "seed": 0, "l0": l0} for m, l0s in (("a", (10, 40)), ("b", (20, 90))) for l0 in l0s]
    >>> levels(rows, 2)
    [20.0, 40.0]
    """
    by: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        by.setdefault((row["method"], row["seed"]), []).append(float(row["l0"]))
    low, high = max(min(v) for v in by.values()), min(max(v) for v in by.values())
    if low <= 0 or low >= high:
        return []
    return [float(x) for x in np.round(np.geomspace(low, high, count), 9)]


def at(rows: Sequence[Row], level: float, column: str) -> float:
    """log2 of a column at a level of L0, between the rows of one method and seed."""
    points = sorted((np.log2(float(r["l0"])), np.log2(float(r[column]))) for r in rows)
    return float(np.interp(np.log2(level), [x for x, _ in points], [y for _, y in points]))


def compared(rows: Sequence[Row], kind: str, expansion: float, other: str, column: str, count: int) -> dict[str, Any]:
    """FAST against another method at equal L0: difference of log2 by seed, and the levels it is the mean over."""
    mine = [r for r in rows if (r["kind"], float(r["expansion"])) == (kind, expansion)]
    of = {m: [r for r in mine if r["method"] == m] for m in ("fast", other)}
    seeds = sorted({r["seed"] for r in of["fast"]} & {r["seed"] for r in of[other]})
    if kind == "topk":
        numbers = sorted({float(r["number"]) for r in of["fast"]})
        found = {
            seed: np.mean([_log2(of["fast"], seed, n, column) - _log2(of[other], seed, n, column) for n in numbers])
            for seed in seeds
        }
        return {"levels": numbers, "differences": {seed: float(d) for seed, d in found.items()}}
    chosen = levels([*of["fast"], *of[other]], count)
    if not chosen:
        return {"levels": [], "differences": {}}
    differences = {}
    for seed in seeds:
        a, b = ([r for r in of[m] if r["seed"] == seed] for m in ("fast", other))
        differences[seed] = float(np.mean([at(a, level, column) - at(b, level, column) for level in chosen]))
    return {"levels": chosen, "differences": differences}


def whole(rows: Sequence[Row]) -> list[Row]:
    """Rows of cells that every method has, with an L0 above 0: one that diverged is compared with nothing."""
    methods = {row["method"] for row in rows}
    cells: dict[Any, set[str]] = {}
    good = [row for row in rows if row["l0"] and all(row[f"mse_{short}"] for short in IN_WORDS)]
    for row in good:
        cells.setdefault((row["kind"], row["expansion"], row["number"], row["seed"]), set()).add(row["method"])
    return [r for r in good if cells[r["kind"], r["expansion"], r["number"], r["seed"]] == methods]


def advantage(rows: Sequence[Row], published: dict[str, float], count: int) -> list[dict[str, Any]]:
    """The one table: FAST's error over that of the others, as published and at equal L0, with position 0 and without.

    Ratios below 1 mean that FAST's error is lower. `holds` says what is left at equal L0.
    """
    out = []
    for kind, expansion in dict.fromkeys((r["kind"], float(r["expansion"])) for r in rows):
        numbers = sorted({float(r["number"]) for r in rows if r["kind"] == kind})
        number = float(published.get(kind, numbers[len(numbers) // 2]))
        number = number if number in numbers else numbers[len(numbers) // 2]
        for other in [m for m in dict.fromkeys(r["method"] for r in rows) if m != "fast"]:
            for short, words in IN_WORDS.items():
                column = f"mse_{short}"
                same = [r for r in rows if r["kind"] == kind and float(r["expansion"]) == expansion]
                same = [r for r in same if float(r["number"]) == number]
                plain = [
                    _log2(same, seed, number, column, "fast") - _log2(same, seed, number, column, other)
                    for seed in sorted({r["seed"] for r in same})
                ]
                l0 = [float(np.mean([r["l0"] for r in same if r["method"] == m])) for m in ("fast", other)]
                found = compared(rows, kind, expansion, other, column, count)
                differences = list(found["differences"].values())
                low, high = student(differences)
                out.append(
                    {
                        "kind": kind,
                        "x": expansion,
                        "FAST against": LABELS[other],
                        "tokens": words,
                        "error ratio, same coefficient": 2 ** float(np.mean(plain)),
                        "L0 there": f"{l0[0]:.4g} / {l0[1]:.4g}",
                        "error ratio, equal L0": 2 ** float(np.mean(differences)) if differences else None,
                        "low": None if low is None else 2**low,
                        "high": None if high is None else 2**high,
                        "L0": " ".join(f"{level:.3g}" for level in found["levels"]) or None,
                        "seeds lower": f"{sum(d < 0 for d in differences)} of {len(differences)}",
                        "holds": verdict(differences),
                    }
                )
    return out


def verdict(differences: Sequence[float]) -> str:
    """What differences of log2 by seed say of FAST being better.

    >>> [verdict(d) for d in ([-1.0, -1.01], [-1.0, -0.1], [-1.0, 0.2], [0.5, 0.6], [])]
    ['yes', 'in every seed', 'no', 'no, worse in every seed', 'no common L0']
    """
    if not differences:
        return "no common L0"
    if all(d < 0 for d in differences):
        _, high = student(list(differences))
        return "yes" if high is not None and high < 0 else "in every seed"
    return "no, worse in every seed" if all(d > 0 for d in differences) else "no"


def representative(rows: Sequence[Row], kind: str, expansion: float, count: int) -> dict[str, str]:
    """By method, the SAE (of the first seed) nearest to the middle level of L0, for what is measured of few."""
    mine = [r for r in rows if (r["kind"], float(r["expansion"])) == (kind, expansion)]
    if not mine:
        return {}
    numbers = sorted({float(r["number"]) for r in mine})
    common = levels(mine, count) if kind != "topk" else [numbers[len(numbers) // 2]]
    found = {}
    for method in dict.fromkeys(r["method"] for r in mine):
        own = [r for r in mine if r["method"] == method and r["seed"] == min(s["seed"] for s in mine)]
        if common and kind != "topk":
            middle = np.log2(common[len(common) // 2])
            best = min(own, key=lambda r: abs(np.log2(max(float(r["l0"]), 1e-9)) - middle))
        else:
            best = next(r for r in own if float(r["number"]) == numbers[len(numbers) // 2])
        found[method] = best["id"]
    return found


def _log2(rows: Sequence[Row], seed: int, number: float, column: str, method: str | None = None) -> float:
    row = next(
        r for r in rows
        if r["seed"] == seed and float(r["number"]) == number and method in (None, r["method"])
    )  # fmt: skip
    return float(np.log2(float(row[column])))


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t for 1, 2, ... degrees of freedom; 1.96 beyond."""


def student(values: np.ndarray | list[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of the mean of a few independent numbers (Student's t); none of a single one.

    >>> low, high = student([1.0, 2.0, 3.0])
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return None, None
    t = STUDENT[len(x) - 2] if len(x) - 2 < len(STUDENT) else 1.96
    half = t * float(x.std(ddof=1)) / len(x) ** 0.5
    return float(x.mean()) - half, float(x.mean()) + half
