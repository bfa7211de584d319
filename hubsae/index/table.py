"""The reverse index as an accumulator of a pass: per feature counts, histogram, n-best records with their context.

Of every firing four things are done, all of them by columns: its size goes into a histogram, its value into a sum, and
it is compared with the bounds of its feature: the weakest of the strongest samples kept so far, and the largest hash
of the random ones. Few pass; only for these a context is looked up. Everything is exact and mergeable: counts are
integers, sums are integers of 2^-20, records are an n-best cut (see `best`).
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
from hubsae.index.best import Kept, Records, find_in_run, keep, rank_in_group, rows_that_fit
from hubsae.index.tally import BINS, Cofiring, Tally

KIND = "feature table"
ROWS = 8192
"""Rows taken in at once: half a million records at k 64, so that what the first firings displace is looked up once."""
NO_VALUE, NO_HASH, NO_SAMPLE = np.float32(-np.inf), 2**63 - 1, -(2**63)
POOL = 1 << 16
"""Records held before the first cut."""


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
    ):
        """`identity` says what is indexed (hash of the SAE, tokenizer); states of another one are not merged."""
        if top < 1 or window < 0 or random < 0:
            raise DataError(f"top {top}, random {random}, window {window}: at least 1, 0 and 0 are needed")
        self.name, self.d_sae, self.top, self.random, self.window = name, d_sae, top, random, window
        self.scope, self.identity = scope, dict(identity or {})
        self.rows = max(1, min(rows, rows_that_fit(d_sae) - 2 * window - 1))
        self.columns = tuple(dict.fromkeys([*FeatureTable.columns, *scope.columns]))
        self.context = window
        self.n_tokens, self.n_rows = 0, 0
        self.spans: list[list[int]] = []
        """Runs of rows that were taken in."""
        self.histogram = np.zeros((d_sae, BINS), np.int64)
        self.sum = np.zeros(d_sae)
        self.first, self.special = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.int64)
        self.known: dict[str, bool] = {}
        self.roles: list[str] = []
        self.records = Records.none(2 * window + 1)
        self._tally, self._cofiring = Tally(d_sae), Cofiring()
        self._fresh: list[Records] = []
        self._pool, self._limit = 0, POOL
        # of the strongest samples of each feature so far: value of the strongest token, and which sample
        self._best = np.full((d_sae, top), NO_VALUE)
        self._best_sample = np.full((d_sae, top), NO_SAMPLE, np.int64)
        self._lowest = np.full((d_sae, random), NO_HASH, np.int64)
        """Smallest hashes of each feature's firings."""
        self._read_bound()
        self._rising = True
        self._next: int | None = None
        self._waiting: list[dict[str, np.ndarray]] = []
        self._behind = 0

    # ---- adding -----------------------------------------------------------------------------------------------

    @property
    def count(self) -> np.ndarray:
        """Firings of each feature. [d_sae]"""
        self.settle()
        self._tally.move_to(self.histogram, self.sum)
        return self.histogram.sum(1)

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(hash of the token, feature) of the firings of the tokens drawn, sorted."""
        return self._cofiring.pairs()

    def add(self, block: PassBlock) -> None:
        """Take in a block; blocks come in the order of the rows."""
        codes = block.codes[self.name]
        self.add_codes(codes.indices, codes.values, block.labels, block.start, halo=block.halo, scope=self.scope)

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
            self.settle()
        self._next = start + n
        self._waiting.append(block)
        if not halo:
            self._cover(start, start + n)
            self.n_rows += n
            self.n_tokens += int(counted.sum())
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
        """Take in what waits for its right neighbours, as if none came."""
        if self._waiting:
            self._take_in(last=True)
            self._waiting, self._behind = [], 0

    def _take_in(self, *, last: bool) -> None:
        """Count and compare the waiting rows, all but the last `window`, whose neighbours may still come."""
        width = max(b["feature"].shape[1] for b in self._waiting)
        rows = {
            name: np.concatenate([_widened(b[name], width) for b in self._waiting]) for name in self._waiting[0]
        } if len(self._waiting) > 1 else self._waiting[0]  # fmt: skip
        n = len(rows["index"])
        here = np.arange(self._behind, n if last else n - self.window)
        here = here[rows["counted"][here]]
        if len(here):
            self._count(rows, here)
        kept = max(0, n - 2 * self.window)
        self._waiting = [{name: column[kept:] for name, column in rows.items()}]
        self._behind = n - self.window - kept

    def _count(self, rows: dict[str, np.ndarray], here: np.ndarray) -> None:
        every = len(here) == here[-1] - here[0] + 1
        part = slice(here[0], here[-1] + 1) if every else here
        feature, value = rows["feature"][part], rows["value"][part]
        for table, column in ((self.first, rows["position"][part] == 0), (self.special, rows["special"][part])):
            if column.any():
                chosen = feature[column][value[column] != 0]
                table += np.bincount(chosen, minlength=self.d_sae)
        hashes = mix(rows["index"][part])
        self._cofiring.add(hashes, feature, value)
        if self._tally.full:
            self._tally.move_to(self.histogram, self.sum)
        near: Any = {"hashes": _upper(hashes), "bound_hash": self._near} if self.random else {}
        # while rows come in order a tie always loses to the token before it; otherwise it may win
        found = self._tally.count(feature, value, self._bound, strict=self._rising, **near)
        if not len(found):
            return
        row = found // feature.shape[1]
        flat, size = feature.reshape(-1)[found], value.reshape(-1)[found]
        _, samples = np.unique(rows["sample"][part], return_inverse=True)
        ranks = np.empty(len(hashes), np.int64)
        ranks[np.argsort(hashes)] = np.arange(len(hashes))
        best = find_in_run(flat, size, row, samples.reshape(-1), ranks, self.top, self.random)
        of_row = here[0] + best.row if every else here[best.row]
        hashed = hashes[best.row]
        self._raise_bounds(best.feature, best.value, rows["sample"][of_row], hashed, best.leads, best.drawn)
        still = best.value >= self._bound[best.feature]
        if self.random:
            still |= hashed <= self._bound_hash[best.feature]
        feature, value, of_row = best.feature[still].astype(np.int32), best.value[still], of_row[still]
        self._fresh.append(self._with_context(rows, feature, value, of_row))
        self._pool += len(feature)
        if self._pool > self._limit:
            self._thin()

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

    def _read_bound(self) -> None:
        self._bound = self._best[:, -1].copy()
        self._bound_hash = self._lowest[:, -1].copy() if self.random else np.full(self.d_sae, -1, np.int64)
        self._near = _upper(self._bound_hash)

    def _with_context(
        self, rows: dict[str, np.ndarray], feature: np.ndarray, value: np.ndarray, row: np.ndarray
    ) -> Records:
        """Records of firings (feature, row), with the tokens around and the feature's value at each of them."""
        width = 2 * self.window + 1
        sample, ids = rows["sample"], np.empty((len(row), width), np.int32)
        padded = (np.pad(rows["token"], self.window), np.pad(sample, self.window, constant_values=NO_SAMPLE))
        tokens, samples = (np.lib.stride_tricks.sliding_window_view(column, width) for column in padded)
        for start in range(0, len(row), 8192):
            part = row[start : start + 8192]
            ids[start : start + 8192] = np.where(samples[part] == sample[part, None], tokens[part], -1)
        around = np.zeros((len(row), width), np.float32)
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
        if len(feature) * 32 * window < n * k:
            # few records: look through the codes of the rows around each, a slice at a time, which stays in cache
            for start in range(0, len(feature), 1024):
                part = slice(start, start + 1024)
                for away in (*range(-window, 0), *range(1, window + 1)):
                    other = row[part] + away
                    near = np.flatnonzero((other >= 0) & (other < n))
                    near = near[sample[other[near]] == sample[row[part][near]]]
                    at = other[near]
                    found, place = np.nonzero(rows["feature"][at] == feature[part][near, None])
                    value = rows["value"][at[found], place]
                    # a padded place has the value 0 at index 0, and is no firing
                    fires = value != 0
                    around[start + near[found[fires]], window + away] = value[fires]
            return
        # many: all firings sorted by feature and row, where what fires near a record stands beside it
        wanted = np.zeros(self.d_sae, bool)
        wanted[feature] = True
        hit = np.flatnonzero(wanted[rows["feature"].reshape(-1)] & (rows["value"].reshape(-1) != 0))
        bits = max(1, int(n * k).bit_length())
        packed = ((rows["feature"].reshape(-1)[hit].astype(np.int64) * n + hit // k) << bits) | hit
        packed.sort()
        key, values = packed >> bits, rows["value"].reshape(-1)[packed & ((1 << bits) - 1)]
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

    def _thin(self) -> None:
        """Leave out what the bounds have risen above; where that is little, cut."""
        waiting, before = [self.records, *self._fresh], self._pool + len(self.records.feature)
        self.records, self._fresh = Records.none(2 * self.window + 1), []
        waiting.reverse()
        while waiting:  # one after the other, so that what is left out is freed
            part = waiting.pop()
            still = part.value >= self._bound[part.feature]
            if self.random:
                still |= mix(part.index) <= self._bound_hash[part.feature]
            self._fresh.append(part.take(np.flatnonzero(still)))
        held = sum(len(part.feature) for part in self._fresh)
        if 2 * held > before:
            self._cut()
            held = len(self.records.feature)
        self._pool = sum(len(part.feature) for part in self._fresh)
        self._limit = self._pool + max(POOL, held // 2)

    def _cut(self) -> Kept:
        """Join what came with what is held, and cut to what is kept."""
        parts = [self.records, *self._fresh]
        self._fresh, self._pool = [], 0
        keys = (np.concatenate([getattr(p, name) for p in parts]) for name in ("feature", "value", "index", "sample"))
        kept = keep(*keys, self.top, self.random)
        # column by column, the windows first: they are the most of it, and need not be held twice over
        held = [list(part) for part in parts]
        self.records = Records.none(0)
        del parts
        columns = [_gathered(held, column, kept.rows) for column in reversed(range(len(Records._fields)))]
        self.records = Records(*reversed(columns))
        return kept

    def _read_bounds(self, kept: Kept) -> None:
        """The small tables of the bounds, read off the records."""
        feature = self.records.feature
        self._best[:], self._best_sample[:], self._lowest[:] = NO_VALUE, NO_SAMPLE, NO_HASH
        rank = kept.prompt_rank
        leads = rank >= 0
        self._best[feature[leads], rank[leads]] = self.records.value[leads]
        self._best_sample[feature[leads], rank[leads]] = self.records.sample[leads]
        drawn = kept.random_rank >= 0
        hashes = mix(self.records.index[drawn])
        order = np.lexsort((hashes, feature[drawn]))
        of = feature[drawn][order]
        self._lowest[of, rank_in_group(of)] = hashes[order]
        self._read_bound()

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
        for table in (self, other):
            table._tally.move_to(table.histogram, table.sum)
        for low, high in other.spans:
            self._cover(low, high)
        self.n_rows, self.n_tokens = self.n_rows + other.n_rows, self.n_tokens + other.n_tokens
        self.histogram, self.sum = self.histogram + other.histogram, self.sum + other.sum
        self.first, self.special = self.first + other.first, self.special + other.special
        self.known = {name: self.known.get(name, False) or held for name, held in {**self.known, **other.known}.items()}
        roles = [*self.roles, *(role for role in other.roles if role not in self.roles)]
        self.roles = roles
        moved = np.array([*(roles.index(role) for role in other.roles), -1], np.int16)
        for part in [other.records, *other._fresh]:
            self._fresh.append(part._replace(role=moved[part.role]))
        self._read_bounds(self._cut())
        self._cofiring.merge(other._cofiring)

    def result(self) -> FeatureTable:
        """This table, cut and in the one order that its contents have."""
        self.settle()
        self._cut()
        self._tally.move_to(self.histogram, self.sum)
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
        for name in ("histogram", "sum", "first", "special"):
            setattr(table, name, arrays[name])
        table.records = Records(*(arrays[f"records/{name}"] for name in Records._fields))
        table._cofiring = Cofiring.of(arrays["pairs/token"], arrays["pairs/feature"])
        table._read_bounds(table._cut())
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


def _gathered(parts: list[list[np.ndarray]], column: int, rows: np.ndarray) -> np.ndarray:
    """These rows of a column of all parts, which is taken out of them."""
    whole = [part[column] for part in parts]
    out = np.empty((len(rows), *whole[0].shape[1:]), whole[0].dtype)
    start = 0
    for part, values in zip(parts, whole, strict=True):
        here = np.flatnonzero((rows >= start) & (rows < start + len(values)))
        out[here] = values[rows[here] - start]
        start += len(values)
        part[column] = values[:0].copy()
    return out


def _upper(hashes: np.ndarray) -> np.ndarray:
    """The upper half of hashes: enough to tell most of them apart. int32"""
    return (hashes >> 32).astype(np.int32)
