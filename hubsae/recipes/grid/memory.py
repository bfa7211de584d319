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

    >>> cell_bytes(TrainConfig(d_sae=7168, k=64, batch_size=512), 896) // 2**20
    168
    """
    n, rows = config.width(d), config.batch_size // config.accumulate
    state = 6 * n * d * 4
    if config.architecture in ("topk", "batch_topk"):
        # rows, latents, values and their order, each some 8 bytes, and their gradients
        work = rows * (config.k or 0) * 64 + min(rows * n, 1 << 23) * 4
    else:
        # may be dense: pre-activations, codes, gradient, the two masks
        work = rows * n * 24
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
