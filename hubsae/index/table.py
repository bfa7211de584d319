"""The reverse index as an accumulator of a pass: per feature counts, histogram, n-best records with their context.

Of every firing four things are done, all of them by columns: its size goes into a histogram, its value into a sum, and
it is compared with the bounds of its feature: the weakest of the strongest samples kept so far, and the largest hash
of the random ones. Few pass; only for these a context is looked up, and they wait together until they are worth a look
at the bounds again. Everything is exact and mergeable: counts are integers, sums are integers of 2^-20, records are an
n-best cut (see `best`).

    codes -> counted, compared -> candidates -> context -> waiting -> cut, bounds raised -> records
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubsae.core.errors import DataError
from hubsae.core.scopes import ALL, Scope
from hubsae.evals.accumulate import mix
from hubsae.evals.passes import PassBlock, load_state, save_state
from hubsae.index.best import Kept, Records, keep, order_by, rank_in_group
from hubsae.index.tally import Cofiring, Tally

KIND = "feature table"
ROWS = 4096
"""Rows taken in at once, where blocks are smaller."""
WAITING = 1 << 14
"""Candidates that wait; more of one block are cut before their context is looked up."""
NO_VALUE, NO_HASH, NO_SAMPLE = np.float32(-np.inf), 2**63 - 1, -(2**63)


class FeatureTable:
    """What a pass gathers of one SAE's features.

    >>> from hubsae.core.config import SAEConfig
    >>> from hubsae.core.sae import SAE
    >>> from hubsae.evals.passes import run_pass
    >>> sae = SAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> table = FeatureTable("a", 8, top=2)
    >>> _ = run_pass(torch.randn(100, 4, generator=torch.manual_seed(0)), {"a": sae}, [table])
    >>> int(table.count.sum()), table.n_tokens
    (200, 100)
    """

    columns = ("position", "sample_id", "token_id", "is_special", "role", "turn")

    def __init__(
        self,
        name: str,
        d_sae: int,
        *,
        top: int = 10,
        random: int = 10,
        window: int = 8,
        scope: Scope = ALL,
        identity: Mapping[str, Any] | None = None,
        rows: int = ROWS,
        offset: int = 0,
    ):
        """`identity` says what is indexed (hash of the SAE, tokenizer); states of another one are not merged.

        `offset` is the global id of the first row of the pass.
        """
        if top < 1 or window < 0 or random < 0:
            raise DataError(f"top {top}, random {random}, window {window}: at least 1, 0 and 0 are needed")
        self.name, self.d_sae, self.top, self.random, self.window = name, d_sae, top, random, window
        self.scope, self.identity = scope, dict(identity or {})
        self.rows, self.offset = max(1, rows), offset
        self.columns = tuple(dict.fromkeys([*FeatureTable.columns, *scope.columns]))
        self.context = window
        self.n_tokens, self.n_rows = 0, 0
        self.spans: list[list[int]] = []
        """Runs of rows that were taken in."""
        self.first, self.special = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.int64)
        self.known: dict[str, bool] = {}
        self.roles: list[str] = []
        self.records = Records.none(2 * window + 1)
        """Sorted after `result`; before, in any order and with places between them that are free."""
        self._free = np.zeros(0, np.int64)
        self._tally, self._cofiring = Tally(d_sae), Cofiring()
        # of the strongest samples of each feature so far: value of the strongest token, and which sample
        self._best = np.full((d_sae, top), NO_VALUE)
        self._best_sample = np.full((d_sae, top), NO_SAMPLE, np.int64)
        self._lowest = np.full((d_sae, random), NO_HASH, np.int64)
        """Smallest hashes of each feature's firings."""
        # read off them: what a further firing has to reach; the upper half of a hash tells most of them apart
        self._bound = np.full(d_sae, NO_VALUE)
        self._bound_hash = np.full(d_sae, NO_HASH if random else -1, np.int64)
        self._near = _upper(self._bound_hash)
        self._rising = True
        self._next: int | None = None
        self._waiting: list[dict[str, np.ndarray]] = []
        self._behind = 0
        self._candidates: list[Records] = []

    # ---- adding -----------------------------------------------------------------------------------------------

    @property
    def count(self) -> np.ndarray:
        """Firings of each feature. [d_sae]"""
        return self.histogram.sum(1)

    @property
    def histogram(self) -> np.ndarray:
        """Firings of each feature by size. [d_sae, BINS]"""
        return self._tally.histogram

    @property
    def sum(self) -> np.ndarray:
        """Sum of each feature's values, in integers of 2^-20. [d_sae]"""
        return self._tally.sum

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(hash of the token, feature) of the firings of the tokens drawn, sorted."""
        return self._cofiring.pairs()

    def add(self, block: PassBlock) -> None:
        """Take in a block; blocks come in the order of the rows."""
        codes = block.codes[self.name]
        start = self.offset + block.start
        self.add_codes(codes.indices, codes.values, block.labels, start, halo=block.halo, scope=self.scope)

    def add_codes(
        self,
        indices: torch.Tensor | np.ndarray,
        values: torch.Tensor | np.ndarray,
        labels: Mapping[str, np.ndarray],
        start: int,
        *,
        halo: bool = False,
        scope: Scope = ALL,
    ) -> None:
        """Take in codes [rows, k] of consecutive rows from `start` on; rows of a halo are context only."""
        feature = np.ascontiguousarray(torch.as_tensor(indices).cpu().numpy(), dtype=np.int32)
        value = np.ascontiguousarray(torch.as_tensor(values).float().cpu().numpy())
        n = len(feature)
        index = np.arange(start, start + n)
        unknown = np.full(n, -1)
        sample = np.asarray(labels.get("sample_id", unknown)).astype(np.int64)
        counted = np.zeros(n, bool) if halo else scope.mask(labels, n)
        for name in ("position", "token_id", "is_special", "role", "turn", "sample_id"):
            self.known[name] = self.known.get(name, False) or name in labels
        block = {
            "feature": feature,
            "value": value,
            "index": index,
            # a token of an unknown sample is a sample of its own, and has no neighbours
            "sample": np.where(sample >= 0, sample, -2 - index),
            "position": np.asarray(labels.get("position", unknown)).astype(np.int32),
            "token": np.asarray(labels.get("token_id", unknown)).astype(np.int32),
            "turn": np.asarray(labels.get("turn", unknown)).astype(np.int32),
            "role": self._role_codes(labels.get("role"), n),
            "special": np.asarray(labels.get("is_special", np.zeros(n, bool))).astype(bool),
            "counted": counted,
        }
        if self._next is not None and self._next != start:
            self._take_in(last=True)
        self._next = start + n
        if not halo:
            self._cover(start, start + n)
            self.n_rows += n
            self.n_tokens += int(counted.sum())
        block["passes"] = self._count(block)
        self._waiting.append(block)
        if sum(len(b["index"]) for b in self._waiting) - self._behind >= self.rows + self.window:
            self._take_in(last=False)

    def _role_codes(self, roles: np.ndarray | None, n: int) -> np.ndarray:
        if roles is None:
            return np.full(n, -1, np.int16)
        names, codes = np.unique(np.asarray(roles).astype(str), return_inverse=True)
        self.roles += [name for name in names.tolist() if name not in self.roles]
        return np.array([self.roles.index(name) for name in names.tolist()], np.int16)[codes.reshape(-1)]

    def _cover(self, start: int, end: int) -> None:
        for low, high in self.spans:
            if start < high and low < end:
                raise DataError(f"rows {max(start, low)} to {min(end, high)} were taken in already")
        self._rising = self._rising and (not self.spans or start >= self.spans[-1][1])
        self.spans = _joined([*self.spans, [start, end]])

    def settle(self) -> None:
        """Take in what waits for its right neighbours, as if none came, and cut what waits to be cut."""
        self._take_in(last=True)
        self._cut_candidates()

    def _count(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Count the firings of a block, and compare them; which may be among the best. [rows, k] bool"""
        feature, value, counted = block["feature"], block["value"], block["counted"]
        if not counted.any():
            return np.zeros(feature.shape, bool)
        part: Any = slice(None) if counted.all() else np.flatnonzero(counted)
        feature, value, hashes = feature[part], value[part], mix(block["index"][part])
        for table, column in ((self.first, block["position"][part] == 0), (self.special, block["special"][part])):
            np.add.at(table, feature[column][value[column] != 0], 1)
        self._cofiring.add(hashes, feature, value)
        near: Any = {"hashes": _upper(hashes), "bound_hash": self._near} if self.random else {}
        # while rows come in order a tie always loses to the token before it; otherwise it may win
        passes = self._tally.count(feature, value, self._bound, strict=self._rising, **near)
        if isinstance(part, slice):
            return passes
        every = np.zeros(block["feature"].shape, bool)
        every[part] = passes
        return every

    def _take_in(self, *, last: bool) -> None:
        """Look up what is around the candidates of the waiting rows, but for the last `window` rows, whose neighbours
        may still come."""
        if not self._waiting:
            return
        width = max(b["feature"].shape[1] for b in self._waiting)
        rows = {
            name: np.concatenate([_widened(b[name], width) for b in self._waiting]) for name in self._waiting[0]
        } if len(self._waiting) > 1 else self._waiting[0]  # fmt: skip
        n = len(rows["index"])
        end = n if last else n - self.window
        places = np.flatnonzero(rows["passes"][self._behind : end]) + self._behind * width
        feature, value, row = rows["feature"].reshape(-1)[places], rows["value"].reshape(-1)[places], places // width
        index, sample = rows["index"][row], rows["sample"][row]
        if len(places) > WAITING:
            self._cut_candidates()
            chosen = self._best_of(feature, value, index, sample)
            self._put(self._with_context(rows, feature[chosen], value[chosen], row[chosen]))
        elif len(places):
            self._candidates.append(self._with_context(rows, feature, value, row))
            if sum(len(records.feature) for records in self._candidates) > WAITING:
                self._cut_candidates()
        kept = n if last else max(0, n - 2 * self.window)
        self._waiting = [{name: column[kept:].copy() for name, column in rows.items()}] if kept < n else []
        self._behind = end - kept if kept < n else 0

    def _cut_candidates(self) -> None:
        """Keep the best of those that wait."""
        if self._candidates:
            new = Records(*(np.concatenate(columns) for columns in zip(*self._candidates, strict=True)))
            self._candidates = []
            self._put(new.take(self._best_of(new.feature, new.value, new.index, new.sample)))

    def _best_of(self, feature: np.ndarray, value: np.ndarray, index: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """Raise the bounds by candidates; which of these are not below them."""
        hashes = mix(index)
        best = keep(feature, value, index, sample, self.top, self.random, hashes)
        feature, value, hashes = feature[best.rows], value[best.rows], hashes[best.rows]
        self._raise_bounds(feature, value, sample[best.rows], hashes, best.prompt_rank >= 0, best.random_rank >= 0)
        return best.rows[self._passes(feature, value, hashes)]

    def _passes(self, feature: np.ndarray, value: np.ndarray, hashed: np.ndarray) -> np.ndarray:
        """Which records the bounds have not risen above. bool"""
        return (value >= self._bound[feature]) | (hashed <= self._bound_hash[feature])

    def _raise_bounds(
        self, feature: np.ndarray, value: np.ndarray, sample: np.ndarray, hashed: np.ndarray, leads: np.ndarray,
        drawn: np.ndarray,
    ) -> None:  # fmt: skip
        """Let new firings, sorted by feature and value, into the small tables that the bounds are read from."""
        leads = leads & (value > self._bound[feature])
        of, (values, samples) = _by_feature(
            feature[leads], self.top, (value[leads], NO_VALUE), (sample[leads], NO_SAMPLE)
        )
        old, old_samples = self._best[of], self._best_sample[of]
        # a sample that goes on from the rows before stands there twice: its weaker entry goes
        row, one, other = np.nonzero(
            (old_samples[:, :, None] == samples[:, None, :]) & (samples != NO_SAMPLE)[:, None, :]
        )
        weaker = values[row, other] <= old[row, one]
        values[row[weaker], other[weaker]] = NO_VALUE
        old[row[~weaker], one[~weaker]] = NO_VALUE
        values, samples = np.concatenate([old, values], 1), np.concatenate([old_samples, samples], 1)
        order = np.argsort(-values, axis=1)[:, : self.top]
        values, samples = np.take_along_axis(values, order, 1), np.take_along_axis(samples, order, 1)
        self._best[of], self._best_sample[of], self._bound[of] = values, samples, values[:, -1]
        if self.random:
            drawn = drawn & (hashed < self._bound_hash[feature])
            of, (new,) = _by_feature(feature[drawn], self.random, (hashed[drawn], NO_HASH))
            lowest = np.sort(np.concatenate([self._lowest[of], new], 1), axis=1)[:, : self.random]
            self._lowest[of], self._bound_hash[of], self._near[of] = lowest, lowest[:, -1], _upper(lowest[:, -1])

    def _with_context(
        self, rows: dict[str, np.ndarray], feature: np.ndarray, value: np.ndarray, row: np.ndarray
    ) -> Records:
        """Records of firings (feature, row), with the tokens around and the feature's value at each of them."""
        width, sample, beyond = 2 * self.window + 1, rows["sample"], np.full(self.window, NO_SAMPLE)
        ids, around = np.empty((len(row), width), np.int32), np.zeros((len(row), width), np.float32)
        tokens, samples = (
            np.lib.stride_tricks.sliding_window_view(np.concatenate([beyond, column, beyond]), width)
            for column in (rows["token"], sample)
        )
        for start in range(0, len(row), 8192):
            part = row[start : start + 8192]
            ids[start : start + 8192] = np.where(samples[part] == sample[part, None], tokens[part], -1)
        around[:, self.window] = value
        if self.window and len(row):
            self._fill_around(rows, feature, row, around)
        plain: Any = (rows[name][row] for name in ("index", "sample", "position", "token", "turn", "role"))
        return Records(feature, value, *plain, ids=ids, around=around)

    def _fill_around(
        self, rows: dict[str, np.ndarray], feature: np.ndarray, row: np.ndarray, around: np.ndarray
    ) -> None:
        """Write what each feature does within the window of its record into `around`; the middle is there already."""
        n, k = rows["feature"].shape
        sample, window = rows["sample"], self.window
        # the firings of these features sorted by feature and row: what fires near a record stands beside it
        wanted = np.zeros(self.d_sae, bool)
        wanted[feature] = True
        hit = np.flatnonzero(wanted[rows["feature"].reshape(-1)] & (rows["value"].reshape(-1) != 0))
        hit = hit[order_by(rows["feature"].reshape(-1)[hit])]
        key = rows["feature"].reshape(-1)[hit].astype(np.int64) * n + hit // k
        values = rows["value"].reshape(-1)[hit]
        mine = feature.astype(np.int64) * n + row
        at = np.searchsorted(key, mine)
        for side in (-1, 1):
            # the next firing on this side, and where that is within the window the one after it
            going, step = np.arange(len(row)), 1
            while len(going):
                near = at[going] + side * step
                going, near = (part[(near >= 0) & (near < len(key))] for part in (going, near))
                away = key[near] - mine[going]
                close = np.abs(away) <= window
                going, near, other = going[close], near[close], row[going[close]] + away[close]
                inside = (other >= 0) & (other < n)
                inside &= sample[np.clip(other, 0, n - 1)] == sample[row[going]]
                to = going[inside]
                around[to, window + other[inside] - row[to]] = values[near[inside]]
                step += 1

    def _used(self) -> np.ndarray:
        """Places of records. bool"""
        used = np.ones(len(self.records.feature), bool)
        used[self._free] = False
        return used

    def _put(self, new: Records) -> None:
        """Hold further records, in the places of those that the bounds have risen above."""
        if len(new.feature) > len(self._free):
            held = len(self.records.feature)
            still = self._passes(self.records.feature, self.records.value, mix(self.records.index))
            self._free = np.flatnonzero(~(still & self._used()))
            if len(self._free) < max(len(new.feature), held // 16):
                more = max(len(new.feature) - len(self._free), held // 16)
                for column in self.records:
                    column.resize((held + more, *column.shape[1:]), refcheck=False)
                self._free = np.append(self._free, np.arange(held, held + more))
        places, self._free = np.split(self._free, [len(new.feature)])
        for column, values in zip(self.records, new, strict=True):
            column[places] = values

    def _cut(self) -> Kept:
        """Cut the records to what is kept, sorted."""
        held = np.flatnonzero(self._used())
        all_of = self.records
        keys = all_of.feature[held], all_of.value[held], all_of.index[held], all_of.sample[held]
        kept = keep(*keys, self.top, self.random)
        del keys, all_of
        # column by column, so that what was gathered is freed
        columns, self.records, self._free = list(self.records), Records.none(0), np.zeros(0, np.int64)
        rows = held[kept.rows]
        for number, column in enumerate(columns):
            columns[number] = column[rows]
        self.records = Records(*columns)
        return kept

    # ---- merging, saving ----------------------------------------------------------------------------------------

    def merge(self, other: FeatureTable) -> None:
        """Take in the table of other rows of the same SAE; the result does not depend on the order of merges."""
        for what in ("d_sae", "top", "random", "window", "identity"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                if what == "identity":
                    what = next(k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k))
                    mine, theirs = mine.get(what), theirs.get(what)
                raise DataError(
                    f"these tables do not belong together: {what} is {mine!r} in one and {theirs!r} in the other",
                    hint="merge parts of one index only: same SAE, settings and tokenizer",
                )
        if self.scope.name != other.scope.name:
            raise DataError(f"one table is about {self.scope.name!r}, the other about {other.scope.name!r}")
        self.settle()
        other.settle()
        for low, high in other.spans:
            self._cover(low, high)
        self.n_rows, self.n_tokens = self.n_rows + other.n_rows, self.n_tokens + other.n_tokens
        self._tally.merge(other._tally)
        self.first, self.special = self.first + other.first, self.special + other.special
        self.known = {name: self.known.get(name, False) or held for name, held in {**self.known, **other.known}.items()}
        roles = [*self.roles, *(role for role in other.roles if role not in self.roles)]
        self.roles = roles
        moved = np.array([*(roles.index(role) for role in other.roles), -1], np.int16)
        theirs = other.records.take(other._used())
        self._put(theirs._replace(role=moved[theirs.role]))
        self._cut()
        self._cofiring.merge(other._cofiring)

    def result(self) -> FeatureTable:
        """This table, cut and in the one order that its contents have."""
        self.settle()
        _ = self.histogram  # so that nothing is held twice during the cut
        self._cut()
        roles = sorted(self.roles)
        moved = np.array([*(roles.index(role) for role in self.roles), -1], np.int16)
        self.records = self.records._replace(role=moved[self.records.role])
        self.roles = roles
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table; the same contents are the same bytes."""
        self.result()
        arrays = {f"records/{name}": getattr(self.records, name) for name in Records._fields}
        arrays |= {name: getattr(self, name) for name in ("histogram", "sum", "first", "special")}
        arrays |= dict(zip(("pairs/token", "pairs/feature"), self.pairs, strict=True))
        facts = {name: getattr(self, name) for name in ("n_tokens", "n_rows", "spans", "known", "roles")}
        facts |= {"name": self.name, "scope": self.scope.name, "massive_above": self.scope.massive_above}
        facts |= {name: getattr(self, name) for name in ("d_sae", "top", "random", "window", "identity")}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return save_state(path, KIND, tensors, facts)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a table that was saved."""
        vars(self).update(vars(FeatureTable.open(path)))

    @staticmethod
    def open(path: str | os.PathLike[str]) -> FeatureTable:
        """Read a table that was saved."""
        from hubsae.core.scopes import parse

        tensors, facts = load_state(path, KIND)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        settings = {name: facts[name] for name in ("top", "random", "window", "identity")}
        scope = parse(facts["scope"], facts["massive_above"])
        table = FeatureTable(facts["name"], facts["d_sae"], scope=scope, **settings)
        for name in ("n_tokens", "n_rows", "spans", "known", "roles"):
            setattr(table, name, facts[name])
        table.first, table.special = arrays["first"], arrays["special"]
        table._tally = Tally(table.d_sae, arrays["histogram"], arrays["sum"])
        table._put(Records(*(arrays[f"records/{name}"] for name in Records._fields)))
        table._cofiring = Cofiring.of(arrays["pairs/token"], arrays["pairs/feature"])
        return table


def _widened(column: np.ndarray, width: int) -> np.ndarray:
    """Codes of fewer places padded with nothing at index 0."""
    if column.ndim == 1 or column.shape[1] == width:
        return column
    return np.pad(column, ((0, 0), (0, width - column.shape[1])))


def _joined(spans: list[list[int]]) -> list[list[int]]:
    """Runs of rows in order, those that touch as one."""
    out: list[list[int]] = []
    for low, high in sorted(spans):
        if out and out[-1][1] == low:
            out[-1][1] = high
        else:
            out.append([low, high])
    return out


def _by_feature(
    feature: np.ndarray, width: int, *columns: tuple[np.ndarray, Any]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Columns of at most `width` entries for each feature (sorted), as tables [features, width]; the features first."""
    place = rank_in_group(feature)
    of = feature[place == 0]
    row = np.cumsum(place == 0) - 1
    tables = []
    for column, nothing in columns:
        table = np.full((len(of), width), nothing, column.dtype)
        table[row, place] = column
        tables.append(table)
    return of, tables


def _upper(hashes: np.ndarray) -> np.ndarray:
    """The upper half of hashes: enough to tell most of them apart. int32"""
    return (hashes >> 32).astype(np.int32)
