"""Which records of a feature are kept: the strongest tokens, the strongest samples, and some drawn at random.

A record is one firing: (feature, value, token). The order is value, largest first, then the smaller global token id, so
every cut is exact: best-of tables under (join, sort, cut) give the same rows for any order and partition of the input.
The random ones are those whose token has the smallest hash, which is an exact cut as well.

    records -> keep(records) -> at most 2 x top + random of each feature, sorted by feature and value
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hubsae.evals.accumulate import mix


class Records(NamedTuple):
    """Firings, with what stood around them. Columns are [n], windows [n, 2·window + 1]."""

    feature: np.ndarray
    """int32"""
    value: np.ndarray
    """float32"""
    index: np.ndarray
    """int64: the global token id, the row in the activations"""
    sample: np.ndarray
    """int64; below −1 where unknown: such a token is a sample of its own"""
    position: np.ndarray
    """int32, −1 where unknown"""
    token: np.ndarray
    """int32, −1 where unknown"""
    turn: np.ndarray
    """int32, −1 where unknown"""
    role: np.ndarray
    """int16: place in the table of roles, −1 where unknown"""
    ids: np.ndarray
    """int32 [n, window]: tokens around, −1 beyond the sample"""
    around: np.ndarray
    """float32 [n, window]: value of the feature at each of them"""

    def take(self, rows: np.ndarray) -> Records:
        """Some of them."""
        return Records(*(column[rows] for column in self))

    @staticmethod
    def none(width: int) -> Records:
        """No records, with windows of `width` tokens."""
        types = (np.int32, np.float32, np.int64, np.int64, np.int32, np.int32, np.int32, np.int16)
        plain: Any = [np.zeros(0, dtype) for dtype in types]
        return Records(*plain, ids=np.zeros((0, width), np.int32), around=np.zeros((0, width), np.float32))


class Kept(NamedTuple):
    """What was kept of a list of records, and the bounds that a further record has to beat."""

    rows: np.ndarray
    """Indices of the kept ones, sorted by feature, value and token"""
    token_rank: np.ndarray
    """[kept] place among the strongest tokens of the feature, −1 where not among them"""
    prompt_rank: np.ndarray
    """[kept] place among the strongest samples"""
    random_rank: np.ndarray
    """[kept] place, by value, among the random ones"""


def order_key(value: np.ndarray) -> np.ndarray:
    """Values as uint32 whose order is the reverse; −0 equals 0."""
    bits = (value + np.float32(0)).view(np.int32)
    rising = np.where(bits < 0, ~bits, bits | np.int32(-(2**31))).view(np.uint32)
    return ~rising


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """How many of the same group stand before each; `group` is sorted.

    >>> rank_in_group(np.array([3, 3, 5, 5, 5])).tolist()
    [0, 1, 0, 1, 2]
    """
    starts = np.flatnonzero(_starts(group))
    lengths = np.diff(np.append(starts, len(group)))
    return np.arange(len(group), dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)


def order_by(*keys: np.ndarray) -> np.ndarray:
    """The stable order of rows by several columns of non-negative integers, the first of them first.

    16 bits at a time, least significant first: NumPy sorts these by counting, 4 to 15 ns a row, where one sort of
    64-bit integers takes 20 to 70.

    >>> order_by(np.array([1, 0, 1, 0]), np.array([70_000, 3, 2, 3])).tolist()
    [1, 3, 2, 0]
    """
    order = None
    for key in reversed(keys):
        if order is None and (key[1:] >= key[:-1]).all():
            continue
        for shift in range(0, int(key.max(initial=0)).bit_length(), 16):
            digit = (key >> key.dtype.type(shift)).astype(np.uint16)
            step = np.argsort(digit if order is None else digit[order], kind="stable")
            order = step if order is None else order[step]
    return np.arange(len(keys[0])) if order is None else order


def keep(
    feature: np.ndarray,
    value: np.ndarray,
    index: np.ndarray,
    sample: np.ndarray,
    top: int,
    random: int,
    hashes: np.ndarray | None = None,
) -> Kept:
    """Which records are kept. All arguments are [n]; a token stands once per feature.

    `hashes` says in which order tokens are drawn at random; it is the hash of `index` unless given.

    >>> feature, index = np.zeros(4, np.int32), np.arange(4)
    >>> kept = keep(feature, np.float32([1, 5, 4, 2]), index, np.array([0, 7, 7, 0]), top=2, random=0)
    >>> kept.rows.tolist(), kept.token_rank.tolist(), kept.prompt_rank.tolist()
    ([1, 2, 3], [0, 1, -1], [0, -1, 1])
    """
    order = order_by(feature, order_key(value), _from_zero(index))
    group = feature[order]
    token = rank_in_group(group)
    token[token >= top] = -1
    # this order is stable, so the first of each (feature, sample) is its strongest
    prompt = _ranks_of(group, _leaders(group, _from_zero(sample)[order]))
    prompt[prompt >= top] = -1
    drawn = np.full(len(order), -1, np.int32)
    if random:
        hashed = mix(index) if hashes is None else hashes
        drawn = _ranks_of(group, _smallest(group, hashed[order], random))
    held = (token >= 0) | (prompt >= 0) | (drawn >= 0)
    return Kept(order[held], token[held], prompt[held], drawn[held])


def _from_zero(column: np.ndarray) -> np.ndarray:
    """int64 as uint64 from 0 on, in the same order."""
    return (column - column.min()).view(np.uint64) if len(column) else column


def _starts(*columns: np.ndarray) -> np.ndarray:
    """Where a run of equal rows begins. bool"""
    first = np.zeros(len(columns[0]), bool)
    first[:1] = True
    for column in columns:
        first[1:] |= column[1:] != column[:-1]
    return first


def _leaders(group: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """The first of each (group, sample). bool"""
    order, leads = order_by(group, sample), np.zeros(len(group), bool)
    leads[order[_starts(group[order], sample[order])]] = True
    return leads


def _smallest(group: np.ndarray, key: np.ndarray, count: int) -> np.ndarray:
    """The `count` smallest keys of each group. bool"""
    order, chosen = order_by(group, key), np.zeros(len(group), bool)
    chosen[order[rank_in_group(group[order]) < count]] = True
    return chosen


def _ranks_of(group: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """How many of the chosen ones of the same group stand before each chosen one; −1 for the others."""
    rank = np.full(len(group), -1, np.int32)
    rank[chosen] = rank_in_group(group[chosen])
    return rank
