"""Gradient signal-to-noise ratio of SAEs: how far the gradients of single batches agree, at the weights as they are.

Per parameter GSNR = (E g)² / Var g over batches. How it is averaged into one number decides what it says, so two are
given: the ratio of the sums over all parameters (large gradients count most), and the mean over parameters of their
own ratio. The square of a mean over n batches is too large by Var g / n on average; that is taken off.
At trained weights it also says how far training got: a worse SAE has larger gradients, which agree better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.train import init, step, update
from hubsae.train.config import TrainConfig
from hubsae.train.parallel import Solo
from hubsae.train.state import Bank


class GSNR(NamedTuple):
    """One SAE's gradients over `batches` batches."""

    pooled: float
    """Σ (E g)² / Σ Var g over all parameters."""
    mean: float
    """Mean over the parameters whose gradient varies of (E g)² / Var g."""
    batches: int


def gsnr(
    configs: Sequence[TrainConfig], saes: Mapping[str, SAE], batches: Iterable[Tensor], *, device: str = "cpu"
) -> dict[str, GSNR]:
    """GSNR of SAEs (by the names of their training configs) over batches [tokens, d] of raw activations.

    The loss is that of the config with its whole sparsity coefficient; nothing is updated.

    >>> from hubsae.core.config import SAEConfig
    >>> sae = SAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> x = torch.randn(512, 4, generator=torch.manual_seed(0))
    >>> gsnr([TrainConfig(name="a", d_sae=8, k=2)], {"a": sae}, x.split(64))["a"].batches
    8
    """
    first = saes[configs[0].name]
    bank = Bank(configs, first.d_in, device=device)
    for cell in bank.cells:
        init.warm(cell, saes[cell.config.name], saes[cell.config.name].normalizer)
    names = [sorted(cell.vectors) for cell in bank.cells]
    totals: list[list[tuple[Tensor, Tensor]]] = [[] for _ in bank.cells]
    comm, count = Solo(), 0
    with torch.no_grad():
        for batch in batches:
            x = batch.to(bank.device, torch.float32)
            x = x if first.normalizer is None else first.normalizer.apply(x)
            found = step.forward(bank, x, comm, len(x))
            signals = step.signals(bank, found, comm, len(x))
            update.collect(bank, found, signals)
            stored = bank.stored_gradients()
            for cell, known, sums, vectors in zip(bank.cells, names, totals, signals.vectors, strict=True):
                grads = [matrix[cell.low : cell.high] for matrix in stored]
                grads += [vectors[name] for name in known]
                sums[:] = sums or [(torch.zeros_like(g).double(), torch.zeros_like(g).double()) for g in grads]
                for (total, square), g in zip(sums, grads, strict=True):
                    total += g
                    square += g.double().square()
            for matrix in stored:
                matrix.zero_()
            count += 1
    if count < 2:
        raise DataError(f"gradients of {count} batches have no variance", hint="give at least two")
    return {cell.config.name: _ratios(sums, count) for cell, sums in zip(bank.cells, totals, strict=True)}


def _ratios(sums: list[tuple[Tensor, Tensor]], n: int) -> GSNR:
    signal = noise = ratio = varying = 0.0
    for total, square in sums:
        mean = total / n
        variance = ((square - n * mean.square()) / (n - 1)).clamp_min(0)
        clean = mean.square() - variance / n
        signal, noise = signal + float(clean.sum()), noise + float(variance.sum())
        moves = variance > 1e-12 * square / n
        ratio, varying = ratio + float((clean[moves] / variance[moves]).sum()), varying + int(moves.sum())
    return GSNR(signal / noise if noise else float("inf"), ratio / varying if varying else float("inf"), n)
