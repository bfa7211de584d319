"""Folding an input normaliser into the weights loses nothing that float32 itself does not lose."""

from __future__ import annotations

import pytest
import torch

from hubsae import HubSAE, SAEConfig
from hubsae.core.fold import TrainedTensors, fold

D, WIDE, K, TOKENS = 128, 1024, 16, 1024


def statistics(kind, generator):
    mean, std = torch.randn(D, generator=generator), 0.5 + torch.rand(D, generator=generator)
    if kind == "outliers":
        mean[3], std[3] = 3000.0, 40.0
        mean[40], std[40] = -250.0, 5.0
        std[77] = 1e-3
    return mean, std


def pre_bias(kind, b_d, generator):
    return {"tied": b_d, "untied": torch.randn(D, generator=generator), "none": None}[kind]


@pytest.mark.parametrize("bias", ["tied", "untied", "none"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("stats", ["ordinary", "outliers"])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
def test_folded_sae_against_the_unfolded_in_float64(architecture, stats, subtract, bias, tmp_path):
    generator = torch.Generator().manual_seed(5)
    mean, std = statistics(stats, generator)
    W_enc = torch.randn(D, WIDE, generator=generator) / D**0.5
    W_dec = torch.randn(WIDE, D, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_d = 0.1 * torch.randn(D, generator=generator)
    p = pre_bias(bias, b_d, generator)
    names = ("b_gate", "b_mag") if architecture == "gated" else ("b_enc",)
    biases = {name: 0.1 * torch.randn(WIDE, generator=generator) for name in names}
    r_mag = 0.1 * torch.randn(WIDE, generator=generator) if architecture == "gated" else None
    threshold = 0.5 + torch.rand(WIDE, generator=generator)
    x = torch.randn(TOKENS, D, generator=generator) * std + mean

    # what training computed, in float64 and in its own space
    z = (x.double() - mean.double()) / std.double()
    product = (z - (0 if p is None else p.double())) @ W_enc.double()
    if architecture == "topk":
        pre = product + biases["b_enc"].double()
        top = pre.topk(K)
        codes = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    elif architecture == "jumprelu":
        pre = product + biases["b_enc"].double()
        codes = pre * (pre > threshold.double())
    else:
        assert r_mag is not None
        magnitude = (product * r_mag.double().exp() + biases["b_mag"].double()).relu()
        codes = magnitude * (product + biases["b_gate"].double() > 0)
    rebuilt = (codes @ W_dec.double() + b_d.double()) * std.double() + mean.double()

    tensors, flag = fold(TrainedTensors(W_enc, W_dec, b_d, p, biases, r_mag), mean, std, apply_b_dec_to_input=subtract)
    if architecture == "jumprelu":
        tensors["threshold"] = threshold
    config = SAEConfig(
        architecture=architecture,
        d_in=D,
        d_sae=WIDE,
        k=K if architecture == "topk" else None,
        apply_b_dec_to_input=flag,
    )
    sae = HubSAE(config, tensors)
    assert flag is subtract
    found = sae.encode(x)
    kept = ((found != 0) == (codes != 0)).all(-1)
    rows, worst = float(kept.float().mean()), float((found.double() - codes)[kept].abs().max())
    error = float((sae(x).double() - rebuilt)[kept].norm() / rebuilt[kept].norm())
    # the measured errors of a fold in float64 stored in float32, with a factor of two for other machines
    if architecture == "topk":
        assert rows == 1.0 or (stats == "outliers" and not subtract and rows >= 0.998)
    else:
        # a value within rounding of a threshold may fall on either side of it
        assert rows >= (0.97 if stats == "outliers" and not subtract else 0.99)
    # without the subtraction a mean of 3000 stays inside the product: ten times less exact, hence the default
    assert worst <= (6e-5 if stats == "outliers" and not subtract else 8e-6)
    assert error <= (3e-7 if architecture == "topk" else 1e-6)


def test_stored_tensors_reproduce_the_fold_exactly(tmp_path):
    generator = torch.Generator().manual_seed(1)
    mean, std = statistics("outliers", generator)
    trained = TrainedTensors(
        torch.randn(D, WIDE, generator=generator), torch.randn(WIDE, D, generator=generator),
        torch.randn(D, generator=generator), None, {"b_enc": torch.randn(WIDE, generator=generator)},
    )  # fmt: skip
    tensors, flag = fold(trained, mean, std)
    config = SAEConfig(architecture="relu", d_in=D, d_sae=WIDE, apply_b_dec_to_input=flag)
    HubSAE(config, tensors).save_pretrained(tmp_path)
    from hubsae.formats import read

    for name, tensor in read(tmp_path).tensors().items():
        assert torch.equal(tensor, tensors[name])


@pytest.mark.slow
@pytest.mark.parametrize("subtract", [True, False])
def test_full_size_with_outlier_dimensions(subtract):
    """d_in 896, d_sae 7168, k 64, 4096 tokens: the shape the published table was measured at."""
    d, wide, k = 896, 7168, 64
    generator = torch.Generator().manual_seed(5)
    mean, std = torch.randn(d, generator=generator), 0.5 + torch.rand(d, generator=generator)
    mean[3], std[3], mean[40], std[40], std[77] = 3000.0, 40.0, -250.0, 5.0, 1e-3
    W_enc, W_dec = (
        torch.randn(d, wide, generator=generator) / d**0.5,
        torch.randn(wide, d, generator=generator) / d**0.5,
    )
    b_d, p = 0.1 * torch.randn(d, generator=generator), torch.randn(d, generator=generator)
    b_enc = 0.1 * torch.randn(wide, generator=generator)
    x = torch.randn(4096, d, generator=generator) * std + mean
    z = (x.double() - mean.double()) / std.double()
    pre = (z - p.double()) @ W_enc.double() + b_enc.double()
    top = pre.topk(k)
    codes = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    rebuilt = (codes @ W_dec.double() + b_d.double()) * std.double() + mean.double()
    tensors, flag = fold(
        TrainedTensors(W_enc, W_dec, b_d, p, {"b_enc": b_enc}), mean, std, apply_b_dec_to_input=subtract
    )
    sae = HubSAE(SAEConfig(architecture="topk", d_in=d, d_sae=wide, k=k, apply_b_dec_to_input=flag), tensors)
    found = sae.encode(x)
    kept = ((found != 0) == (codes != 0)).all(-1)
    assert float(kept.double().mean()) >= (0.9997 if subtract else 0.998)
    assert float((found.double() - codes)[kept].abs().max()) <= (1e-5 if subtract else 8e-5)
    assert float((sae(x).double() - rebuilt)[kept].norm() / rebuilt[kept].norm()) <= 6e-7
