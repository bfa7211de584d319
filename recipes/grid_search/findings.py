"""What a grid found, in plain sentences, each written from numbers and from nothing else.

A sentence about who is better counts matched cells and says how many of them the held-out prompts decide
(paired bootstrap, corrected for the number of cells). What was not measured is not mentioned.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .analysis import METRICS, TOLERANCE, Analysis, Question
from .cells import KINDS, LABELS
from .paired import Comparison, sign_test
from .published import PublishedRow, pairs
from .synthetic import COSINE, Recovery
from .table import WITH_FIRST, WITHOUT_FIRST

MOST_IDS = 6
"""Ids a sentence lists before it only counts."""


class Finding(NamedTuple):
    """One answer with its heading."""

    title: str
    sentences: list[str]

    def markdown(self) -> str:
        """As a list item."""
        return f"- **{self.title}** {' '.join(self.sentences)}"


def findings(analysis: Analysis, published: Sequence[PublishedRow] = ()) -> list[Finding]:
    """All findings of a grid, the most asked question first."""
    found = [
        _kinds(analysis, published),
        _dead(analysis, published),
        _front(analysis),
        *(_matched_l0(analysis, q) for q in _questions(analysis, "same L0")),
        _fixed_threshold(analysis),
        _trained_threshold(analysis),
        _width(analysis),
        _loss(analysis),
        _first_position(analysis),
        _truth(analysis),
        _failed(analysis),
        _limits(analysis),
    ]
    return [finding for finding in found if finding is not None]


def markdown(found: Sequence[Finding]) -> str:
    """The findings as a Markdown list."""
    return "\n".join(finding.markdown() for finding in found)


# ---- one question each -------------------------------------------------------------------------------------


def _kinds(analysis: Analysis, published: Sequence[PublishedRow]) -> Finding | None:
    sentences = []
    for question in _questions(analysis, "same k"):
        comparisons = analysis.answers[question]
        sentences.append(f"{_tally(question, comparisons)} {_size(question, comparisons)}".strip())
    if not sentences:
        return None
    sentences += _unlike(analysis)
    both = pairs(published)
    if both:
        ahead = sum(t.mse < b.mse for b, t in both)
        sentences.append(f"In the published grid TopK has the lower MSE in {ahead} of {len(both)} cells.")
    return Finding("TopK or BatchTopK.", sentences)


def _unlike(analysis: Analysis) -> list[str]:
    """What to know of a comparison at the same k where BatchTopK, whose threshold is fixed by then, fires otherwise."""
    top = {r.cell: r.value("l0") for r in analysis.by_kind("topk")}
    both = [(r.value("l0"), top.get(r.cell.twin("topk"))) for r in analysis.by_kind("batch_topk")]
    more = [100 * (b / t - 1) for b, t in both if b and t]
    if not more or max(map(abs, more)) <= 100 * TOLERANCE:
        return []
    return [
        f"The same k is not the same sparsity here: with the threshold calibrated on training tokens BatchTopK's L0 on "
        f"held-out ones is {min(more):+.1f} to {max(more):+.1f} % beside TopK's, which moves error and loss by itself. "
        "Where a TopK of that L0 can be interpolated, the comparison at the same L0 is the fair one."
    ]


def _dead(analysis: Analysis, published: Sequence[PublishedRow]) -> Finding | None:
    top = {r.cell: r for r in analysis.by_kind("topk")}
    both = [(r, top[r.cell.twin("topk")]) for r in analysis.by_kind("batch_topk") if r.cell.twin("topk") in top]
    told = [(b.value("dead_fraction"), t.value("dead_fraction"), b) for b, t in both]
    known = [(b, t, row) for b, t, row in told if b is not None and t is not None]
    if not known:
        return None
    fewer, more = sum(b < t for b, t, _ in known), sum(b > t for b, t, _ in known)
    tokens = known[0][2].numbers["dead_fraction"].n_tokens
    where = f" (latents that fire on none of {tokens:,} held-out tokens)" if tokens else ""
    values = [b for b, _, _ in known], [t for _, t, _ in known]
    sentences = [
        f"BatchTopK has fewer dead latents{where} in {fewer} of {len(known)} matched cells, TopK in {more} "
        f"(sign test over cells: p = {_p(sign_test(fewer, more))}).",
        f"BatchTopK leaves {_range(values[0])} dead, TopK {_range(values[1])}.",
    ]
    theirs = pairs(published)
    if theirs:
        ahead = sum(b.dead < t.dead for b, t in theirs)
        sentences.append(f"Published: BatchTopK in {ahead} of {len(theirs)}.")
    return Finding("Dead latents.", sentences)


def _front(analysis: Analysis) -> Finding | None:
    sentences = []
    for metric, words in (("fvu", "unexplained variance"), ("delta_ce", "added loss")):
        best = analysis.fronts.get(metric, [])
        if not best:
            continue
        counts = [(LABELS[k], sum(r.cell.kind == k for r in best), len(analysis.by_kind(k))) for k in KINDS]
        shares = _listing([f"{n} of the {of} {label} cells" for label, n, of in counts if of])
        ids = _listing([f"`{row.id}`" for row in best[:MOST_IDS]])
        ids += f" and {len(best) - MOST_IDS} more" if len(best) > MOST_IDS else ""
        sentences.append(
            f"No cell as sparse (an L0 at most {100 * TOLERANCE:.0f} % higher) has less {words} than {ids}: {shares}."
        )
    return Finding("The Pareto front.", sentences) if sentences else None


def _matched_l0(analysis: Analysis, question: Question) -> Finding:
    comparisons = analysis.answers[question]
    title = f"{LABELS[question.a]} against {LABELS[question.b]}, matched by L0, {METRICS[question.metric]}."
    return Finding(title, [_tally(question, comparisons), _size(question, comparisons)])


def _fixed_threshold(analysis: Analysis) -> Finding | None:
    rows = [r for r in analysis.by_kind("jumprelu_fixed") if r.value("l0") is not None]
    if not rows:
        return None
    parts = []
    for threshold in sorted({r.cell.number for r in rows}):
        mine = sorted((r for r in rows if r.cell.number == threshold), key=lambda r: r.cell.expansion)
        l0 = ", ".join(f"{_count(r.value('l0') or 0.0)} at {r.cell.expansion:g}x" for r in mine)
        parts.append(f"{threshold:g} gives L0 {l0}")
    return Finding(
        "A fixed threshold does not set the sparsity.",
        [f"With nothing that asks for sparsity, L0 is whatever training makes of it: {'; '.join(parts)}."],
    )


def _trained_threshold(analysis: Analysis) -> Finding | None:
    rows = [r for r in analysis.by_kind("jumprelu_trained") if r.value("l0") is not None]
    if not rows:
        return None
    misses = [abs((r.value("l0") or 0.0) / r.cell.number - 1) for r in rows]
    worst = rows[misses.index(max(misses))]
    return Finding(
        "Trained thresholds and the L0 they were asked for.",
        [
            f"Held-out L0 misses its target by at most {100 * max(misses):.0f} % in {len(rows)} cells (median "
            f"{100 * statistics.median(misses):.0f} %; worst `{worst.id}` with {worst.value('l0'):.1f})."
        ],
    )


def _width(analysis: Analysis) -> Finding | None:
    if not analysis.wider:
        return None
    better = [c for c in analysis.wider if c.verdict == "a"]
    worse = [c for c in analysis.wider if c.verdict == "b"]
    change = statistics.median(100 * c.relative for c in analysis.wider)
    return Finding(
        "Width.",
        [
            f"Going to the next larger expansion at about the same L0 lowers the error in {len(better)} of "
            f"{len(analysis.wider)} cases and raises it in {len(worse)}, the rest is not decided; median change "
            f"{change:+.1f} %."
        ],
    )


def _loss(analysis: Analysis) -> Finding | None:
    rows = [r for r in analysis.rows if r.frac_rec is not None and r.value("frac_recovered_mean") is not None]
    if not rows:
        return None
    ratio = [r.frac_rec or 0.0 for r in rows]
    truly = [r.value("frac_recovered_mean") or 0.0 for r in rows]
    clean, mean = rows[0].value("ce_clean"), rows[0].value("ce_mean")
    return Finding(
        "Loss recovered.",
        [
            f"Against mean ablation ({mean:.2f} nats; the model alone {clean:.2f}) the cells recover {_range(truly)}. "
            f"The ratio that the published tables call frac_rec would read {_range(ratio)} for the same cells: it "
            "says how large the loss is, not how much of what could be lost was kept."
        ],
    )


def _first_position(analysis: Analysis) -> Finding | None:
    """What the first token of each text, where models put a massive activation, does to the numbers."""
    left_out = any(r.value(f"fvu@{WITH_FIRST}") is not None for r in analysis.rows)
    first, rest = ("@" + WITH_FIRST, "") if left_out else ("", "@" + WITHOUT_FIRST)

    def both(metric: str) -> list[tuple[float, float]]:
        pairs = [(r.value(metric + first), r.value(metric + rest)) for r in analysis.rows]
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    fvu, ratios = both("fvu"), [b / a for a, b in both("nmse_pooled") if a and b]
    if not fvu or not ratios:
        return None
    about = "These SAEs are not for the first token of a text and were trained without it. " if left_out else ""
    with_, without = _span([a for a, _ in fvu]), _span([b for _, b in fvu])
    if max(ratios) < 1.2 and min(ratios) > 1 / 1.2:
        last = "pooled NMSE hardly changes either: this model has no massive activation there."
    else:
        last = (
            f"pooled NMSE changes by a factor of {min(ratios):.2g} to {max(ratios):.2g}: it divides by the variance of "
            "all elements, which a few massive coordinates at the first position can fill."
        )
    text = f"{about}FVU is {with_} with the first token of each text and {without} without it; {last}"
    return Finding("The first position.", [text])


def _truth(analysis: Analysis) -> Finding | None:
    if not analysis.recoveries:
        return None
    groups: dict[tuple[str, float], list[Recovery]] = {}
    for r in analysis.recoveries:
        groups.setdefault((r.cell.kind, r.cell.number), []).append(r)
    rising, parts = 0, []
    for kind in KINDS:
        mine = [sorted(g, key=lambda r: r.d_sae) for (k, _), g in groups.items() if k == kind]
        if not mine:
            continue
        rising += sum(all(a.fraction < b.fraction for a, b in pairwise(g)) for g in mine)
        narrow = statistics.mean(g[0].fraction for g in mine)
        wide = statistics.mean(g[-1].fraction for g in mine)
        parts.append(f"{LABELS[kind]} {100 * narrow:.0f} % with {mine[0][0].d_sae} latents and {100 * wide:.0f} % "
                     f"with {mine[0][-1].d_sae}")  # fmt: skip
    return Finding(
        "Known features.",
        [
            f"On synthetic data the trainer finds the true directions (cosine above {COSINE}): {'; '.join(parts)}.",
            f"The share rises with every step of width in {rising} of {len(groups)} settings.",
        ],
    )


def _failed(analysis: Analysis) -> Finding | None:
    if not analysis.failed:
        return None
    listed = "; ".join(f"`{cell.id}` ({cell.reason})" for cell in analysis.failed)
    return Finding("Cells without a result.", [f"{len(analysis.failed)} of the sweep, left out above: {listed}."])


def _limits(analysis: Analysis) -> Finding | None:
    seeds = {row.cell.seed for row in analysis.rows}
    if not analysis.answers:
        return None
    if len(seeds) > 1:
        text = f"Every cell was trained with {len(seeds)} seeds, which are compared one by one."
    else:
        text = (
            "Each cell was trained once. The tests say whether a difference is larger than the noise of the held-out "
            "prompts; they do not say how far another training seed would move it, and cells share data, so counts "
            "over cells are not independent trials."
        )
    return Finding("What this does not show.", [text])


# ---- words -------------------------------------------------------------------------------------------------


def _questions(analysis: Analysis, how: str) -> list[Question]:
    return [question for question in analysis.answers if question.how == how]


def _tally(question: Question, comparisons: Sequence[Comparison]) -> str:
    """Who is ahead in how many matched cells, and how many of those the prompts decide."""
    a = [c for c in comparisons if c.difference < 0]
    b = [c for c in comparisons if c.difference > 0]
    sure_a, sure_b = sum(c.verdict == "a" for c in comparisons), sum(c.verdict == "b" for c in comparisons)
    metric = METRICS[question.metric]
    units = "held-out texts" if question.metric == "delta_ce" else "groups of held-out prompts"
    what = "cell" if len(comparisons) == 1 else "cells"
    return (
        f"{LABELS[question.a]} has the lower {metric} in {len(a)} of {len(comparisons)} matched {what} ({sure_a} "
        f"decided by {comparisons[0].units} {units}), {LABELS[question.b]} in {len(b)} "
        f"({sure_b} decided)."
    )


def _size(question: Question, comparisons: Sequence[Comparison]) -> str:
    if question.metric == "delta_ce":
        middle = statistics.median(c.difference for c in comparisons)
        return f"Median difference {middle:+.3g} nats per token."
    middle = statistics.median(100 * c.relative for c in comparisons)
    low, high = min(100 * c.relative for c in comparisons), max(100 * c.relative for c in comparisons)
    return f"Median difference {middle:+.1f} % (from {low:+.1f} to {high:+.1f} %)."


def _range(shares: Sequence[float]) -> str:
    low, high = 100 * min(shares), 100 * max(shares)
    if f"{low:.3g}" == f"{high:.3g}":
        return f"{low:.3g} %"
    return f"{low:.3g} to {high:.3g} %"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "< 0.001"


def _listing(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else "none"
