"""The published tables, and which of the published claims they support."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hubsae.core.errors import FormatError
from hubsae.core.files import read_csv
from hubsae.evals.bootstrap import wilson

CSV = Path(__file__).parent / "published.csv"
METHODS = {"sequential": "FAST", "block_finetune": "BT(F)", "block_pretrain": "BT(P)"}
METRICS = {"log2_mse": "MSE", "log2_mse_special_tokens": "MSE_st"}
RATED = {"FAST": (27, 128), "BT(F)": (13, 128), "BT(P)": (9, 128)}
"""Features of Llama-3.2-3B-Instruct, 8x, that were scored 4 or 5: 21.1 %, 10.2 % and 7.0 % of 128."""
DIMENSIONS = {
    "Llama-3.1-8B-Instruct": (4096, 32, 8_030_261_248),
    "Llama-3.2-3B-Instruct": (3072, 28, 3_212_749_824),
    "Llama-3.2-1B-Instruct": (2048, 16, 1_235_814_400),
    "Qwen2.5-7B-Instruct": (3584, 28, 7_615_616_512),
    "Qwen2.5-3B-Instruct": (2048, 36, 3_085_938_688),
    "Qwen2.5-1.5B-Instruct": (1536, 28, 1_543_714_304),
    "Qwen2.5-0.5B-Instruct": (896, 24, 494_032_768),
}
"""Width, blocks and parameters of the published models."""


class Setting(NamedTuple):
    """One of the 40: a model, a layer and an expansion."""

    model: str
    layer: int
    expansion: int


Table = dict[tuple[str, str, Setting], dict[str, float]]
"""(architecture, metric, setting) -> log2 of the error by method."""


def table(rows: Sequence[Mapping[str, str]] | None = None, file: str | Path = CSV) -> Table:
    """All 480 numbers, or those of `rows` in their layout; `file` is named in errors.

    >>> table()["standard", "MSE_st", Setting("Qwen2.5-7B-Instruct", 18, 8)]["FAST"]
    0.6468
    """
    found: Table = {}
    try:
        for row in read_csv(CSV) if rows is None else rows:
            setting = Setting(row["model"], int(row["layer"]), int(row["expansion"]))
            key = row["architecture"], METRICS[row["metric"]], setting
            found.setdefault(key, {})[METHODS[row["method"]]] = float(row["value"])
    except (KeyError, ValueError) as error:
        raise FormatError(file, "the columns of the published tables", f"{type(error).__name__}: {error}") from error
    for setting, values in found.items():
        if absent := set(METHODS.values()) - set(values):
            raise FormatError(file, f"{', '.join(METHODS)} in every setting", f"no {', '.join(absent)} for {setting}")
    return found


def settings() -> list[Setting]:
    """The 40 settings, in the order of the tables."""
    return list(dict.fromkeys(setting for _, _, setting in table()))


def wins(numbers: Table) -> dict[tuple[str, str], dict[str, list[Setting]]]:
    """Where each method has the lowest error, by architecture and metric."""
    found: dict[tuple[str, str], dict[str, list[Setting]]] = {}
    for (architecture, metric, setting), values in numbers.items():
        lowest = found.setdefault((architecture, metric), {name: [] for name in METHODS.values()})
        lowest[min(values, key=lambda name: values[name])].append(setting)
    return found


def win_rows(numbers: Table) -> list[dict[str, Any]]:
    """Win counts, and the median ratio of FAST's error (not its log) to that of the others."""
    out = []
    for (architecture, metric), lowest in wins(numbers).items():
        row: dict[str, Any] = {"SAE": architecture, "error": metric}
        row |= {f"lowest: {name}": len(where) for name, where in lowest.items()}
        for other in ("BT(F)", "BT(P)"):
            ratios = sorted(
                2 ** (v["FAST"] - v[other]) for (a, m, _), v in numbers.items() if (a, m) == (architecture, metric)
            )
            row[f"median FAST / {other}"] = (ratios[len(ratios) // 2] + ratios[(len(ratios) - 1) // 2]) / 2
        out.append(row)
    return out


def newcombe(a: tuple[int, int], b: tuple[int, int]) -> tuple[float, float]:
    """95 % interval of a difference of two shares.

    >>> low, high = newcombe((27, 128), (13, 128))
    >>> round(low, 2), round(high, 2)
    (0.02, 0.2)
    """
    shares = [hits / of for hits, of in (a, b)]
    (la, ua), (lb, ub) = (wilson(*pair) for pair in (a, b))
    assert la is not None and ua is not None and lb is not None and ub is not None
    gap = shares[0] - shares[1]
    return gap - math.hypot(shares[0] - la, ub - shares[1]), gap + math.hypot(ua - shares[0], shares[1] - lb)


class Claim(NamedTuple):
    """A published claim, what the published numbers say of it, and the verdict on that."""

    claim: str
    numbers: str
    supported: str


def claims(numbers: Table | None = None) -> list[Claim]:
    """What the published tables support, read from the tables alone."""
    numbers = numbers or table()
    won = wins(numbers)

    def counts(architecture: str, metric: str) -> str:
        found = {name: len(where) for name, where in won[architecture, metric].items() if where}
        return ", ".join(f"{name} {count}" for name, count in found.items())

    lost = [s for name in ("BT(F)", "BT(P)") for s in won["standard", "MSE"][name]]
    qwen = sum(s.model.startswith("Qwen") for s in settings())
    key = Setting("Qwen2.5-7B-Instruct", 18, 8)
    special, whole = (numbers["standard", metric, key] for metric in ("MSE_st", "MSE"))
    real = {name: 2**value for name, value in special.items()}
    plain = {name: 2**value for name, value in whole.items()}
    least = min(v["FAST"] for v in numbers.values())
    rated = {name: wilson(*pair) for name, pair in RATED.items()}
    low, high = newcombe(RATED["FAST"], RATED["BT(F)"])
    return [
        Claim(
            "Standard SAEs: FAST has the lowest MSE",
            f"lowest in {counts('standard', 'MSE')} of 40 settings; the {len(lost)} exceptions are all Qwen models, of "
            f"{qwen} settings with one",
            "mostly" if lost else "yes",
        ),
        Claim("Standard SAEs: FAST has the lowest MSE_st", f"lowest in {counts('standard', 'MSE_st')}", "mostly"),
        Claim("JumpReLU SAEs: FAST has the lowest MSE", f"lowest in {counts('jumprelu', 'MSE')}", "mostly"),
        Claim("JumpReLU SAEs: FAST has the lowest MSE_st", f"lowest in {counts('jumprelu', 'MSE_st')}", "yes"),
        Claim(
            "Qwen2.5-7B-Instruct: a mean squared error of 0.6468 against 5.1985 and 1.5096",
            f"these are log2 values, of special tokens only, of one SAE (layer 18, 8x, standard); the errors are "
            f"{real['FAST']:.3f}, {real['BT(P)']:.2f} and {real['BT(F)']:.3f}. Over all tokens {plain['FAST']:.3f} "
            f"against {plain['BT(F)']:.3f}: {1 - plain['FAST'] / plain['BT(F)']:.1%} lower",
            "no, as worded",
        ),
        Claim("BT(F) at that SAE: 1.5096", f"the table says {special['BT(F)']:.4f}", "no"),
        Claim(
            "FAST reconstructs better",
            "no L0 is published, so no two SAEs are compared at equal sparsity; log2 of the MSE goes down to "
            f"{least:.2f}, which is close to the identity",
            "cannot be told",
        ),
        Claim(
            "21.1 % of FAST's features are clear against 10.2 % and 7.0 % (Llama-3.2-3B, 8x)",
            "of 128 features each: "
            + ", ".join(
                f"{name} {h}/{n} [{rated[name][0]:.1%}, {rated[name][1]:.1%}]" for name, (h, n) in RATED.items()
            )
            + f"; FAST less BT(F) {low:+.1%} to {high:+.1%}. One judge, no control, no contexts without the feature",
            "the difference is not noise; what it measures cannot be told",
        ),
        Claim(
            "v2: gradients have a higher signal-to-noise ratio with FAST",
            "only the abstract of v2 was seen, which has no number; GSNR is not defined in it",
            "cannot be told",
        ),
        Claim(
            "v2: the loss with an SAE in place differs by -0.51 % to 0.37 %",
            "no L0 beside it; a loss below the model's own, or equal to it, is what a near-identity gives",
            "cannot be told",
        ),
        Claim(
            "steering by special-token features improves answers",
            "three of ten answers are shown and judged by eye; no score, no control feature",
            "cannot be told",
        ),
    ]


def beside(numbers: Table | None = None) -> list[dict[str, Any]]:
    """The headline SAE in both units."""
    numbers = numbers or table()
    key = Setting("Qwen2.5-7B-Instruct", 18, 8)
    return [
        {"SAE": a, "error": m} | {f"log2, {n}": v for n, v in values.items()} | {n: 2**v for n, v in values.items()}
        for (a, m, setting), values in numbers.items()
        if setting == key
    ]


def per_setting() -> list[dict[str, Any]]:
    """A row per setting and architecture: FAST's error over that of BT(F), of all tokens and of special ones."""
    found = table()
    rows = []
    for setting in settings():
        for architecture in ("standard", "jumprelu"):
            row: dict[str, Any] = {**setting._asdict(), "SAE": architecture}
            for metric in METRICS.values():
                values = found[architecture, metric, setting]
                row |= {
                    f"{metric} FAST / {other}": 2 ** (values["FAST"] - values[other]) for other in ("BT(F)", "BT(P)")
                }
            rows.append(row)
    return rows
