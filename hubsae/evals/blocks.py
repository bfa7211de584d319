"""Activations as blocks of fixed rows: what makes a metric independent of batch size and of ranks.

A matrix product of 100 rows and one of 4,096 may round differently, and a batch rule selects differently. So
batches are only a way to read; SAEs always see the same blocks of BLOCK_ROWS consecutive rows, and a rank
takes whole blocks. Each row carries labels: the cell (first position or not, prompt or response) from which
every scope is a union, and the group it is resampled with.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.core.errors import DataError

BLOCK_ROWS = 4096
"""Rows of a block. Part of a number only for SAEs that select over a batch."""
GROUPS = 128
"""Groups that whole samples fall into for the bootstrap."""
RUN_ROWS = 64
"""Without sample ids, runs of this many consecutive rows stay in one group."""
COLUMNS = ("position", "is_prompt", "sample_id")

# A cell is 3·(1 at position 0) + label, label 0 unlabelled, 1 prompt, 2 response.
CELLS = 6
SCOPE_CELLS: dict[str, tuple[int, ...]] = {
    "all": (0, 1, 2, 3, 4, 5),
    "no_position_0": (0, 1, 2),
    "position_0": (3, 4, 5),
    "prompt": (1, 4),
    "response": (2, 5),
    "prompt_no_position_0": (1,),
}


class Block(NamedTuple):
    """Consecutive rows of activations with their labels."""

    x: Tensor
    """[rows, d]"""
    cell: Tensor
    """[rows] int64, see CELLS"""
    group: Tensor
    """[rows] int64 below GROUPS"""
    start: int
    """Index of the first row in the whole table."""
    known_positions: int
    """Rows whose position is known; a writer that does not know it stores -1."""
    known_samples: int
    """Rows whose sample is known."""


class Labels(NamedTuple):
    """Which label columns there are; scopes that need a missing one are not reported.

    A column may still hold nothing: positions and samples of -1 are unknown.
    """

    position: bool
    is_prompt: bool
    sample_id: bool


class Piece(NamedTuple):
    """Rows as they were read, of any number."""

    x: Tensor
    columns: dict[str, Tensor]


def read_pieces(
    activations: Any, columns: Mapping[str, Any] | None = None, batch_size: int | None = None
) -> tuple[Iterator[Piece], Labels, int]:
    """Open activations of any accepted kind: an iterator of pieces, their labels, and the width."""
    given = {name: value for name, value in (columns or {}).items() if value is not None}
    unknown = sorted(set(given) - set(COLUMNS))
    if unknown:
        raise DataError(f"unknown label columns: {', '.join(unknown)}", hint=f"known: {', '.join(COLUMNS)}")
    if isinstance(activations, Mapping):
        table = dict(activations)
        name = next((n for n in ("x", "activations", "acts") if n in table), None)
        if name is None:
            raise DataError(f"no activations in a mapping with {', '.join(map(str, table))}", hint="key them 'x'")
        given = {**{c: table[c] for c in COLUMNS if table.get(c) is not None}, **given}
        activations = table[name]
    if isinstance(activations, np.ndarray):
        activations = torch.from_numpy(activations)
    if isinstance(activations, Tensor):
        return _tensor_pieces(activations, given, batch_size)
    if hasattr(activations, "batches"):
        if given:
            raise DataError("label columns come from the dataset itself", hint="leave out columns=")
        return _dataset_pieces(activations, batch_size)
    raise DataError(
        f"cannot read activations from {type(activations).__name__}",
        hint="pass a tensor [tokens, d], a mapping with 'x' and label columns, or an ActivationDataset",
    )


def _tensor_pieces(x: Tensor, columns: dict[str, Any], batch_size: int | None) -> tuple[Iterator[Piece], Labels, int]:
    if x.ndim != 2:
        raise DataError(
            f"activations have shape {tuple(x.shape)}, expected [tokens, d]",
            hint="drop padding first: x[attention_mask.bool()]",
        )
    if not x.is_floating_point():
        raise DataError(f"activations are {x.dtype}, expected a floating-point type")
    labels = {name: as_column(name, value) for name, value in columns.items()}
    for name, value in labels.items():
        if value.shape != (x.shape[0],):
            raise DataError(f"column {name} has shape {tuple(value.shape)}, expected ({x.shape[0]},)")
    step = batch_size or BLOCK_ROWS

    def pieces() -> Iterator[Piece]:
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            yield Piece(x[rows], {name: value[rows] for name, value in labels.items()})

    return pieces(), Labels(*(name in labels for name in COLUMNS)), x.shape[1]


def _dataset_pieces(dataset: Any, batch_size: int | None) -> tuple[Iterator[Piece], Labels, int]:
    names = tuple(c for c in COLUMNS if c in dataset.label_names)

    def pieces() -> Iterator[Piece]:
        for batch in dataset.batches(batch_size or BLOCK_ROWS, shuffle=False, columns=names):
            if isinstance(batch, Tensor):
                yield Piece(batch, {})
            else:
                yield Piece(batch["vector"], {name: as_column(name, batch[name]) for name in names})

    return pieces(), Labels(*(name in names for name in COLUMNS)), dataset.d


def as_column(name: str, value: Any) -> Tensor:
    """A label column as int64; text ids are hashed."""
    if isinstance(value, Tensor):
        return value.to("cpu", torch.int64)
    array = np.asarray(value)
    if array.dtype.kind in "iub":
        return torch.from_numpy(array.astype(np.int64))
    if name == "sample_id":
        hashed = [zlib.crc32(str(item).encode()) for item in array.tolist()]
        return torch.tensor(hashed, dtype=torch.int64)
    raise DataError(f"column {name} holds {array.dtype}, expected integers or booleans")


def iter_blocks(
    pieces: Iterable[Piece], *, rank: int = 0, world_size: int = 1, block_rows: int = BLOCK_ROWS
) -> Iterator[Block]:
    """Regroup pieces into blocks of `block_rows`; a rank gets every `world_size`-th block."""
    held: list[Piece] = []
    held_rows, start, number = 0, 0, 0

    def take(rows: int) -> Piece:
        nonlocal held, held_rows
        x = held[0].x if len(held) == 1 else torch.cat([p.x for p in held])
        columns = {
            name: held[0].columns[name] if len(held) == 1 else torch.cat([p.columns[name] for p in held])
            for name in held[0].columns
        }
        rest = Piece(x[rows:], {name: value[rows:] for name, value in columns.items()})
        held, held_rows = ([rest], rest.x.shape[0]) if rest.x.shape[0] else ([], 0)
        return Piece(x[:rows], {name: value[:rows] for name, value in columns.items()})

    for piece in pieces:
        if not piece.x.shape[0]:
            continue
        # a reader may reuse its buffer for the next batch; rows that wait for one must be ours
        whole = not held and piece.x.shape[0] % block_rows == 0
        held.append(piece if whole else Piece(piece.x.clone(), piece.columns))
        held_rows += piece.x.shape[0]
        while held_rows >= block_rows:
            block = take(block_rows)
            if number % world_size == rank:
                yield _label(block, start)
            start, number = start + block_rows, number + 1
    if held_rows and number % world_size == rank:
        yield _label(take(held_rows), start)


def _label(piece: Piece, start: int) -> Block:
    rows = piece.x.shape[0]
    unknown = torch.full((rows,), -1)
    position = piece.columns.get("position", unknown)
    sample = piece.columns.get("sample_id", unknown)
    cell = 3 * (position == 0).long()
    if "is_prompt" in piece.columns:
        cell += torch.where(piece.columns["is_prompt"] != 0, 1, 2)
    runs = torch.arange(start, start + rows) // RUN_ROWS
    group = torch.where(sample >= 0, mix(sample), runs) % GROUPS
    return Block(piece.x, cell, group, start, int((position >= 0).sum()), int((sample >= 0).sum()))


def mix(ids: Tensor) -> Tensor:
    """A fixed hash of int64 ids to non-negative int64 (the splitmix64 finaliser).

    >>> mix(torch.tensor([0, 1, 2])).tolist() == mix(torch.tensor([0, 1, 2])).tolist()
    True
    """
    with np.errstate(over="ignore"):
        z = ids.numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(1)).astype(np.int64))
