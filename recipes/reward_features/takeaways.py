"""The slides' takeaways, each judged by the numbers of this run, in words that follow from the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .table import BASELINE, MASKED, RANDOM, RAW, SAE_CODES, SHUFFLED, rows_of
from .truncate import FULL

Row = Mapping[str, Any]
HOLDS, PARTLY, FAILS, UNKNOWN = "holds", "holds in part", "does not hold", "not measured"
SAME = 0.95
"""Spearman above which two rewards order solutions alike for the purpose of the claim"""
PUBLISHED_R2 = 0.9


class Judged(NamedTuple):
    """A claim, what became of it, and the numbers that say so."""

    claim: str
    verdict: str
    because: str


def judge(
    table: Sequence[Row], truncation: Sequence[Row], carriers: Sequence[Row], matched: Mapping[str, float] | None,
    *, layer: int, layers: int,
) -> list[Judged]:  # fmt: skip
    """All takeaways; `layer` is the one that keeps two thirds of `layers`."""
    return [
        _throw_away(truncation, layer, layers),
        _few_features(table, carriers, layer),
        _in_the_base(table, matched, layer),
        _published_r2(table),
        _sae_or_raw(table),
        _formatting(table, carriers),
    ]


def leaks(table: Sequence[Row]) -> list[Row]:
    """The rows of shuffled scores that something is predicted of: then the split leaks."""
    rows = rows_of(table, inputs=SHUFFLED)
    # an R² below 0 is noise that was fitted, and no leak
    return [row for row in rows if float(row["r2_low"]) > 0 or not _holds_zero(row, "spearman")]


def _throw_away(truncation: Sequence[Row], layer: int, layers: int) -> Judged:
    claim = "The last third of the layers can be thrown away: SAE features below give the same reward"
    short, whole = rows_of(truncation, reward=SAE_CODES, layer=layer), rows_of(truncation, reward=FULL)
    if not short or not whole:
        return Judged(claim, UNKNOWN, f"no SAE at layer {layer}")
    row = short[0]
    agree, picks, best = float(row["spearman"]), _number(row, "best_of_n"), _number(whole[0], "best_of_n")
    text = f"Spearman {_interval(row, 'spearman')} with the whole model at layer {layer} of {layers}"
    loss = None
    if picks is not None and best is not None:
        loss = best - picks
        text += f"; best-of-n {picks:.2f} {_range(row, 'best_of_n')} where the whole model has {best:.2f}"
    raw = rows_of(truncation, reward=RAW, layer=layer)
    if raw:
        text += f"; the states themselves, without SAE: {float(raw[0]['spearman']):.2f}"
    text += f"; {float(row['share_of_time']):.0%} of the time"
    same = agree >= SAME and (loss is None or best is None or float(row["best_of_n_high"] or 0) >= best)
    return Judged(claim, HOLDS if same else PARTLY if agree >= 0.7 else FAILS, text)


def _few_features(table: Sequence[Row], carriers: Sequence[Row], layer: int) -> Judged:
    claim = "Some features are much more responsible for the reward than others"
    ours, chance = (rows_of(table, model="reward", layer=layer, inputs=name) for name in (SAE_CODES, RANDOM))
    own = rows_of(carriers, model="reward", layer=layer)
    share, other = (_number(rows[0], "strongest") if rows else None for rows in (ours, chance))
    if share is None or not own:
        return Judged(claim, UNKNOWN, "the probe of the SAE uses no feature")
    drop = max(float(row["drop"]) for row in own)
    steady = sum(float(row["stable"]) >= 0.8 for row in own)
    text = (
        f"the ten strongest of {ours[0]['used']} features at layer {layer} have {share:.0%} of all effects"
        + (f" ({other:.0%} in a random dictionary)" if other is not None else "")
        + f"; leaving out the one that matters most costs {drop:.3f} of R²; {steady} of the {len(own)} strongest keep "
        "rank and sign in four of five fits"
    )
    uneven = other is None or share > 1.5 * other
    return Judged(claim, HOLDS if uneven and drop >= 0.02 else PARTLY if uneven or drop >= 0.02 else FAILS, text)


def _in_the_base(table: Sequence[Row], matched: Mapping[str, float] | None, layer: int) -> Judged:
    claim = "These features are in the base model too, and may serve as a reward"
    base = rows_of(table, model="base", inputs=SAE_CODES)
    if not base:
        return Judged(claim, UNKNOWN, "no layer of the base model was harvested")
    row = max(base, key=lambda r: float(r["r2"]))
    ours = max(rows_of(table, model="reward", inputs=SAE_CODES), key=lambda r: float(r["r2"]))
    controls = [
        *rows_of(table, model="base", layer=row["layer"], inputs=BASELINE),
        *rows_of(table, model="untrained", inputs=SAE_CODES),
    ]
    bar = max((float(r["r2_high"] or r["r2"]) for r in controls), default=0.0)
    text = (
        f"R² {_interval(row, 'r2')} from the base model's SAE at layer {row['layer']}, {_interval(ours, 'r2')} from "
        f"the reward model's best; positions and lengths or an untrained model reach {bar:.2f} at most"
    )
    if matched:
        text += (
            f"; matched features: decoder cosine {matched['matched_decoder']:.2f} and firing "
            f"{matched['matched_firing']:.2f}, against {matched['random_decoder']:.2f} and "
            f"{matched['random_firing']:.2f} with a random dictionary"
        )
    above = float(row["r2_low"] or 0) > bar
    near = float(row["r2"]) >= 0.9 * float(ours["r2"])
    return Judged(claim, HOLDS if above and near else PARTLY if above else FAILS, text)


def _published_r2(table: Sequence[Row]) -> Judged:
    rows = rows_of(table, model="base", inputs=SAE_CODES)
    claim = f"The reward is predicted from the base model with R² about {PUBLISHED_R2}"
    if not rows:
        return Judged(claim, UNKNOWN, "no layer of the base model was harvested")
    best = max(rows, key=lambda r: float(r["r2"]))
    verdict = HOLDS if float(best["r2_high"] or best["r2"]) >= PUBLISHED_R2 else FAILS
    return Judged(claim, verdict, f"best layer {best['layer']}: {_interval(best, 'r2')} on problems held out")


def _sae_or_raw(table: Sequence[Row]) -> Judged:
    claim = "An SAE is needed for it (not said on the slides, but implied)"
    wins, text = 0, []
    pairs = [
        (row, other)
        for row in rows_of(table, inputs=SAE_CODES)
        for other in rows_of(table, model=row["model"], layer=row["layer"], inputs=RAW)
        if row["model"] != "untrained"
    ]
    for row, other in pairs:
        wins += float(row["r2_low"] or row["r2"]) > float(other["r2"])
        text.append(f"{row['model']} {row['layer']}: {float(row['r2']):.2f} and {float(other['r2']):.2f}")
    verdict = HOLDS if pairs and wins == len(pairs) else PARTLY if wins else FAILS
    return Judged(claim, verdict if pairs else UNKNOWN, "R² of SAE codes and of raw activations: " + "; ".join(text))


def _formatting(table: Sequence[Row], carriers: Sequence[Row]) -> Judged:
    claim = "The strongest features are about mathematics, not formatting (others found 80 % to be about formatting)"
    own = [_number(row, "on_format") for row in rows_of(carriers, model="reward")]
    known = [value for value in own if value is not None]
    if not known:
        return Judged(claim, UNKNOWN, "no feature fired inside a step")
    share = sum(value > 0.5 for value in known) / len(known)
    masked, ends = (_mean_r2(rows_of(table, model="reward", inputs=name)) for name in (MASKED, SAE_CODES))
    text = (
        f"read at the last token of a step with letter or digit, mean R² is {masked:.2f}, where it is {ends:.2f} at "
        f"the end of the step; {share:.0%} of the {len(known)} strongest features there have most of their activation "
        "on tokens without letter or digit (the ends of steps are such tokens)"
    )
    return Judged(claim, HOLDS if masked >= 0.9 * ends else PARTLY if masked >= 0.5 * ends else FAILS, text)


def _mean_r2(rows: Sequence[Row]) -> float:
    return sum(float(row["r2"]) for row in rows) / max(len(rows), 1)


def _holds_zero(row: Row, name: str) -> bool:
    return float(row[f"{name}_low"]) <= 0 <= float(row[f"{name}_high"])


def _number(row: Row, name: str) -> float | None:
    return None if row.get(name) in (None, "") else float(row[name])


def _range(row: Row, name: str) -> str:
    low, high = _number(row, f"{name}_low"), _number(row, f"{name}_high")
    return f"[{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""


def _interval(row: Row, name: str) -> str:
    return f"{float(row[name]):.2f} {_range(row, name)}".strip()
