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

    @staticmethod
    def join(parts: list[Records]) -> Records:
        """All of several."""
        return Records(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


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
    """Values as uint32 whose order is the reverse: sorting integers is faster, and −0 equals 0."""
    bits = (value + np.float32(0)).view(np.int32)
    rising = np.where(bits < 0, ~bits, bits | np.int32(-(2**31))).view(np.uint32)
    return ~rising


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """How many of the same group stand before each; `group` is sorted.

    >>> rank_in_group(np.array([3, 3, 5, 5, 5])).tolist()
    [0, 1, 0, 1, 2]
    """
    if not len(group):
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.append(starts, len(group))))


def keep(feature: np.ndarray, value: np.ndarray, index: np.ndarray, sample: np.ndarray, top: int, random: int) -> Kept:
    """Which records are kept. All arguments are [n]; a token stands once per feature.

    >>> feature, index = np.zeros(4, np.int32), np.arange(4)
    >>> kept = keep(feature, np.float32([1, 5, 4, 2]), index, np.array([0, 7, 7, 0]), top=2, random=0)
    >>> kept.rows.tolist(), kept.token_rank.tolist(), kept.prompt_rank.tolist()
    ([1, 2, 3], [0, 1, -1], [0, -1, 1])
    """
    n = len(feature)
    packed = (feature.astype(np.uint64) << np.uint64(32)) | order_key(value)
    order = np.argsort(packed)
    packed = packed[order]
    # among equal ones the smaller token comes first
    same = packed[1:] == packed[:-1]
    if same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        those = order[tied]
        order[tied] = those[np.lexsort((index[those], packed[tied]))]
    group, of = feature[order], sample[order]
    token = rank_in_group(group)
    prompt = np.full(n, -1)
    # the first of each (feature, sample) is its strongest
    pairs = _with_rank(group, of)
    by_sample = np.argsort(pairs)
    pairs = pairs[by_sample]
    starts = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])[:n])
    leaders = np.sort(np.minimum.reduceat(by_sample, starts)) if n else by_sample
    prompt[leaders] = rank_in_group(group[leaders])
    token[token >= top] = -1
    prompt[prompt >= top] = -1
    drawn = np.full(n, -1)
    if random:
        hashed = mix(index[order])
        by_hash = np.argsort(_with_rank(group, hashed))
        chosen = np.sort(by_hash[rank_in_group(group[by_hash]) < random])
        drawn[chosen] = rank_in_group(group[chosen])
    held = (token >= 0) | (prompt >= 0) | (drawn >= 0)
    return Kept(order[held], token[held], prompt[held], drawn[held])


def _with_rank(group: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(group, key) as one int64 of the same order: sorting these is several times as fast as sorting by two keys."""
    least = int(key.min()) if len(key) else 0
    if len(key) and int(key.max()) - least < 2**31:
        rank = key - least
    else:
        rank = np.unique(key, return_inverse=True)[1].reshape(-1)
    return (group.astype(np.int64) << 32) | rank


class Found(NamedTuple):
    """The candidates of one run of rows that may be kept."""

    feature: np.ndarray
    value: np.ndarray
    row: np.ndarray
    """Within the run."""
    leads: np.ndarray
    """bool: the strongest of its sample, and among the `top` samples of the run"""
    drawn: np.ndarray
    """bool: among the `random` of smallest hash"""


def find_in_run(
    feature: np.ndarray,
    value: np.ndarray,
    row: np.ndarray,
    sample: np.ndarray,
    hash_rank: np.ndarray,
    top: int,
    random: int,
) -> Found:
    """`keep` for the candidates of one run of rows, by sorting packed integers, ten times as fast as by keys.

    `row` is the place of each candidate within the run, `sample` and `hash_rank` are small integers by row. The rows of
    a run and the features together take at most 32 bits (see `rows_that_fit`), so that (feature, value, row) is one
    uint64 and carries its row along.
    """
    bits = max(1, int(len(sample) - 1).bit_length())
    low = np.uint64(bits)
    packed = feature.astype(np.uint64) << np.uint64(32)
    packed = ((packed | order_key(value)) << low) | row.astype(np.uint64)
    packed.sort()
    row = (packed & np.uint64((1 << bits) - 1)).astype(np.int64)
    packed >>= low
    feature = (packed >> np.uint64(32)).astype(np.int64)
    value = value_of_key(packed.astype(np.uint32))
    n = len(feature)
    token = rank_in_group(feature) < top
    place = max(1, int(n - 1).bit_length())
    mask = (1 << place) - 1
    # the first of each (feature, sample) in this order is the strongest of its sample
    pairs = (((feature << bits) | sample[row]) << place) | np.arange(n)
    pairs.sort()
    key = pairs >> place
    leaders = np.sort(pairs[np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]] & mask)
    leads = np.zeros(n, bool)
    leads[leaders[rank_in_group(feature[leaders]) < top]] = True
    drawn = np.zeros(n, bool)
    if random:
        pairs = (((feature << bits) | hash_rank[row]) << place) | np.arange(n)
        pairs.sort()
        drawn[(pairs & mask)[rank_in_group(pairs >> (place + bits)) < random]] = True
    held = np.flatnonzero(token | leads | drawn)
    return Found(feature[held], value[held], row[held], leads[held], drawn[held])


def value_of_key(key: np.ndarray) -> np.ndarray:
    """The inverse of `order_key`.

    >>> value_of_key(order_key(np.float32([1.5, -2.0, 0.0]))).tolist()
    [1.5, -2.0, 0.0]
    """
    rising = (~key).view(np.int32)
    return np.where(rising < 0, rising & np.int32(0x7FFFFFFF), ~rising).astype(np.int32).view(np.float32)


def rows_that_fit(features: int) -> int:
    """The longest run of rows that `find_in_run` can pack beside so many features.

    >>> rows_that_fit(65_536), rows_that_fit(1_000_000)
    (65536, 4096)
    """
    return 1 << (32 - max(1, (features - 1).bit_length()))
