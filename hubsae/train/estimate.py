"""How much memory and time a run will take, before it starts.

Memory is counted: weights and moments (12 bytes per weight), a stored gradient where the settings ask for one, and
the blocks of a step. Time on this machine is measured: the encoder's product at the run's width on a few rows, and
the share of a step it makes up (0.57 on one Zen 5 core, benchmarks/LOG.md). For a GPU that is not here the roofline
of an H200 is used (780 TFLOP/s bf16, 4.3 TB/s; 1.5 ms a step for launches), and said so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hubsae.kernels.linear import linear, rows_at_once
from hubsae.train.config import TrainConfig
from hubsae.train.update import TILE_ELEMENTS

ENCODER_SHARE = 0.57
H200_FLOPS, H200_BYTES, H200_LAUNCHES = 780e12, 4.3e12, 1.5e-3


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    name: str
    d_in: int
    d_sae: int
    parameters: int
    tokens: int
    steps: int
    state_bytes: int
    """Weights and optimiser moments."""
    gradient_bytes: int
    """A stored gradient: clipping, accumulation or several data-parallel ranks."""
    step_bytes: int
    """Blocks that live during a step."""
    step_flops: float
    """Operations of a step's dense product, the encoder's; what follows touches only active entries."""
    checkpoint_bytes: int
    """One saved state; the best ones take a third each."""
    seconds: float | None
    """Measured on this machine; None where it would be days of CPU work to the point of being meaningless."""
    h200_seconds: float
    """Roofline estimate for one H200; nothing was measured on one."""

    @property
    def total_bytes(self) -> int:
        """Peak memory besides PyTorch itself and the data."""
        return self.state_bytes + self.gradient_bytes + self.step_bytes


def estimate(
    config: TrainConfig, d_in: int, rows: int, device: torch.device, ranks: int = 1, d_out: int | None = None
) -> Estimate:
    """Estimate one run; `d_out` is the width of a transcoder's output.

    >>> e = estimate(TrainConfig(d_sae=256, k=8, batch_size=128), 64, 12_800, torch.device("cpu"))
    >>> e.steps, e.state_bytes
    (100, 397824)
    """
    n, B = config.width(d_in), config.batch_size // ranks
    wide = d_in if d_out is None else d_out
    vectors = (2 * n if config.architecture in ("jumprelu", "gated") else n) + d_in + wide
    parameters = n * (d_in + wide) + vectors + (wide * d_in if config.skip else 0)
    steps = config.steps(rows)[1]
    state = 12 * parameters
    stored = config.clip is not None or config.accumulate > 1 or (ranks > 1 and config.parallel == "data")
    part = B // config.accumulate
    block_rows = min(part, rows_at_once(part, n))
    density = min(1.0, (config.k or max(1, n // 20)) / n)
    entries = int(part * n * density)
    prefixes = len(config.prefixes(n))
    block = 4 * (block_rows * n * 2 + part * (d_in + wide * (2 + prefixes))) + 40 * entries + 8 * TILE_ELEMENTS
    if config.architecture == "gated" or (config.k is None and density > 0.1):
        block += 4 * part * n * 3
    if config.kernels == "triton" and config.architecture in ("topk", "batch_topk"):
        # lists of candidates in place of pre-activations, and bf16 copies of what is multiplied or gathered from
        block += part * (8 * 8 * (config.k or 0) + 2 * (d_in + wide)) - 4 * block_rows * n * 2
        block += 2 * n * (d_in if config.precision == "fp32" else d_in + wide)
    elif config.precision == "bf16":
        block += 2 * n * d_in
    if config.aux is not None:
        block += 4 * (n // 2 * d_in * 3 + part * n // 2 * 2)
    flops = 2.0 * config.batch_size * d_in * n
    seconds = None
    if device.type == "cpu" or torch.cuda.is_available():
        seconds = steps * _encoder_seconds(d_in, n, config, device) / ENCODER_SHARE / ranks
    gathered = config.batch_size * (config.k or 64) * d_in * 2 * 3
    moved = gathered + 24 * 2 * n * d_in
    h200 = steps * max(H200_LAUNCHES, 1.4 * (flops / H200_FLOPS + moved / H200_BYTES) / ranks)
    return Estimate(
        config.name,
        d_in,
        n,
        parameters,
        steps * config.batch_size,
        steps,
        state,
        4 * n * (d_in + wide) if stored else 0,
        block,
        flops,
        state,
        seconds,
        h200,
    )


def _encoder_seconds(d_in: int, n: int, config: TrainConfig, device: torch.device) -> float:
    """One batch through the encoder, from a few rows and at most 4096 latents."""
    rows, width = min(256, config.batch_size), min(n, 4096)
    x, weight = torch.randn(rows, d_in, device=device), torch.randn(width, d_in, device=device)
    linear(x, weight)
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best * (config.batch_size / rows) * (n / width)
