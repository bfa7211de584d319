"""The one dense product of an SAE step, x @ W.T + b, on the fastest backend that gives the same numbers.

PyTorch's CPU linear goes to MKL, which leaves AVX-512 unused on AMD; oneDNN through the operator that the
compiler emits is 2.0 to 2.5 times faster there (64 ms against 30 ms for 512 x 896 x 7168 on one Zen 5 core).
The operator is private, and oneDNN may round to bf16 on CPUs with AMX when told to, so it is never trusted:
a trial at the real shape compares numbers and time once per shape, and `F.linear` is always the fallback. Where the two
take nearly the same time, or too little to be measured, the processor's make decides and not the clock, so that two
runs on one machine decide alike: oneDNN on AMD (1.1 to 1.25 times faster there without AVX-512, and on Zen 4 with it),
MKL on Intel.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# results of up to so many elements are made at once, and rows a multiple of this above
IN_CACHE = 1 << 21
ROWS = 256
# a result of up to 30 MiB is memory that the allocator keeps and hands out again; a larger one is mapped anew, page by
# page, each time (3 % of the product at 32,768 columns). Below LEAST rows the product loses more than that
KEPT = 30 << 18
LEAST = 112
# products below this many multiply-adds are over before a trial pays; MKL is as fast or faster (1.4 times on Zen 4)
SMALL = 1 << 23
# of a batch of rows below these many, about a millisecond: what else the machine does would decide which seems faster
TIMED, BATCH = 1 << 26, 32
# largest difference, relative to |x| |w|, that counts as "the same numbers" in float32
TOLERANCE = 2e-6
# how many times slower the backend that a processor's make speaks for must be to lose
CLEARLY = 1.3


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, d] @ weight [n, d].T + bias [n].

    >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
    tensor([[3.5000]])
    """
    fast = (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and x.ndim == 2
        and _regular(x)
        and _regular(weight)
        and x.shape[0] * weight.numel() >= SMALL
        # the operator has no derivative
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )
    if fast and _choice(x.shape[0], weight) == "onednn":
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _choice(rows: int, weight: Tensor) -> str:
    n, d_in = weight.shape
    return backend(rows, d_in, n, torch.get_num_threads(), turned=weight.stride(1) != 1)


def rows_at_once(rows: int, n: int) -> int:
    """How many rows to multiply at once where the n columns of each are reduced before the next come.

    >>> [rows_at_once(2048, n) for n in (512, 1024, 7168, 32768, 131072)]
    [2048, 2048, 256, 240, 256]
    """
    if rows * n <= IN_CACHE:
        return rows
    kept = KEPT // n
    return kept if LEAST <= kept < ROWS else max(1, IN_CACHE // n // ROWS) * ROWS


def _regular(matrix: Tensor) -> bool:
    """Rows or columns contiguous: what a BLAS takes as it is."""
    return matrix.ndim == 2 and (matrix.stride(1) == 1 or matrix.stride(0) == 1)


# two threads must not decide about one shape
_deciding = threading.RLock()
_decided: dict[tuple[int, ...], str] = {}


def decisions() -> list[list[int | str]]:
    """What the trials decided so far, for a checkpoint: a resumed run must not decide otherwise."""
    return [[*shape, choice] for shape, choice in _decided.items()]


def adopt(found: list[list[int | str]]) -> None:
    """Take over decisions of an earlier process."""
    for *shape, choice in found:
        if choice == "torch" or _operator() is not None:
            _decided[tuple(int(v) for v in shape)] = str(choice)


def _operator():
    usable = torch.backends.mkldnn.is_available()
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if usable else None


def backend(rows: int, d_in: int, n: int, threads: int, *, turned: bool = False) -> str:
    """`onednn` or `torch` for a float32 product of this shape; decided once by a short trial.

    `turned` says that the weight lies as [d_in, n]: without AVX-512, and n a multiple of 1,024, oneDNN may then take
    1.4 times as long as MKL (Zen 4). `HUBSAE_LINEAR=torch` or `onednn` in the environment decides instead of the trial.
    """
    forced = os.environ.get("HUBSAE_LINEAR", "")
    if forced in ("torch", "onednn"):
        return decide((rows, d_in, n, threads, turned), lambda: forced)
    return decide((rows, d_in, n, threads, turned), lambda: _trial(rows, d_in, n, turned))


def decide(shape: tuple[int, ...], trial: Callable[[], str]) -> str:
    """What a trial said about a shape; it is made once, and remembered with the others."""
    with _deciding:
        if shape not in _decided:
            _decided[shape] = trial()
    return _decided[shape]


def _trial(rows: int, d_in: int, n: int, turned: bool = False) -> str:
    operator = _operator()
    if operator is None:
        return "torch"
    timed = rows < BATCH or rows * d_in * n >= TIMED
    generator = torch.Generator().manual_seed(0)
    if turned:
        # who wins depends on the factors of two in the distance of rows, and is the same for half as many latents
        rows = min(rows, 128)
        while n > 8192:
            n = (n + 1) // 2
        weight = torch.randn(d_in, n, generator=generator).t()
    else:
        # the winner does not depend on the number of latents beyond a thousand; a slice keeps this short and small
        n = min(n, 2048)
        weight = torch.randn(n, d_in, generator=generator)
    x = torch.randn(rows, d_in, generator=generator)
    bias = torch.randn(n, generator=generator)
    try:
        fast = operator(x, weight, bias, "none", [], "")
    except (RuntimeError, NotImplementedError):
        return "torch"
    if fast.shape != (rows, n) or not _close(fast, x, weight, bias):
        return "torch"
    if not timed:
        return "onednn" if _on_amd() else "torch"
    ours = fastest(lambda: operator(x, weight, bias, "none", [], ""))
    theirs = fastest(lambda: F.linear(x, weight, bias))
    clearly = 1 if turned else CLEARLY  # there they are seldom near
    return "onednn" if ours < theirs * (clearly if _on_amd() else 1 / clearly) else "torch"


@cache
def _on_amd() -> bool:
    """Whether the processor is one that MKL has no kernels of its own for."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def fastest(work: Callable[[], object]) -> float:
    """The shortest of three runs, in seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether a float32 product is a float32 product, and not one rounded to bf16 on the way."""
    rows, latents = slice(0, 64), slice(0, 256)
    x, weight, bias = x[rows].double(), weight[latents].double(), bias[latents].double()
    size = x.norm(dim=1, keepdim=True) * weight.norm(dim=1) + bias.abs()
    return bool(((got[rows, latents] - F.linear(x, weight, bias)).abs() <= TOLERANCE * size).all())
