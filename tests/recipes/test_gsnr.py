"""The gradient signal-to-noise ratio is that of gradients taken by autograd, batch by batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.recipes.registry import find_recipe
from hubsae.train import SparsityConfig, TrainConfig, train

sys.path.insert(0, str(Path(__file__).parents[1]))
import reference

gsnr = find_recipe("fast").module("gsnr").gsnr

CONFIGS = [
    TrainConfig(name="standard", architecture="relu", d_sae=24, loss="sum", pre_bias="none", batch_size=64, lr=1e-2,
                sparsity=SparsityConfig(l1=0.3)),
    TrainConfig(name="jumprelu", architecture="jumprelu", d_sae=16, loss="sum", pre_bias="none", batch_size=64, lr=1e-2,
                sparsity=SparsityConfig(l0=0.2, bandwidth=0.5)),
    TrainConfig(name="topk", architecture="topk", d_sae=20, k=3, loss="sum", pre_bias="none", batch_size=64, lr=1e-2),
]  # fmt: skip


def by_autograd(config: TrainConfig, sae: SAE, batches: list[torch.Tensor]) -> tuple[float, float]:
    names = ["W_enc", "W_dec", "b_enc", "b_dec"] + ["threshold"] * (config.architecture == "jumprelu")
    leaves = {name: sae.tensors()[name].detach().clone().requires_grad_() for name in names}
    found = []
    for x in batches:
        pre = x @ leaves["W_enc"] + leaves["b_enc"]
        width = config.sparsity.bandwidth
        if config.architecture == "relu":
            z = pre.relu()
            penalty = config.sparsity.l1 * z.sum(1).mean()
        elif config.architecture == "topk":
            z, penalty = reference.topk_codes(pre, config.k or 0), 0.0
        else:
            z = reference.jumprelu_codes(pre, leaves["threshold"], width)
            penalty = config.sparsity.l0 * reference.l0(pre, leaves["threshold"], width)
        loss = (z @ leaves["W_dec"] + leaves["b_dec"] - x).square().sum(1).mean() + penalty
        found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(leaves.values()))]).double())
    g = torch.stack(found)  # [batches, parameters]
    variance = g.var(0)
    signal = g.mean(0).square() - variance / len(batches)
    moves = variance > 1e-12 * g.square().mean(0)
    return float(signal.sum() / variance.sum()), float((signal[moves] / variance[moves]).mean())


def test_it_is_what_autograd_gives_for_every_kind_in_one_pass():
    x = torch.randn(1600, 8, generator=torch.Generator().manual_seed(0)) @ torch.randn(8, 8) + 1
    saes = {}
    for config in CONFIGS:
        saes[config.name] = train(config, x, quiet=True).sae
    batches = list(x.split(100))
    found = gsnr(CONFIGS, saes, batches)
    for config in CONFIGS:
        pooled, mean = by_autograd(config, saes[config.name], batches)
        assert found[config.name].pooled == pytest.approx(pooled, rel=2e-3, abs=1e-4), config.name
        assert found[config.name].mean == pytest.approx(mean, rel=2e-3, abs=1e-4), config.name
        assert found[config.name].batches == 16


def test_batches_that_agree_have_a_larger_ratio_and_noise_alone_has_none():
    config = TrainConfig(name="a", architecture="relu", d_sae=16, batch_size=64, pre_bias="none")
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(6400, 8, generator=generator)
    sae = train(config, noise, quiet=True).sae
    assert sae is not None
    large = gsnr([config], {"a": sae}, (3 + noise).split(100))["a"].pooled
    small = gsnr([config], {"a": sae}, (3 + noise).split(10))["a"].pooled
    assert large > 4 * small > 0
    with pytest.raises(DataError, match="no variance"):
        gsnr([config], {"a": sae}, [noise])
