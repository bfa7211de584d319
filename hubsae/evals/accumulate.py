"""What reconstruction metrics need of a pass, added up for any number of SAEs at once; states merge exactly.

Per block the encoder's product dominates; everything here works on the few active latents or on per-row numbers. A row
belongs to some of the scopes and not to others: rows that belong to the same ones are a cell. Sums are kept per (cell,
group), so a scope is a union of cells, the bootstrap resamples groups, and both are read off the same sums afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.splits import GOLDEN, mixed
from hubsae.activations.stats import norm_bin
from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.core.scopes import Scope, parse
from hubsae.evals.passes import PassBlock, load_state, save_state, squared_norms
from hubsae.evals.sums import CompensatedSum, FixedPointSum

GROUPS = 128
"""Groups that whole samples fall into for the bootstrap."""
RUN_ROWS = 64
"""Without sample ids, runs of this many consecutive rows stay in one group."""
# Per-row numbers of one SAE, summed per key, in this order.
ROW_STATS = ("sse", "cosine", "l2_ratio", "dot", "norm2_hat", "l0", "l1", "relative")
BY_SEQUENCE = ("sse", "l0")
"""Those that are averaged over sequences too."""
# Float64 copies of this many numbers of x̂ and of the error (2 MB each) stay in cache; of a whole block they would not.
CACHED = 1 << 18
ALL, NOT_FIRST, FIRST = "all", "not position_0", "position_0"
USUAL = {
    ALL: (),
    NOT_FIRST: ("position",),
    FIRST: ("position",),
    "prompt": ("is_prompt",),
    "response": ("is_prompt",),
    "prompt & not position_0": ("is_prompt", "position"),
}
"""Scopes that are reported wherever their columns are there."""


def usual_scopes(columns: Sequence[str]) -> list[Scope]:
    """The usual scopes that these label columns allow.

    >>> [s.name for s in usual_scopes(("position",))]
    ['all', 'not position_0', 'position_0']
    """
    return [parse(name) for name, needed in USUAL.items() if set(needed) <= set(columns)]


def sum_rows(values: Tensor, key: Tensor, keys: int) -> Tensor:
    """Sum rows of `values` [n, m] by `key` [n] in float64 and in a fixed order. [keys, m]"""
    if values.device.type == "cpu":
        return values.new_zeros(keys, values.shape[1]).index_add_(0, key, values)
    # index_add_ on a GPU adds in no fixed order; a product with the one-hot matrix does
    one_hot = torch.zeros(keys, values.shape[0], dtype=values.dtype, device=values.device)
    one_hot[key, torch.arange(values.shape[0], device=values.device)] = 1
    return one_hot @ values


def mix(ids: np.ndarray) -> np.ndarray:
    """A fixed hash of int64 ids to non-negative int64 (the splitmix64 finaliser).

    >>> mix(np.array([0, 1, 2])).tolist() == mix(np.array([0, 1, 2])).tolist()
    True
    """
    with np.errstate(over="ignore"):
        start = ids.astype(np.uint64) + np.uint64(GOLDEN)
    return (mixed(start) >> np.uint64(1)).astype(np.int64)


class Places:
    """Rows of growing tables, by key, in the order in which the keys were met."""

    def __init__(self, keys: Sequence[Any] = ()):
        self.of: dict[Any, int] = {key: n for n, key in enumerate(keys)}

    def __call__(self, keys: Sequence[Any]) -> Tensor:
        """The row of each key; new keys get the next ones."""
        return torch.tensor([self.of.setdefault(key, len(self.of)) for key in keys], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.of)


class InputSums:
    """Sums over the activations themselves, shared by all SAEs of a pass."""

    def __init__(self, d: int):
        self.n = torch.zeros(0, dtype=torch.int64)
        self.largest = torch.zeros(0, dtype=torch.float64)
        """Largest ‖x‖² by cell."""
        self.known = {"position": 0, "sample_id": 0}
        """Rows whose position, whose sample is known; a writer that does not know it stores -1."""
        self.sum_x, self.norm2 = CompensatedSum(0, d), CompensatedSum(0)
        self.bin_n = torch.zeros(0, dtype=torch.int64)
        self.bin_norm2, self.bin_x = CompensatedSum(0), CompensatedSum(0, d)
        self.sequence_n = torch.zeros(0, dtype=torch.int64)

    def grow(self, cells: int, bins: int, sequences: int) -> None:
        """Make room."""
        self.n, self.bin_n = _grown(self.n, cells * GROUPS), _grown(self.bin_n, bins)
        self.sequence_n, self.largest = _grown(self.sequence_n, sequences), _grown(self.largest, cells)
        self.sum_x.grown(cells * GROUPS)
        self.norm2.grown(cells * GROUPS)
        self.bin_norm2.grown(bins)
        self.bin_x.grown(bins)


class SAESums:
    """Sums of one SAE over the same rows."""

    def __init__(self, d: int, d_sae: int):
        self.d_sae = d_sae
        self.stats = CompensatedSum(0, len(ROW_STATS))
        self.error = CompensatedSum(0, d)
        self.fired = torch.zeros(0, d_sae, dtype=torch.int64)
        self.sum_z = FixedPointSum(d_sae)
        self.max_z = torch.zeros(d_sae)
        self.bin_sse = CompensatedSum(0)
        self.sequence = CompensatedSum(0, len(BY_SEQUENCE))

    def grow(self, cells: int, bins: int, sequences: int) -> None:
        """Make room."""
        self.stats.grown(cells * GROUPS)
        self.error.grown(cells)
        self.fired = _grown(self.fired, cells)
        self.bin_sse.grown(bins)
        self.sequence.grown(sequences)


def _grown(table: Tensor, rows: int) -> Tensor:
    more = rows - table.shape[0]
    return torch.cat([table, table.new_zeros(more, *table.shape[1:])]) if more > 0 else table


class Sums:
    """The sums behind the accumulator of reconstruction metrics (`read_off.Reconstruction`): add, merge, save, load."""

    def __init__(self, saes: Mapping[str, SAE], columns: Sequence[str] = (), scopes: Sequence[Scope] = ()):
        """`columns` are the label columns there are, from which the usual scopes follow; `scopes` are asked for."""
        self.asked = {scope.name for scope in scopes}
        self.scopes = list({scope.name: scope for scope in [*usual_scopes(columns), *scopes]}.values())
        if len(self.scopes) > 62:
            raise DataError(f"{len(self.scopes)} scopes at once are too many", hint="measure them in several passes")
        self.names = [scope.name for scope in self.scopes]
        self.models = dict(saes)
        self.d = next(iter(saes.values())).config.width_out
        self.inputs = InputSums(self.d)
        self.saes = {name: SAESums(self.d, sae.d_sae) for name, sae in saes.items()}
        self.cells, self.bins, self.samples = Places(), Places(), Places()
        needed = [c for scope in self.scopes for c in scope.columns]
        self.columns = tuple(dict.fromkeys([*needed, "position", "sample_id"]))

    # ---- adding ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, block: PassBlock) -> None:
        """Add one block of rows, encoded by every SAE."""
        n = len(block)
        position, sample = (block.labels.get(c) for c in ("position", "sample_id"))
        member = np.zeros(n, dtype=np.int64)
        for bit, scope in enumerate(self.scopes):
            member |= scope.mask(block.labels, n).astype(np.int64) << bit
        patterns, of_row = np.unique(member, return_inverse=True)
        cell = self.cells(patterns.tolist())[torch.from_numpy(of_row)]
        runs = np.arange(block.start, block.start + n) // RUN_ROWS
        group = runs if sample is None else np.where(sample >= 0, mix(sample), runs)
        key = cell * GROUPS + torch.from_numpy(group % GROUPS)
        keys, where = torch.unique(key, return_inverse=True)
        norm2 = block.expected(next(iter(self.models.values())).device)[2].cpu()
        log = torch.from_numpy(norm_bin(norm2.sqrt().numpy()))
        first = torch.zeros(n, dtype=torch.int64) if position is None else torch.from_numpy(position == 0).long()
        found, in_bin = torch.unique(log * 2 + first, return_inverse=True)
        slots = self.bins([(int(p) % 2, int(p) // 2) for p in found])
        sequence, in_sequence = self._sequences(sample, cell)
        sizes = len(self.cells), len(self.bins), len(self.samples)
        inputs = self.inputs
        inputs.grow(*sizes)
        inputs.n.index_add_(0, key, torch.ones_like(key))
        inputs.largest.scatter_reduce_(0, cell, norm2, "amax")
        inputs.bin_n[slots] += torch.bincount(in_bin, minlength=len(slots))
        if len(sequence):
            inputs.sequence_n[sequence] += torch.bincount(in_sequence, minlength=len(sequence))
        for name, column in (("position", position), ("sample_id", sample)):
            inputs.known[name] += 0 if column is None else int((column >= 0).sum())
        for number, (name, sae) in enumerate(self.models.items()):
            source, wide, squares = block.expected(sae.device)
            here, bin_here = where.to(sae.device), in_bin.to(sae.device)
            if number == 0:
                inputs.sum_x.add(sum_rows(wide, here, len(keys)), keys)
                inputs.norm2.add(sum_rows(squares[:, None], here, len(keys))[:, 0], keys)
                inputs.bin_x.add(sum_rows(wide, bin_here, len(slots)), slots)
                inputs.bin_norm2.add(sum_rows(squares[:, None], bin_here, len(slots))[:, 0], slots)
            sums = self.saes[name]
            sums.grow(*sizes)
            stats = self._row_stats(sums, sae, block, name, source, wide, squares, cell.to(sae.device))
            sums.stats.add(sum_rows(stats, here, len(keys)), keys)
            sums.bin_sse.add(sum_rows(stats[:, :1], bin_here, len(slots))[:, 0], slots)
            if len(sequence):
                chosen = stats[:, [ROW_STATS.index(c) for c in BY_SEQUENCE]]
                sums.sequence.add(sum_rows(chosen, in_sequence.to(sae.device), len(sequence)), sequence)

    def _sequences(self, sample: np.ndarray | None, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables by (sample, cell), and which of them each row of the block is in."""
        if sample is None or not (sample >= 0).all():
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        pairs, inverse = np.unique(np.stack([sample, cell.numpy()], 1), axis=0, return_inverse=True)
        return self.samples([(int(s), int(c)) for s, c in pairs]), torch.from_numpy(inverse.reshape(-1))

    def _row_stats(
        self, sums: SAESums, sae: SAE, block: PassBlock, name: str, x: Tensor, wide: Tensor, norm2: Tensor, cell: Tensor
    ) -> Tensor:
        """The ROW_STATS of each row; latents and errors are added up on the way. [rows, len(ROW_STATS)]"""
        codes = block.codes[name]
        stats = torch.empty(len(x), len(ROW_STATS), dtype=torch.float64, device=x.device)
        error = torch.zeros(sums.error.parts.shape[1], self.d, dtype=torch.float64, device=x.device)
        _add_errors(wide, cell, sae.decode(codes), stats, error)
        z = codes.values.double()
        stats[:, 5] = codes.l0().double()
        stats[:, 6] = z.abs().sum(1)
        _fill_stats(stats, norm2)
        if not bool(torch.isfinite(stats).all()):
            raise DataError(
                f"SAE {name!r} returns NaN or infinity on finite activations (block from row {block.start})",
                hint="check its weights: sae.W_enc.isfinite().all()",
            )
        if sums.fired.device != x.device:
            sums.fired, sums.max_z = sums.fired.to(x.device), sums.max_z.to(x.device)
        _add_codes(sums, codes.indices.long(), z, cell)
        sums.error.add(error)
        return stats

    # ---- merging, saving --------------------------------------------------------------------------------------

    def merge(self, other: Sums) -> None:
        """Add the state of another rank or shard: same SAEs and scopes, other rows."""
        if list(self.saes) != list(other.saes) or self.d != other.d or self.names != other.names:
            raise DataError(
                "cannot merge evaluations of different SAEs, widths or scopes: "
                f"{list(self.saes)} in {self.names} and {list(other.saes)} in {other.names}"
            )
        cell, slots = self.cells(list(other.cells.of)), self.bins(list(other.bins.of))
        cells = cell.tolist()
        sequence = self.samples([(sample, cells[c]) for sample, c in other.samples.of])
        keys = (cell[:, None] * GROUPS + torch.arange(GROUPS)).reshape(-1)
        sizes = len(self.cells), len(self.bins), len(self.samples)
        there = len(other.cells), len(other.bins), len(other.samples)
        mine, theirs = self.inputs, other.inputs
        mine.grow(*sizes)
        theirs.grow(*there)
        mine.n[keys] += theirs.n
        mine.largest[cell] = torch.maximum(mine.largest[cell], theirs.largest)
        mine.bin_n[slots] += theirs.bin_n
        mine.sequence_n[sequence] += theirs.sequence_n
        mine.known = {name: mine.known[name] + theirs.known[name] for name in mine.known}
        mine.sum_x.merge(theirs.sum_x, keys)
        mine.norm2.merge(theirs.norm2, keys)
        mine.bin_norm2.merge(theirs.bin_norm2, slots)
        mine.bin_x.merge(theirs.bin_x, slots)
        for name, sums in self.saes.items():
            one = other.saes[name]
            sums.grow(*sizes)
            one.grow(*there)
            sums.stats.merge(one.stats, keys)
            sums.error.merge(one.error, cell)
            sums.fired = sums.fired.cpu()
            sums.fired[cell] += one.fired.cpu()
            sums.sum_z.merge(one.sum_z)
            sums.max_z = torch.maximum(sums.max_z.cpu(), one.max_z.cpu())
            sums.bin_sse.merge(one.bin_sse, slots)
            sums.sequence.merge(one.sequence, sequence)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state."""
        places = {"cells": list(self.cells.of), "bins": list(self.bins.of), "samples": list(self.samples.of)}
        facts = {"d": self.d, "scopes": self.names, "known": self.inputs.known, "saes": list(self.saes), **places}
        return save_state(path, "reconstruction", {k: getattr(o, a) for k, o, a in self._tensors()}, facts)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a saved state of the same SAEs and scopes."""
        tensors, facts = load_state(path, "reconstruction")
        found = facts["d"], facts["scopes"], facts["saes"]
        if found != (self.d, self.names, list(self.saes)):
            raise DataError(f"{path} is a state of {found[2]} in {found[1]}, not of {list(self.saes)} in {self.names}")
        self.inputs.known = facts["known"]
        self.cells = Places(facts["cells"])
        self.bins, self.samples = (Places([tuple(key) for key in facts[name]]) for name in ("bins", "samples"))
        for key, owner, attribute in self._tensors():
            setattr(owner, attribute, tensors[key])

    def _tensors(self) -> list[tuple[str, Any, str]]:
        """Every tensor of the state: its name in a file, and where it is held."""
        out: list[tuple[str, Any, str]] = []
        for prefix, owner in (("inputs", self.inputs), *((f"saes/{name}", sums) for name, sums in self.saes.items())):
            for attribute, value in vars(owner).items():
                if isinstance(value, Tensor):
                    out.append((f"{prefix}/{attribute}", owner, attribute))
                elif isinstance(value, (CompensatedSum, FixedPointSum)):
                    out.append((f"{prefix}/{attribute}", value, "parts"))
        return out

    def __getstate__(self) -> dict[str, Any]:
        # what travels between ranks is the sums, on the processor
        for sums in self.saes.values():
            sums.fired, sums.max_z = sums.fired.cpu(), sums.max_z.cpu()
            sums.sum_z.parts = sums.sum_z.parts.cpu()
        return {name: value for name, value in vars(self).items() if name != "models"}


def _add_errors(x: Tensor, cell: Tensor, x_hat: Tensor, stats: Tensor, error: Tensor) -> None:
    """Write ‖x − x̂‖² and ‖x̂‖² of each row into `stats`, and add x − x̂ up by cell. All in float64."""
    few = max(1, CACHED // x.shape[1]) if x.device.type == "cpu" else x.shape[0]
    wide, e = (torch.empty(few, x.shape[1], dtype=torch.float64, device=x.device) for _ in range(2))
    for start in range(0, x.shape[0], few):
        here = slice(start, start + few)
        n = x[here].shape[0]
        torch.sub(x[here], wide[:n].copy_(x_hat[here]), out=e[:n])
        stats[here, 0] = squared_norms(e[:n])
        stats[here, 4] = squared_norms(wide[:n])
        error += sum_rows(e[:n], cell[here], error.shape[0])


def _fill_stats(stats: Tensor, norm2: Tensor) -> None:
    """Cosine, ratio of norms and x·x̂ of each row, from ‖x‖², ‖x̂‖² and ‖x − x̂‖²."""
    sse, norm2_hat = stats[:, 0], stats[:, 4]
    # the law of cosines is exact to a few units of float64 of the larger square; float32 reconstructions are not
    dot = torch.where(norm2_hat > 0, (norm2 + norm2_hat - sse) / 2, 0.0)
    norms = (norm2 * norm2_hat).sqrt()
    # a zero vector has no direction: counted as 0, so that the mean stays defined
    stats[:, 1] = torch.where(norms > 0, dot / norms, 0.0)
    stats[:, 2] = torch.where(norm2 > 0, (norm2_hat / norm2).sqrt(), 0.0)
    stats[:, 3] = dot
    stats[:, 7] = torch.where(norm2 > 0, (sse / norm2).sqrt(), 0.0)


def _add_codes(sums: SAESums, latents: Tensor, z: Tensor, cell: Tensor) -> None:
    """Count firings per cell, and add up and compare activations `z`, of the latents that fire."""
    slots = latents + (cell * sums.d_sae)[:, None]
    active = z != 0
    if not bool(active.all()):
        latents, slots, z = latents[active], slots[active], z[active]
    sums.fired += torch.bincount(slots.view(-1), minlength=sums.fired.numel()).view_as(sums.fired)
    sums.sum_z.add(latents.view(-1), z.view(-1))
    sums.max_z.scatter_reduce_(0, latents.view(-1), z.view(-1).float(), "amax")
