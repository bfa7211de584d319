"""What one pass over activations adds up, for any number of SAEs at once; states merge exactly.

Per block of rows the encoder's product dominates; everything else works on the few active latents or on
per-row numbers. Sums are kept per (group, cell): the scopes are unions of cells, the bootstrap resamples
groups, and both are read off the same sums afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hubsae.core.codes import SparseCodes
from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.evals.blocks import BLOCK_ROWS, CELLS, GROUPS, SCOPE_CELLS, Block, Labels
from hubsae.evals.sums import CompensatedSum, FixedPointSum

KEYS = GROUPS * CELLS
# Per-row numbers of one SAE, summed per key, in this order.
ROW_STATS = ("sse", "cosine", "l2_ratio", "dot", "norm2_hat", "l0", "l1")
# Norms are binned at this many bins per doubling: 1.1 % wide, from which deciles are read.
BINS_PER_OCTAVE = 64
# An SAE sees at most this many pre-activations at once; a power of two of rows, so blocks divide evenly.
PRE_ACTIVATIONS = 1 << 25
# Float64 copies of this many numbers of x̂ and of the error (2 MB each) stay in cache; of a whole block they would not.
CACHED = 1 << 18


def rows_at_once(d_sae: int, block_rows: int) -> int:
    """Rows of a block that an SAE of this width encodes in one go; a function of the width alone."""
    rows = block_rows
    while rows > 64 and rows * d_sae > PRE_ACTIVATIONS:
        rows //= 2
    return rows


def sum_rows(values: Tensor, key: Tensor, keys: int) -> Tensor:
    """Sum rows of `values` [n, m] by `key` [n] in float64 and in a fixed order. [keys, m]"""
    if values.device.type == "cpu":
        return values.new_zeros(keys, values.shape[1]).index_add_(0, key, values)
    # index_add_ on a GPU adds in no fixed order; a product with the one-hot matrix does
    one_hot = torch.zeros(keys, values.shape[0], dtype=values.dtype, device=values.device)
    one_hot[key, torch.arange(values.shape[0], device=values.device)] = 1
    return one_hot @ values


def scope_keys(name: str) -> Tensor:
    """Rows of the per-key sums that make up a scope."""
    cells = torch.tensor(SCOPE_CELLS[name])
    return (torch.arange(GROUPS)[:, None] * CELLS + cells).reshape(-1)


class InputSums:
    """Sums over the activations themselves, shared by all SAEs of a pass."""

    def __init__(self, d: int):
        self.n = torch.zeros(KEYS, dtype=torch.int64)
        self.known_positions = 0
        self.known_samples = 0
        self.sum_x = CompensatedSum(KEYS, d)
        self.norm2 = CompensatedSum(KEYS)
        self.bins: dict[tuple[int, int], int] = {}
        self.bin_n = torch.zeros(0, dtype=torch.int64)
        self.bin_norm2 = CompensatedSum(0)
        self.bin_x = CompensatedSum(0, d)

    def slots(self, keys: list[tuple[int, int]]) -> Tensor:
        """Row of each (first position?, norm bin), making room for new ones."""
        for key in keys:
            self.bins.setdefault(key, len(self.bins))
        have = len(self.bins)
        if have > self.bin_n.shape[0]:
            self.bin_n = torch.cat([self.bin_n, self.bin_n.new_zeros(have - self.bin_n.shape[0])])
            self.bin_norm2.grown(have)
            self.bin_x.grown(have)
        return torch.tensor([self.bins[key] for key in keys], dtype=torch.int64)

    def merge(self, other: InputSums) -> None:
        """Add the sums of other rows."""
        self.n += other.n
        self.known_positions += other.known_positions
        self.known_samples += other.known_samples
        self.sum_x.merge(other.sum_x)
        self.norm2.merge(other.norm2)
        rows = self.slots(list(other.bins))
        self.bin_n[rows] += other.bin_n
        for part in range(3):
            self.bin_norm2.add(other.bin_norm2.parts[part], rows)
            self.bin_x.add(other.bin_x.parts[part], rows)


class SAESums:
    """Sums of one SAE over the same rows."""

    def __init__(self, d: int, d_sae: int):
        self.d_sae = d_sae
        self.stats = CompensatedSum(KEYS, len(ROW_STATS))
        self.error = CompensatedSum(CELLS, d)
        self.fired = torch.zeros(CELLS, d_sae, dtype=torch.int64)
        self.sum_z = FixedPointSum(d_sae)
        self.max_z = torch.zeros(d_sae)
        self.bin_sse = CompensatedSum(0)

    def merge(self, other: SAESums, slots: Tensor) -> None:
        """Add the sums of other rows; `slots` is where the other's norm bins lie here."""
        self.stats.merge(other.stats)
        self.error.merge(other.error)
        self.fired = self.fired.cpu() + other.fired.cpu()
        self.sum_z.merge(other.sum_z)
        self.max_z = torch.maximum(self.max_z.cpu(), other.max_z.cpu())
        self.bin_sse.grown(int(slots.max()) + 1 if slots.numel() else 0)
        for part in range(3):
            self.bin_sse.add(other.bin_sse.parts[part], slots)


class Sums:
    """The state of a pass: add blocks, merge with other ranks or shards, read the result.

    >>> from hubsae import HubSAE, SAEConfig
    >>> from hubsae.evals.blocks import iter_blocks, read_pieces
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> pieces, labels, d = read_pieces(torch.randn(100, 4))
    >>> sums = Sums({"a": sae}, d, labels)
    >>> for block in iter_blocks(pieces):
    ...     sums.add(block, {"a": sae})
    >>> int(sums.inputs.n.sum())
    100
    """

    def __init__(self, saes: Mapping[str, SAE], d: int, labels: Labels):
        for name, sae in saes.items():
            if sae.d_in != d:
                raise DataError(
                    f"activations have width {d}, SAE {name!r} takes {sae.d_in}",
                    hint="are these the activations of its model and hook point?",
                )
        self.d = d
        self.labels = labels
        self.inputs = InputSums(d)
        self.saes = {name: SAESums(d, sae.d_sae) for name, sae in saes.items()}

    @torch.no_grad()
    def add(self, block: Block, saes: Mapping[str, SAE]) -> None:
        """Add one block of rows, encoded by every SAE."""
        key = block.group * CELLS + block.cell
        keys, where = torch.unique(key, return_inverse=True)
        self.inputs.n.index_add_(0, key, torch.ones_like(key))
        self.inputs.known_positions += block.known_positions
        self.inputs.known_samples += block.known_samples
        wide: dict[torch.device, _Rows] = {}
        bins = Tensor()
        for name, sae in saes.items():
            rows = wide.get(sae.device)
            if rows is None:
                rows = _Rows(block, sae.device, where)
                if not wide:
                    bins = self._add_inputs(rows, block, keys)
                wide[sae.device] = rows
            self._add_sae(self.saes[name], sae, name, rows, block, keys, bins)

    def _add_inputs(self, rows: _Rows, block: Block, keys: Tensor) -> Tensor:
        """Sums over x; returns the norm-bin slot of each row."""
        bad = ~torch.isfinite(rows.norm2)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise DataError(
                f"activations hold NaN or infinity: row {block.start + first} is the first, "
                f"{int(bad.sum())} of the {bad.numel()} rows of its block",
                hint="harvest them again, or drop these rows; float16 storage overflows above 65504",
            )
        inputs = self.inputs
        inputs.sum_x.add(sum_rows(rows.x, rows.where, len(keys)), keys)
        inputs.norm2.add(sum_rows(rows.norm2[:, None], rows.where, len(keys))[:, 0], keys)
        # floor of BINS·log2‖x‖; an all-zero token has a bin of its own far below
        log = torch.log2(rows.norm2.clamp_min(1e-60)).mul(BINS_PER_OCTAVE / 2).floor().long().cpu()
        pair = log * 2 + (block.cell >= 3)
        found, inverse = torch.unique(pair, return_inverse=True)
        slots = inputs.slots([(int(p) % 2, int(p) // 2) for p in found])
        inputs.bin_n[slots] += torch.bincount(inverse, minlength=len(found))
        inverse_here = inverse.to(rows.x.device)
        inputs.bin_x.add(sum_rows(rows.x, inverse_here, len(found)), slots)
        inputs.bin_norm2.add(sum_rows(rows.norm2[:, None], inverse_here, len(found))[:, 0], slots)
        self._bin_slots = slots
        return inverse

    def _add_sae(
        self, sums: SAESums, sae: SAE, name: str, rows: _Rows, block: Block, keys: Tensor, bins: Tensor
    ) -> None:
        device = rows.x.device
        n = rows.x.shape[0]
        step = rows_at_once(sae.d_sae, BLOCK_ROWS)
        stats = torch.empty(n, len(ROW_STATS), dtype=torch.float64, device=device)
        error = torch.zeros(CELLS, self.d, dtype=torch.float64, device=device)
        if sums.fired.device != device:
            sums.fired, sums.max_z = sums.fired.to(device), sums.max_z.to(device)
        for start in range(0, n, step):
            part = slice(start, start + step)
            codes = sae.encode_sparse(rows.source[part], sorted=False)
            _add_errors(rows, part, sae.decode(codes), stats[part], error)
            z = codes.values.double()
            stats[part, 5] = codes.l0().double()
            stats[part, 6] = z.abs().sum(1)
            _add_codes(sums, codes, z, rows.cell[part])
        _fill_stats(stats, rows.norm2)
        if not bool(torch.isfinite(stats).all()):
            raise DataError(
                f"SAE {name!r} returns NaN or infinity on finite activations (block from row {block.start})",
                hint="check its weights: sae.W_enc.isfinite().all()",
            )
        sums.stats.add(sum_rows(stats, rows.where, len(keys)), keys)
        sums.error.add(error)
        sums.bin_sse.grown(len(self.inputs.bins))
        bin_sse = sum_rows(stats[:, :1], bins.to(device), len(self._bin_slots))[:, 0]
        sums.bin_sse.add(bin_sse, self._bin_slots)

    def scopes(self) -> list[str]:
        """Scopes that the rows seen so far can be told into; one that is all of them is not named twice."""
        n = {name: int(self.inputs.n[scope_keys(name)].sum()) for name in SCOPE_CELLS}
        names = ["all"]
        by_position = self.inputs.known_positions > 0
        by_part = self.labels.is_prompt and n["prompt"] > 0 and n["response"] > 0
        names += ["no_position_0", "position_0"] if by_position else []
        names += ["prompt", "response"] if by_part else []
        names += ["prompt_no_position_0"] if by_position and by_part else []
        return [name for name in names if n[name]]

    def merge(self, other: Sums) -> None:
        """Add the state of another rank or shard: same SAEs, other rows."""
        if list(self.saes) != list(other.saes) or self.d != other.d or self.labels != other.labels:
            raise DataError(
                "cannot merge evaluations of different SAEs, widths or label columns: "
                f"{list(self.saes)} with {self.labels} and {list(other.saes)} with {other.labels}"
            )
        self.inputs.merge(other.inputs)
        slots = self.inputs.slots(list(other.inputs.bins))
        for name, sums in self.saes.items():
            # an SAE's bins may lag behind the inputs' when a shard saw no new norms
            theirs = other.saes[name]
            theirs.bin_sse.grown(len(other.inputs.bins))
            sums.bin_sse.grown(len(self.inputs.bins))
            sums.merge(theirs, slots)

    def gather(self) -> Sums:
        """With torch.distributed running: the merged state of all ranks, on every rank."""
        import torch.distributed as dist

        states: list[Any] = [None] * dist.get_world_size()
        for sums in self.saes.values():
            sums.fired, sums.max_z = sums.fired.cpu(), sums.max_z.cpu()
            sums.sum_z.limbs = sums.sum_z.limbs.cpu()
        dist.all_gather_object(states, self)
        merged = states[0]
        for state in states[1:]:
            merged.merge(state)
        return merged


class _Rows:
    """A block on one device, in the type it came in and in float64."""

    def __init__(self, block: Block, device: torch.device, where: Tensor):
        self.source = block.x.to(device)
        if self.source.dtype not in (torch.float32, torch.float64):
            self.source = self.source.float()
        self.x = self.source.double()
        self.norm2 = squared_norms(self.x)
        self.where = where.to(device)
        self.cell = block.cell.to(device)


def _add_errors(rows: _Rows, part: slice, x_hat: Tensor, stats: Tensor, error: Tensor) -> None:
    """Write ‖x − x̂‖² and ‖x̂‖² of the rows of a part into `stats`, and add x − x̂ up by cell. All in float64."""
    x, cell = rows.x[part], rows.cell[part]
    few = max(1, CACHED // x.shape[1]) if x.device.type == "cpu" else x.shape[0]
    wide, e = (torch.empty(few, x.shape[1], dtype=torch.float64, device=x.device) for _ in range(2))
    for start in range(0, x.shape[0], few):
        here = slice(start, start + few)
        n = x[here].shape[0]
        torch.sub(x[here], wide[:n].copy_(x_hat[here]), out=e[:n])
        stats[here, 0] = squared_norms(e[:n])
        stats[here, 4] = squared_norms(wide[:n])
        error += sum_rows(e[:n], cell[here], CELLS)


def squared_norms(rows: Tensor) -> Tensor:
    """‖row‖² of each row; the norm is one pass over memory where a product and its sum are three. [rows]"""
    return torch.linalg.vector_norm(rows, dim=1).square_()


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


def _add_codes(sums: SAESums, codes: SparseCodes, z: Tensor, cell: Tensor) -> None:
    """Count firings per cell, and add up and compare activations `z`, of the latents that fire."""
    latents = codes.indices.long()
    slots = latents + (cell * sums.d_sae)[:, None]
    active = z != 0
    if not bool(active.all()):
        latents, slots, z = latents[active], slots[active], z[active]
    sums.fired += torch.bincount(slots.view(-1), minlength=sums.fired.numel()).view_as(sums.fired)
    sums.sum_z.add(latents.view(-1), z.view(-1))
    sums.max_z.scatter_reduce_(0, latents.view(-1), z.view(-1).float(), "amax")
