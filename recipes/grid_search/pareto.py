"""Pareto fronts: the cells that no other cell beats on both numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .table import GridRow

TOLERANCE = 0.02
"""Cells whose L0 differs by less than this share count as equally sparse: a calibrated BatchTopK lies up to 1 % below
the k it was trained with, and would be on every front for that alone."""


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


def front_rows(rows: Iterable[GridRow], x: str, y: str, tolerance: float = TOLERANCE) -> list[GridRow]:
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
    return [have[i][0] for i in front([(a, b) for _, a, b in have], tolerance)]
