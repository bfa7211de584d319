"""One pass over activations for any number of readers: rows are read once, encoded once per SAE, and handed on.

    data -> blocks of 4,096 rows -> codes of every SAE -> accumulator.add(block), ...

What is summed, kept or drawn from a pass is an accumulator; reconstruction metrics, validation while training and the
reverse index are three of them. Batches are only a way to read: a matrix product of 100 rows and one of 4,096 may
round differently, and a batch rule selects differently, so SAEs always see the same blocks of consecutive rows. A rank
takes a run of whole blocks.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.activation_set import Batch
from hubsae.activations.dataset import Labelled
from hubsae.activations.ranks import Ranks
from hubsae.core.codes import SparseCodes
from hubsae.core.errors import DataError, FormatError
from hubsae.core.files import atomic_path, read_json, write_json_atomic
from hubsae.core.progress import progress
from hubsae.core.sae import SAE

BLOCK_ROWS = 4096
"""Rows of a block. Part of a number only for SAEs that select over a batch."""
PART_BLOCKS = 64
"""Blocks of a part, 262,144 rows: what one of many tasks does whole or not at all ..."""
MOST_PARTS = 512
"""... or more, where these would be more parts: each leaves a state, and the last step reads them all."""
# An SAE sees at most this many pre-activations at once; a power of two of rows, so blocks divide evenly.
PRE_ACTIVATIONS = 1 << 25
NORM = "norm"
"""The label column that a pass computes itself: the norm of each vector."""
DECISIONS = "decisions.json"


@dataclass
class PassBlock:
    """Consecutive rows, what every SAE makes of them, and their labels."""

    x: Tensor
    """[rows, d], as stored or float32"""
    labels: dict[str, np.ndarray]
    """[rows] each, as many columns as were asked for and are there"""
    start: int
    """Index of the first row in the whole table."""
    codes: dict[str, SparseCodes] = field(default_factory=dict)
    """By name of the SAE, on its device."""
    halo: bool = False
    """Rows beside the part of this rank, shown as context only."""
    target: Tensor | None = None
    """[rows, d_out], what transcoders predict, where the data are pairs"""
    _held: dict[Any, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.x.shape[0]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The rows on a device: as an SAE takes them, in float64, and their squared norms."""
        return self._on(device, "x", self.x)

    def expected(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The same of what SAEs are to give back: the rows themselves, or of pairs the target."""
        return self.on(device) if self.target is None else self._on(device, "target", self.target)

    def _on(self, device: torch.device, name: str, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if (name, device) not in self._held:
            x = rows.to(device)
            x = x if x.dtype in (torch.float32, torch.float64) else x.float()
            wide = x.double()
            self._held[name, device] = x, wide, squared_norms(wide)
        return self._held[name, device]


@runtime_checkable
class Accumulator(Protocol):
    """What a pass feeds: it adds blocks up, merges with another of its kind, and reads the result off.

    `columns` names the label columns it can use; those that the data lack are not in the blocks.
    """

    @property
    def columns(self) -> Sequence[str]:
        """Label columns."""
        ...

    def add(self, block: PassBlock) -> None:
        """Take in one block."""

    def merge(self, other: Any) -> None:
        """Take in what another rank or shard has added up: same SAEs, other rows."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state into a file, whole or not at all."""
        ...

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a state that was saved."""

    def result(self) -> Any:
        """What was added up, read off."""


def squared_norms(rows: Tensor) -> Tensor:
    """‖row‖² of each row; the norm is one pass over memory where a product and its sum are three. [rows]"""
    return torch.linalg.vector_norm(rows, dim=1).square_()


def rows_at_once(d_sae: int) -> int:
    """Rows of a block that an SAE of this width encodes in one go; a function of the width alone."""
    rows = BLOCK_ROWS
    while rows > 64 and rows * d_sae > PRE_ACTIVATIONS:
        rows //= 2
    return rows


def encode_block(sae: SAE, x: Tensor) -> SparseCodes:
    """Codes of a block, encoded in the pieces that `rows_at_once` says."""
    step = rows_at_once(sae.d_sae)
    parts = [sae.encode_sparse(x[start : start + step], sorted=False) for start in range(0, len(x), step)]
    if len(parts) == 1:
        return parts[0]
    width = max(part.indices.shape[1] for part in parts)
    padded = [
        part
        if part.indices.shape[1] == width
        else part._replace(
            indices=torch.nn.functional.pad(part.indices, (0, width - part.indices.shape[1])),
            values=torch.nn.functional.pad(part.values, (0, width - part.values.shape[1])),
        )
        for part in parts
    ]
    norms = [
        None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in padded])
        for name in ("token_mean", "token_scale", "skip")
    ]
    return SparseCodes(
        torch.cat([p.indices for p in padded]), torch.cat([p.values for p in padded]), parts[0].d_sae, *norms
    )


# ---- where rows come from ------------------------------------------------------------------------------------


class Rows:
    """Activations of any accepted kind: a tensor, a mapping with `x` and label columns, or an ActivationDataset.

    With `d_out` they are pairs of hook points (`PairedActivations`), for transcoders.

    >>> rows = Rows(torch.randn(10, 4), {"position": torch.arange(10)})
    >>> rows.n, rows.d, rows.columns
    (10, 4, ('position', 'norm'))
    """

    def __init__(self, data: Any, columns: Mapping[str, Any] | None = None, *, batch_size: int | None = None):
        extra = {name: value for name, value in (columns or {}).items() if value is not None}
        if isinstance(data, Mapping):
            table = dict(data)
            name = next((n for n in ("x", "activations", "acts", "vector") if n in table), None)
            if name is None:
                raise DataError(f"no activations in a mapping with {', '.join(map(str, table))}", hint="key them 'x'")
            data = table.pop(name)
            extra = {**{str(c): v for c, v in table.items() if v is not None}, **extra}
        if isinstance(data, np.ndarray):
            data = torch.from_numpy(data)
        if isinstance(data, Tensor):
            if data.ndim != 2:
                raise DataError(
                    f"activations have shape {tuple(data.shape)}, expected [tokens, d]",
                    hint="drop padding first: x[attention_mask.bool()]",
                )
            if not data.is_floating_point():
                raise DataError(f"activations are {data.dtype}, expected a floating-point type")
            self.n, self.d, stored = data.shape[0], data.shape[1], ()
        elif hasattr(data, "batches"):
            self.n, self.d, stored = data.n_rows, data.d, tuple(data.label_names)
        else:
            raise DataError(
                f"cannot read activations from {type(data).__name__}",
                hint="pass a tensor [tokens, d], a mapping with 'x' and label columns, or an ActivationDataset",
            )
        self.data: Any = data
        self.stored, self.batch_size = stored, batch_size or BLOCK_ROWS
        self.d_out: int | None = getattr(data, "d_out", None)
        self.extra = {name: as_column(name, value) for name, value in extra.items()}
        for name, value in self.extra.items():
            if value.shape != (self.n,):
                raise DataError(f"column {name} has shape {tuple(value.shape)}, expected ({self.n},)")

    @property
    def columns(self) -> tuple[str, ...]:
        """Label columns that can be asked for."""
        return tuple(dict.fromkeys([*self.extra, *self.stored, NORM]))

    def pieces(self, first: int, last: int, columns: Sequence[str]) -> Iterator[Batch]:
        """Rows first to last in order, with the label columns asked for."""
        names = [c for c in columns if c in self.stored and c not in self.extra]
        start = first
        for read in self._read(first, last, names):
            batch = read if isinstance(read, Batch) else Batch(read.x, read.labels)
            rows = slice(start, start + len(batch))
            labels = {**batch.labels, **{c: self.extra[c][rows] for c in columns if c in self.extra}}
            yield Batch(batch.x, labels, batch.target)
            start += len(batch)

    def _read(self, first: int, last: int, names: list[str]) -> Iterator[Labelled | Batch]:
        if isinstance(self.data, Tensor):
            for start in range(first, last, self.batch_size):
                yield Labelled(self.data[start : min(start + self.batch_size, last)], {})
        elif (first, last) == (0, self.n):
            yield from self.data.labelled_batches(names, self.batch_size, shuffle=False)
        else:
            for start in range(first, last, self.batch_size):
                yield self.data.rows(start, min(self.batch_size, last - start), columns=names)


class Stream(Rows):
    """Activations that come as they are made, with no end known beforehand."""

    def __init__(self, batches: Iterable[Labelled], d: int, columns: Sequence[str]):
        self.batches, self.n, self.d, self.d_out = batches, None, d, None
        self.stored, self.extra, self.batch_size = tuple(columns), {}, BLOCK_ROWS

    def _read(self, first: int, last: int, names: list[str]) -> Iterator[Labelled]:
        for x, labels in self.batches:
            yield Labelled(x, {name: labels[name] for name in names})


def as_column(name: str, value: Any) -> np.ndarray:
    """A label column; sample ids that are text are hashed to numbers.

    >>> as_column("position", torch.tensor([0, 1])).tolist()
    [0, 1]
    """
    array = value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if name == "sample_id" and array.dtype.kind not in "iub":
        array = np.array([zlib.crc32(str(item).encode()) for item in array.tolist()], dtype=np.int64)
    if name in ("position", "is_prompt", "is_special", "token_id") and array.dtype.kind not in "iub":
        raise DataError(f"column {name} holds {array.dtype}, expected integers or booleans")
    return array


def blocks_of(rows: Rows, first: int, last: int | None, columns: Sequence[str]) -> Iterator[PassBlock]:
    """Rows of blocks first to last (in blocks), regrouped to BLOCK_ROWS however they are read."""
    start = first * BLOCK_ROWS
    end = rows.n if rows.n is None or last is None else min(last * BLOCK_ROWS, rows.n)
    held: list[Batch] = []
    count = 0

    def take(n: int) -> Batch:
        nonlocal held, count
        whole = held[0]
        if len(held) > 1:
            whole = Batch.joined(held)
        rest = whole.part(slice(n, None))
        held, count = ([rest], len(rest)) if len(rest) else ([], 0)
        return whole.part(slice(n))

    for piece in rows.pieces(start, end or 0, columns):
        if not len(piece):
            continue
        # a reader may reuse its buffer for the next batch; rows that wait for one must be ours
        whole = not held and len(piece) % BLOCK_ROWS == 0
        held.append(piece if whole else piece.mapped(Tensor.clone))
        count += len(piece)
        while count >= BLOCK_ROWS:
            x, labels, target = take(BLOCK_ROWS)
            yield PassBlock(x, dict(labels), start, target=target)
            start += BLOCK_ROWS
    if count:
        x, labels, target = take(count)
        yield PassBlock(x, dict(labels), start, target=target)


# ---- the pass --------------------------------------------------------------------------------------------------


def name_saes(saes: Mapping[str, SAE] | Sequence[SAE] | SAE) -> dict[str, SAE]:
    """SAEs by name: the keys given, or their ids, or sae0, sae1, ..."""
    if isinstance(saes, SAE):
        saes = [saes]
    if isinstance(saes, Mapping):
        named = dict(saes)
    else:
        named = {}
        for number, sae in enumerate(saes):
            name = sae.metadata.id or f"sae{number}"
            named[name if name not in named else f"{name}#{number}"] = sae
    if not named:
        raise DataError("no SAEs to evaluate")
    return named


@torch.no_grad()
def run_pass(
    data: Any,
    saes: Mapping[str, SAE] | Sequence[SAE] | SAE,
    accumulators: Sequence[Accumulator],
    *,
    columns: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    blocks: tuple[int, int] | None = None,
    batch_size: int | None = None,
    show: bool | None = False,
    name: str = "activations",
) -> list[Any]:
    """Read activations once and give every block to every accumulator; returns their results.

    `columns` adds label columns to those of the data. With `ranks` (or under torch.distributed) this process takes its
    run of blocks; with a process group the states are merged and every rank returns the whole result, without one the
    accumulators hold this rank's part, to be saved and merged. `blocks` takes blocks first to last instead.
    `batch_size` only says how to read; it changes no number.

    >>> from hubsae.core.config import SAEConfig
    >>> class CountTokens:
    ...     columns, n = (), 0
    ...     def add(self, block): self.n += len(block)
    ...     def result(self): return self.n
    >>> sae = SAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> run_pass(torch.randn(100, 4), sae, [CountTokens()])
    [100]
    """
    named = name_saes(saes)
    rows = data if isinstance(data, Rows) else Rows(data, columns, batch_size=batch_size)
    for label, sae in named.items():
        if sae.d_in != rows.d:
            raise DataError(
                f"activations have width {rows.d}, SAE {label!r} takes {sae.d_in}",
                hint="are these the activations of its model and hook point?",
            )
    grouped = _process_group()
    mine = ranks or grouped or Ranks()
    if grouped is not None and (ranks is None or ranks.world_size > 1):
        _agree_on_products(named, grouped.rank)
    first, last = blocks if blocks is not None else _share(rows.n, mine)
    wanted = [c for c in dict.fromkeys(c for a in accumulators for c in a.columns) if c in rows.columns]
    halo = any(getattr(a, "context", 0) for a in accumulators)
    around = (max(0, first - halo), None if last is None else last + halo)
    total = None if rows.n is None else min((last or 0) * BLOCK_ROWS, rows.n) - first * BLOCK_ROWS
    with progress(name, total, "tokens", show=show) as task:
        for block in blocks_of(rows, *around, [c for c in wanted if c != NORM]):
            number = block.start // BLOCK_ROWS
            block.halo = number < first or (last is not None and number >= last)
            _check_finite(block, next(iter(named.values())).device)
            if NORM in wanted and NORM not in block.labels:
                block.labels[NORM] = torch.linalg.vector_norm(block.x.float(), dim=1).cpu().numpy()
            for label, sae in named.items():
                block.codes[label] = encode_block(sae, block.on(sae.device)[0])
            for accumulator in accumulators:
                if not block.halo or getattr(accumulator, "context", 0):
                    accumulator.add(block)
            task.advance(0 if block.halo else len(block))
    if grouped is not None and grouped.world_size > 1 and ranks is None:
        _gather(accumulators)
    return [a.result() for a in accumulators]


def _share(n: int | None, ranks: Ranks) -> tuple[int, int | None]:
    """The run of blocks of a rank."""
    if n is None:
        if ranks.world_size > 1:
            raise DataError("a stream of activations has no parts for several ranks", hint="give each its own texts")
        return 0, None
    blocks = -(-n // BLOCK_ROWS)
    return ranks.rank * blocks // ranks.world_size, (ranks.rank + 1) * blocks // ranks.world_size


def parts_of(rows: Rows) -> list[tuple[int, int]]:
    """First and last block of each part of a table; they depend on its rows alone.

    >>> parts_of(Rows(torch.zeros(300_000, 1)))
    [(0, 64), (64, 74)]
    """
    count = -(-(rows.n or 0) // BLOCK_ROWS)
    size = max(PART_BLOCKS, -(-count // MOST_PARTS))
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def part_name(part: tuple[int, int]) -> str:
    """What a file of a part is called: by its first row."""
    return f"{part[0] * BLOCK_ROWS:012d}.safetensors"


def _check_finite(block: PassBlock, device: torch.device) -> None:
    bad = ~torch.isfinite(block.on(device)[2] + block.expected(device)[2])
    if bool(bad.any()):
        raise DataError(
            f"activations hold NaN or infinity: row {block.start + int(bad.nonzero()[0])} is the first, "
            f"{int(bad.sum())} of the {bad.numel()} rows of its block",
            hint="harvest them again, or drop these rows; float16 storage overflows above 65504",
        )


def _process_group() -> Ranks | None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return None


def _agree_on_products(saes: Mapping[str, SAE], rank: int) -> None:
    """Which backend multiplies is decided by a timed trial; ranks that decided differently would round differently."""
    import torch.distributed as dist

    from hubsae.kernels.linear import adopt

    found: list[Any] = [_product_decisions(saes) if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    adopt(found[0])


def _product_decisions(saes: Mapping[str, SAE]) -> list[list[int | str]]:
    from hubsae.kernels.linear import decisions

    for sae in {sae.config: sae for sae in saes.values()}.values():
        sae.encode_sparse(torch.zeros(rows_at_once(sae.d_sae), sae.d_in, device=sae.device))
    return decisions()


def agree_on_products(saes: Mapping[str, SAE], folder: str | os.PathLike[str]) -> None:
    """The same among processes without a group, through a folder: whoever comes first decides.

    The folder is renamed into place with the decisions in it: no disk puts a folder in the place of one that holds a
    file, so of those that come at one instant all but one find it there.
    """
    from hubsae.kernels.linear import adopt

    folder = Path(folder)
    if not folder.is_dir():
        mine = folder.with_name(f".{folder.name}.{uuid4().hex}")
        write_json_atomic(mine / DECISIONS, _product_decisions(saes))
        try:
            os.rename(mine, folder)
        except OSError:
            shutil.rmtree(mine)
            if not folder.is_dir():
                raise
    adopt(read_json(folder / DECISIONS))


def _gather(accumulators: Sequence[Accumulator]) -> None:
    """The state of all ranks, on every rank."""
    import torch.distributed as dist

    for accumulator in accumulators:
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, accumulator)
        whole = states[0]
        for state in states[1:]:
            whole.merge(state)
        vars(accumulator).update(vars(whole))


# ---- states on disk --------------------------------------------------------------------------------------------


def save_state(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], facts: Any) -> Path:
    """Write an accumulator's state: tensors, and what they are of as JSON; one state is always the same bytes."""
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"kind": kind, "facts": facts}, sort_keys=True)
    with atomic_path(target) as scratch:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, scratch, {"hubsae": text})
    return target


def load_state(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], Any]:
    """The inverse of `save_state`; a file of another kind, or a damaged one, is refused."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get("hubsae", "{}"))
            if said.get("kind") != kind:
                raise FormatError(Path(path), f"a state of {kind}", f"one of {said.get('kind')}")
            return {key: file.get_tensor(key) for key in file.keys()}, said["facts"]  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise FormatError(Path(path), f"a state of {kind}", f"{error}") from error
