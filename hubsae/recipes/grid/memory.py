"""How much memory cells need while they train, and how much there is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hubsae.train import TrainConfig

SHARE = {"cuda": 0.85, "cpu": 0.6}
"""Of the free memory that cells may take; the rest is for data, the allocator and other programs."""


def cell_bytes(config: TrainConfig, d: int) -> int:
    """Bytes a cell takes in training: weights and Adam's two moments, and what a batch adds.

    Measured peaks above imports and data on a CPU, d 896, 7168 latents, batch 512: topk 201 MB, batch_topk 271,
    jumprelu 203 sparse and 322 dense; topk with 14336 latents 370. Estimates are within 5 % of these, but a sparse
    jumprelu is given the room of a dense one.

    >>> cell_bytes(TrainConfig(d_sae=7168, k=64, batch_size=512), 896) // 2**20
    196
    """
    n, rows = config.width(d), config.batch_size // config.accumulate
    state = 6 * n * d * 4
    if config.architecture == "topk":
        # pre-activations of the rows encoded at once, and of the entries rows, latents, values, order, gradients
        work = rows * (config.k or 0) * 64 + min(rows * n, 1 << 23) * 12
    elif config.architecture == "batch_topk":
        work = rows * n * 32  # the first batch has no threshold to filter by
    else:
        work = rows * n * 48  # may be dense: pre-activations, codes, gradient, masks, their products
    return state + work + 3 * rows * d * 4


def budget(device: str | torch.device) -> int:
    """Bytes that the cells of one process may take together.

    >>> budget("cpu") > 0
    True
    """
    kind = torch.device(device).type
    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(free * SHARE["cuda"])
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return int(free_memory() * SHARE["cpu"]) // here


def free_memory() -> int:
    """Bytes of memory free for this machine or container, whichever is less."""
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(max(0, int(text) - int(used.read_text())))
    if not free:
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 20
        free.append(pages * 4096 // 2)
    return min(free)
