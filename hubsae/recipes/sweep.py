"""Train every cell of a sweep in as few passes over the activations as memory allows.

    cells -> ranks (evenly by work) -> groups that fit in memory -> train_many, one pass per group

    TRAIN/plan-0-of-1.json         which cells this rank trains together
    TRAIN/groups/<group>/          the group's log and state, for resuming; removed when it is done
    TRAIN/cells/<id>/              the SAE
    TRAIN/cells/<id>.json          written last: how the cell ended
    TRAIN/ended-0-of-1             this rank writes nothing more

A killed run goes on where it was: finished cells are skipped, the group that was running continues from its state.
A cell that diverges is reported and left behind by its group; where memory runs out the group is halved, and a cell
that does not fit alone is reported and skipped.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hubsae.core.errors import TrainingError
from hubsae.core.files import read_json, write_json_atomic
from hubsae.core.sae import SAE
from hubsae.recipes.standard import Shelf
from hubsae.train import TrainConfig, TrainResult, train_many
from hubsae.train.data import as_source
from hubsae.train.estimate import estimate
from hubsae.train.parallel import pick_device

POLL = 0.2
"""Seconds between two looks at what other ranks have finished."""
SHARE = {"cuda": 0.85, "cpu": 0.6}
"""Of the free memory that cells may take; the rest is for data, the allocator and other programs."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    id: str
    state: str
    """done or failed"""
    reason: str | None = None
    """Why it failed."""
    steps: int = 0
    tokens: int = 0
    loss: float | None = None
    fvu: float | None = None
    l0: float | None = None
    dead: float | None = None
    """Last training values; dead by the rule of the training config."""
    group: int = 1
    """How many cells were trained in the same pass."""

    @property
    def ok(self) -> bool:
        """Whether there is an SAE."""
        return self.state == "done"


def train_cells(
    configs: Sequence[TrainConfig],
    activations: Any,
    folder: str | Path,
    *,
    memory: int | None = None,
    progress: Callable[..., None] | None = None,
) -> list[Outcome]:
    """Train cells, given by their configs with ids as names, and return how each ended, in order.

    `memory` in bytes limits how much cells trained together may take. Under torchrun each rank trains its share, and
    the first returns when all are done.

    >>> import tempfile
    >>> x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    >>> cells = [TrainConfig(name=f"TopK_exp2x_k{k}", expansion=2, k=k, batch_size=64) for k in (1, 2)]
    >>> [outcome.state for outcome in train_cells(cells, x, tempfile.mkdtemp())]
    ['done', 'done']
    """
    root, d = Path(folder), as_source(activations).d
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    (root / "cells").mkdir(parents=True, exist_ok=True)
    share = shares(configs, d, world)[rank]
    place = pick_device()
    limit = memory if memory is not None else free_for_cells(place)
    for group in _plan(root, share, d, limit, rank, world):
        if progress is not None:
            ended = sum(_outcome_path(root, c.name).is_file() for c in configs)
            progress(ended, len(configs), f"{len(group)} cells in one pass")
        _train_group([c for c in share if c.name in group], activations, root, place)
    (root / f"ended-{rank}-of-{world}").touch()
    if rank == 0:
        left = [_outcome_path(root, c.name) for c in configs] + [root / f"ended-{r}-of-{world}" for r in range(world)]
        while not all(path.is_file() for path in left):
            time.sleep(POLL)  # another rank that dies ends this one too: its launcher sees to it
        shutil.rmtree(root / "groups", ignore_errors=True)  # states of runs that were killed, with other groups
    return outcomes(root, [c.name for c in configs])


def outcomes(folder: str | Path, ids: Sequence[str]) -> list[Outcome]:
    """How cells ended, for those that have."""
    paths = [_outcome_path(Path(folder), name) for name in ids]
    return [Outcome(**read_json(path)) for path in paths if path.is_file()]


def cells_in(folder: str | Path) -> Shelf:
    """The SAEs of the cells that are done."""
    return Shelf(Path(folder) / "cells")


def trained(folder: str | Path, ids: Sequence[str], device: str = "cpu") -> dict[str, Callable[[], SAE]]:
    """What loads the SAE of each cell that is done, by id."""
    shelf = cells_in(folder)
    return {outcome.id: partial(shelf.get, outcome.id, device) for outcome in outcomes(folder, ids) if outcome.ok}


def shares(configs: Sequence[TrainConfig], d: int, world: int) -> list[list[TrainConfig]]:
    """The cells of each rank, so that all have about the same work: widest first, each to the least busy rank.

    >>> cells = [TrainConfig(name=str(w), d_sae=w, k=1) for w in (8, 16, 32, 64)]
    >>> [[c.name for c in share] for share in shares(cells, 4, 2)]
    [['64'], ['8', '16', '32']]
    """
    given: list[list[TrainConfig]] = [[] for _ in range(world)]
    busy = [0] * world
    for config in sorted(configs, key=lambda c: -c.width(d)):
        least = busy.index(min(busy))
        given[least].append(config)
        busy[least] += config.width(d)
    order = {config.name: place for place, config in enumerate(configs)}
    return [sorted(share, key=lambda c: order[c.name]) for share in given]


def groups_that_fit(configs: Sequence[TrainConfig], d: int, limit: int) -> list[list[str]]:
    """Names of the cells to train together, none of the groups above `limit` bytes unless it is a single cell.

    >>> cells = [TrainConfig(name=str(w), d_sae=w, k=1, batch_size=8) for w in (64, 64_000, 128)]
    >>> groups_that_fit(cells, 16, 12_000_000)
    [['64000'], ['64', '128']]
    """
    groups: list[tuple[int, list[str]]] = []
    for config in sorted(configs, key=lambda c: -_bytes(c, d)):
        need = _bytes(config, d)
        for place, (taken, members) in enumerate(groups):
            if taken + need <= limit:
                groups[place] = (taken + need, [*members, config.name])
                break
        else:
            groups.append((need, [config.name]))
    order = {config.name: place for place, config in enumerate(configs)}
    return [sorted(members, key=lambda name: order[name]) for _, members in groups]


def free_for_cells(device: str) -> int:
    """Bytes that the cells of one process may take together.

    >>> free_for_cells("cpu") > 0
    True
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(free * SHARE["cuda"])
    return int(free_memory() * SHARE["cpu"]) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def free_memory() -> int:
    """Bytes of memory free for this machine or container, whichever is less."""
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        free += [int(line.split()[1]) * 1024 for line in lines]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(max(0, int(text) - int(used.read_text())))
    if not free:
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 20
        free.append(pages * 4096 // 2)
    return min(free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or in the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


# ---- inside ------------------------------------------------------------------------------------------------


def _bytes(config: TrainConfig, d: int) -> int:
    """What a cell takes in training, besides the data."""
    return estimate(config, d, config.batch_size, torch.device("cpu")).total_bytes


def _outcome_path(root: Path, name: str) -> Path:
    return root / "cells" / f"{name}.json"


def _plan(root: Path, share: Sequence[TrainConfig], d: int, limit: int, rank: int, world: int) -> list[list[str]]:
    """The groups of this rank. Kept on disk: free memory may be another after a kill, and a state fits one group."""
    path = root / f"plan-{rank}-of-{world}.json"
    names = [config.name for config in share]
    if path.is_file():
        groups = read_json(path)
        if sorted(name for group in groups for name in group) == sorted(names):
            return groups
    left = [config for config in share if not _outcome_path(root, config.name).is_file()]
    groups = [[name for name in names if name not in {c.name for c in left}], *groups_that_fit(left, d, limit)]
    groups = [group for group in groups if group]
    write_json_atomic(path, groups)
    return groups


def _train_group(
    configs: list[TrainConfig],
    activations: Any,
    root: Path,
    device: str,
) -> None:
    """Train cells in one pass; in two where memory does not do for one."""
    digest = hashlib.sha256("\n".join(config.name for config in configs).encode()).hexdigest()[:12]
    folder = root / "groups" / f"{len(configs):03d}-{digest}"
    if all(_outcome_path(root, config.name).is_file() for config in configs):
        shutil.rmtree(folder, ignore_errors=True)  # where a kill came between the last cell and this
        return
    try:
        results = train_many(configs, activations, out=folder, device=device, quiet=True)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        results, reason = None, f"out of memory alone on {device}: {str(error).splitlines()[0]}"
    if results is None:
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        shutil.rmtree(folder, ignore_errors=True)
        if len(configs) == 1:
            _end(root, Outcome(configs[0].name, "failed", reason))
            return
        half = len(configs) // 2
        _train_group(configs[:half], activations, root, device)
        _train_group(configs[half:], activations, root, device)
        return
    for result in results:
        _keep(root, result, len(configs))
    shutil.rmtree(folder, ignore_errors=True)


def _keep(root: Path, result: TrainResult, together: int) -> None:
    """Write a cell's SAE, then how it ended."""
    if _outcome_path(root, result.name).is_file():
        return
    if result.sae is None:
        reason = result.error.message if result.error is not None else "no SAE"
        _end(root, Outcome(result.name, "failed", reason, result.steps, result.tokens, group=together))
        return
    cells_in(root).put(result.name, result.sae)
    last: Mapping[str, Any] = next((line for line in reversed(result.history) if line["event"] == "train"), {})
    known = {name: last.get(name) for name in ("loss", "fvu", "l0", "dead")}
    _end(root, Outcome(result.name, "done", None, result.steps, result.tokens, group=together, **known))


def _end(root: Path, outcome: Outcome) -> None:
    try:
        write_json_atomic(_outcome_path(root, outcome.id), asdict(outcome))
    except OSError as error:
        raise TrainingError(
            f"cannot write {_outcome_path(root, outcome.id)}: {error}", hint="free some space and start again"
        ) from error
