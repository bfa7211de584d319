"""From measured cells to answers: fronts, paired comparisons, and the tables behind the findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from .cells import KINDS, LABELS, Cell, Kind
from .paired import RESAMPLES, Comparison, Units, compare, holm, matched, matched_by_l0
from .synthetic import Recovery
from .table import GridRow, in_order

METRICS: dict[str, str] = {"mse": "squared error", "delta_ce": "added loss"}
"""Metrics that are compared prompt by prompt, with the words for them."""


AT_SAME_L0: tuple[tuple[Kind, Kind], ...] = (
    ("batch_topk", "topk"),
    ("jumprelu_trained", "topk"),
    ("jumprelu_trained", "batch_topk"),
    ("jumprelu_fixed", "topk"),
)


TOLERANCE = 0.02
"""Cells whose L0 differs by less than this share count as equally sparse: a calibrated BatchTopK lies up to 1 % below
the k it was trained with, and would be on every front for that alone."""

ALIKE = 0.1
"""Two widths are compared where their L0 differs by less than this share."""


def front(points: Sequence[tuple[float, float]], tolerance: float = 0.0) -> list[int]:
    """Indices of the points no other point beats (both small is good), by rising first number.

    A point is beaten by one that is lower in the second number and in the first not more than `tolerance` above, and
    by one that is lower in the first and as low in the second. Equal points do not beat each other.

    >>> front([(1, 5), (2, 6), (3, 1), (3, 1)]), front([(7.95, 0.30), (8, 0.29)], tolerance=0.02)
    ([0, 2, 3], [1])
    """

    def beaten(point: tuple[float, float]) -> bool:
        x, y = point
        return any(
            (other[1] < y and other[0] <= x * (1 + tolerance)) or (other[1] == y and other[0] < x) for other in points
        )

    kept = [index for index, point in enumerate(points) if not beaten(point)]
    return sorted(kept, key=lambda index: points[index])


def front_rows(rows: Iterable[GridRow], x: str, y: str) -> list[GridRow]:
    """The rows on the front of two metrics; rows that lack one of them are left out.

    >>> from .cells import Cell
    >>> from .table import Number
    >>> a = GridRow(Cell("topk", 4, 8), {"l0": Number(8), "fvu": Number(0.3)})
    >>> b = GridRow(Cell("topk", 8, 8), {"l0": Number(8), "fvu": Number(0.2)})
    >>> [row.id for row in front_rows([a, b], "l0", "fvu")]
    ['TopK_exp8x_k8']
    """
    pairs = [(row, row.value(x), row.value(y)) for row in rows]
    have = [(row, a, b) for row, a, b in pairs if a is not None and b is not None]
    return [have[i][0] for i in front([(a, b) for _, a, b in have], TOLERANCE)]


class Question(NamedTuple):
    """One paired question: is kind `a` better than kind `b`?"""

    metric: str
    a: Kind
    b: Kind
    how: str
    """same k, same L0, or twice as wide"""

    @property
    def title(self) -> str:
        """For headings and plots."""
        return f"{LABELS[self.a]} against {LABELS[self.b]} at the {self.how}: {METRICS[self.metric]}"


class FailedCell(NamedTuple):
    """A cell that gave no SAE."""

    id: str
    reason: str


@dataclass(frozen=True)
class Analysis:
    """Everything the findings are written from."""

    rows: list[GridRow]
    failed: list[FailedCell]
    answers: dict[Question, list[Comparison]]
    wider: list[Comparison]
    """Each cell against the next narrower one of the same kind, number and about the same L0, in squared error."""
    fronts: dict[str, list[GridRow]]
    """Metric -> cells on the front with L0."""
    recoveries: list[Recovery] = field(default_factory=list)

    def by_kind(self, kind: str) -> list[GridRow]:
        """Rows of one kind."""
        return [row for row in self.rows if row.cell.kind == kind]

    def front_table(self) -> list[dict[str, Any]]:
        """The fronts, tidy, for a CSV."""
        return [
            {"metric": metric, "id": row.id, "l0": row.value("l0"), metric: row.value(metric)}
            for metric, best in self.fronts.items()
            for row in best
        ]

    def comparison_rows(self) -> list[dict[str, Any]]:
        """All comparisons, tidy, for a CSV."""
        named = [(q.title, c) for q, list_ in self.answers.items() for c in list_]
        named += [("wider against narrower: squared error", c) for c in self.wider]
        verdicts = {"a": "a is better", "b": "b is better", "open": "not decided"}
        return [
            {
                "question": title,
                **c._asdict(),
                "relative": c.relative,
                "verdict": verdicts[c.verdict],
            }
            for title, c in named
        ]


def analyse(
    rows: Sequence[GridRow],
    units: Mapping[str, Mapping[Cell, Units]],
    *,
    failed: Sequence[FailedCell] = (),
    recoveries: Sequence[Recovery] = (),
    resamples: int = RESAMPLES,
) -> Analysis:
    """Answer the questions of a grid.

    `units` holds, per metric of METRICS, each cell's values taken apart by prompt. The same cells need not be in
    both; what is missing is not compared.
    """
    ordered = in_order(rows)
    l0 = {row.cell: value for row in ordered if (value := row.value("l0")) is not None}
    answers: dict[Question, list[Comparison]] = {}

    def ask(question: Question, comparisons: list[Comparison]) -> None:
        if comparisons:
            answers[question] = comparisons

    for metric in METRICS:
        mine = units.get(metric, {})
        ask(Question(metric, "batch_topk", "topk", "same k"), matched(metric, mine, "batch_topk", "topk", resamples))
        for a, b in AT_SAME_L0:
            ask(
                Question(metric, a, b, "same L0"),
                matched_by_l0(metric, mine, l0, a, b, geometric=metric == "mse", resamples=resamples),
            )
    return Analysis(
        rows=ordered,
        failed=list(failed),
        answers=answers,
        wider=_wider(units.get("mse", {}), l0, resamples),
        fronts={metric: front_rows(ordered, "l0", metric) for metric in ("fvu", "delta_ce")},
        recoveries=list(recoveries),
    )


def _wider(units: Mapping[Cell, Units], l0: Mapping[Cell, float], resamples: int) -> list[Comparison]:
    """Every cell against the next narrower one of the same kind, number and seed, where both are about as sparse."""
    out = []
    for kind in KINDS:
        if kind == "jumprelu_fixed":
            continue  # a wider one fires more latents, so the two are not alike in sparsity
        cells = sorted((c for c in units if c.kind == kind), key=lambda c: (c.number, c.seed, c.expansion))
        for narrow, wide in pairwise(cells):
            alike = abs(l0.get(wide, 1.0) / l0.get(narrow, 1.0) - 1) < ALIKE
            if alike and (narrow.number, narrow.seed) == (wide.number, wide.seed):
                out.append(compare("mse", (wide.id, narrow.id), units[wide], units[narrow], resamples))
    return holm(out)
