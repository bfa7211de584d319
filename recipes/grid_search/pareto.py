"""Pareto fronts: the cells that no other cell beats on both numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .table import GridRow


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points no other point beats (both small is good), by rising first number.

    A point equal to another is not beaten by it.

    >>> front([(1, 5), (2, 6), (3, 1), (3, 1)])
    [0, 2, 3]
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    best = float("inf")
    last: tuple[float, float] | None = None
    for index in order:
        point = points[index]
        if point[1] < best or point == last:
            kept.append(index)
            best, last = min(best, point[1]), point
    return kept


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
    return [have[i][0] for i in front([(a, b) for _, a, b in have])]
