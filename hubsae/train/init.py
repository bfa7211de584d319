"""How parameters start: from random directions and the data's centre, or from an SAE that exists."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.activations.activation_set import Batch
from hubsae.core import factory
from hubsae.core.errors import ConfigError
from hubsae.core.fold import unfold
from hubsae.core.normalizer import Normalizer
from hubsae.core.sae import SAE
from hubsae.train.config import TrainConfig
from hubsae.train.state import Cell

FIRST_THRESHOLD = 0.01
"""jumprelu, where the config names none."""


def fresh(cell: Cell, rows: Batch) -> None:
    """Random weights of a cell; the biases from rows of data in training space."""
    config, d = cell.config, cell.W_enc.shape[1]
    generator = torch.Generator().manual_seed(config.seed)
    _fill(cell, cell.W_dec, config.init.decoder, generator, fan_in=cell.total)
    if config.unit_norm:
        cell.W_dec /= cell.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if config.init.encoder == "tied":
        low = config.architecture == "jumprelu" and config.init.threshold is None
        scale = 0.1 if low else 1.0
        if rows.target is None:
            torch.mul(cell.W_dec, scale, out=cell.W_enc)
        else:  # nothing to tie: what a transcoder reads and what it writes are different activations
            _fill(cell, cell.W_enc, "random", generator, fan_in=d)
            cell.W_enc *= scale / cell.W_enc.norm(dim=1, keepdim=True).clamp_min(1e-12)
    else:
        _fill(cell, cell.W_enc, config.init.encoder, generator, fan_in=d)
        if config.init.encoder == "torch":
            bound = 1 / math.sqrt(d)
            bias = torch.rand(cell.total, generator=generator) * (2 * bound) - bound
            cell.vectors["b_enc"].copy_(bias[cell.offset : cell.offset + cell.n])
    if config.init.bias != "zeros":
        places = {"b_pre" if config.pre_bias == "untied" else "b_dec": rows.x}
        if rows.target is not None:
            places = {"b_dec": rows.target} | ({"b_pre": rows.x} if config.pre_bias == "untied" else {})
        for name, x in places.items():
            cell.vectors[name].copy_(x.double().mean(0) if config.init.bias == "mean" else geometric_median(x))
    if "theta" in cell.vectors:
        cell.vectors["theta"].fill_(config.init.threshold or FIRST_THRESHOLD)


def _fill(cell: Cell, out: Tensor, kind: str, generator: torch.Generator, *, fan_in: int) -> None:
    """Fill this rank's rows of a matrix [total, d]; every rank draws the whole, some rows at a time."""
    d = out.shape[1]
    bound = {"torch": 1 / math.sqrt(fan_in), "kaiming": math.sqrt(6 / d)}.get(kind, 0.0)
    first, last = cell.offset, cell.offset + cell.n
    for start in range(0, cell.total, 4096):
        size = min(4096, cell.total - start)
        if kind == "random":
            rows = torch.randn(size, d, generator=generator)
        else:
            rows = torch.rand(size, d, generator=generator) * (2 * bound) - bound
        a, b = max(start, first), min(start + size, last)
        if a < b:
            out[a - first : b - first].copy_(rows[a - start : b - start])


def geometric_median(rows: Tensor, *, iterations: int = 100, tolerance: float = 1e-10) -> Tensor:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration. [d] float64"""
    rows = rows.double()
    point = rows.mean(0)
    for _ in range(iterations):
        weights = 1 / (rows - point).norm(dim=1).clamp_min(1e-12)
        nearer = (weights @ rows) / weights.sum()
        moved = float((nearer - point).norm() / point.norm().clamp_min(1e-12))
        point = nearer
        if moved < tolerance:
            break
    return point


def resolve(start: Any) -> SAE | None:
    """An SAE, a path to one in any format, or nothing."""
    if start is None or isinstance(start, SAE):
        return start
    if isinstance(start, (str, os.PathLike)):
        if Path(start).is_file():
            from hubsae.formats.registry import read

            return read(start)
        return factory.user_class(SAE).from_pretrained(start)
    raise ConfigError(f"cannot start from {type(start).__name__}", hint="pass a HubSAE, or the path of one")


def check_warm(config: TrainConfig, d: int, width: int, sae: SAE, d_out: int | None = None) -> None:
    """Raise unless an SAE can start a run of these settings."""
    wrong = []
    if (sae.config.d_out, bool(sae.config.skip)) != (d_out, config.skip):
        wrong.append(f"{_output(sae.config.d_out, sae.config.skip)} instead of {_output(d_out, config.skip)}")
    if sae.d_in != d:
        wrong.append(f"d_in {sae.d_in} instead of {d}")
    if sae.d_sae != width:
        wrong.append(f"d_sae {sae.d_sae} instead of {width}")
    compatible = {"gated": ("gated",)}.get(config.architecture, ("topk", "batch_topk", "relu", "jumprelu"))
    if sae.config.architecture not in compatible:
        wrong.append(f"architecture {sae.config.architecture}, which cannot become {config.architecture}")
    if sae.config.token_norm != "none":
        wrong.append(f"token_norm {sae.config.token_norm}, which training does not have")
    if wrong:
        raise ConfigError(
            f"{config.name}: the SAE to start from has {'; '.join(wrong)}",
            hint="choose another start, or set d_sae / the activations to match it",
        )


def _output(d_out: int | None, skip: bool | None) -> str:
    if d_out is None:
        return "an autoencoder's output"
    return f"an output of width {d_out}" + (" with a skip matrix" if skip else "")


def warm(cell: Cell, sae: SAE, space: Normalizer | None, space_out: Normalizer | None = None) -> None:
    """Start a cell from an SAE, as the same function in this run's training space; the optimiser starts fresh.

    The SAE has passed `check_warm`; `space_out` is the space of what a transcoder predicts. An SAE whose pre-bias is
    tied starts an untied or bias-free one exactly, and the other way round: what one form subtracts moves into the
    encoder bias.
    """
    config, d, d_out = cell.config, cell.W_enc.shape[1], cell.W_dec.shape[1]
    transcoder = sae.config.is_transcoder
    mean, std = (torch.zeros(d), torch.ones(d)) if space is None else (space.mean, space.std)
    output = None
    if transcoder:
        output = (torch.zeros(d_out), torch.ones(d_out)) if space_out is None else (space_out.mean, space_out.std)
    t = unfold(sae.tensors(), mean, std, apply_b_dec_to_input=sae.config.apply_b_dec_to_input, output=output)
    rows = slice(cell.offset, cell.offset + cell.n)
    cell.W_enc.copy_(t.W_enc.t()[rows])
    cell.W_dec.copy_(t.W_dec[rows])
    # what the SAE subtracts before encoding against what this cell will: p moves to b_dec or to nothing
    p = torch.zeros(d, dtype=torch.float64) if t.pre_bias is None else t.pre_bias
    c = torch.zeros(d, dtype=torch.float64) if config.pre_bias == "none" or transcoder else t.b_dec
    shift = (c - p) @ t.W_enc
    names = {"b_enc": "b_gate", "b_mag": "b_mag"} if config.architecture == "gated" else {"b_enc": "b_enc"}
    for mine, theirs in names.items():
        scaled = shift * t.r_mag.exp() if mine == "b_mag" and t.r_mag is not None else shift
        cell.vectors[mine].copy_((t.encoder_biases[theirs] + scaled)[rows])
    if t.r_mag is not None and "r_mag" in cell.vectors:
        cell.vectors["r_mag"].copy_(t.r_mag[rows])
    cell.vectors["b_dec"].copy_(t.b_dec)
    if "b_pre" in cell.vectors:
        cell.vectors["b_pre"].copy_(c)
    if t.W_skip is not None:
        cell.vectors["W_skip"].copy_(t.W_skip)
    if "theta" in cell.vectors:
        has = sae.config.architecture == "jumprelu"
        theta = (
            sae.threshold.detach().clamp_min(0)
            if has
            else torch.full((cell.total,), config.init.threshold or FIRST_THRESHOLD)
        )
        cell.vectors["theta"].copy_(theta[rows])
    norms = cell.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if config.unit_norm and bool((norms - 1).abs().max() > 1e-3):
        if config.architecture in ("relu", "jumprelu"):
            # the norm moves to the encoder side: the same function, codes in other units
            cell.W_dec /= norms
            cell.W_enc *= norms
            cell.vectors["b_enc"] *= norms[:, 0]
            if "theta" in cell.vectors:
                cell.vectors["theta"] *= norms[:, 0]
        else:
            # there codes compete with each other, so other units would be another selection: rows keep their norms
            cell.row_norms.copy_(norms)
            cell.keeps_norms = True
    if config.architecture == "batch_topk":
        cell.threshold = sae.config.threshold
