"""Folding a normaliser and a pre-bias changes nothing but rounding, and unfolding gives the training space back."""

from __future__ import annotations

import pytest
import torch

from hubsae import HubSAE, Normalizer, SAEConfig
from hubsae.core.errors import ConfigError
from hubsae.core.fold import TrainedTensors, fold, fold_decoder_norms, unfold

D, M, K, N = 96, 384, 16, 512


def statistics(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(D, generator=generator)
    std = torch.rand(D, generator=generator) + 0.5
    if kind == "outliers":
        mean[3], std[3] = 3000.0, 40.0
        mean[10], std[10] = -250.0, 5.0
        std[20] = 1e-3
    return mean, std


def trained(bias: str, dtype=torch.float32) -> TrainedTensors:
    torch.manual_seed(0)
    W_dec = torch.randn(M, D)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_d = torch.randn(D) * 0.2
    p = {"tied": b_d, "untied": torch.randn(D) * 0.2, "none": None}[bias]
    W_enc = W_dec.t() + 0.05 * torch.randn(D, M)
    cast = TrainedTensors(W_enc, W_dec, b_d, p, {"b_enc": torch.randn(M) * 0.1})
    return TrainedTensors(*(v.to(dtype) if isinstance(v, torch.Tensor) else v for v in cast[:4]), cast[4])


def reference(t: TrainedTensors, mean, std, x):
    """float64, in the training space, never folded."""
    z = (x.double() - mean.double()) / std.double()
    p = 0 if t.pre_bias is None else t.pre_bias.double()
    pre = (z - p) @ t.W_enc.double() + t.encoder_biases["b_enc"].double()
    values, indices = pre.topk(K)
    codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    return codes, (codes @ t.W_dec.double() + t.b_dec.double()) * std.double() + mean.double()


@pytest.mark.parametrize("bias", ["tied", "untied", "none"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", ["ordinary", "outliers"])
def test_folded_float32_matches_unfolded_float64(bias, subtract, kind):
    t, (mean, std) = trained(bias), statistics(kind)
    torch.manual_seed(5)
    x = torch.randn(N, D) * std + mean
    codes, x_hat = reference(t, mean, std, x)
    tensors, flag = fold(t, mean, std, apply_b_dec_to_input=subtract)
    assert flag is subtract
    config = SAEConfig(architecture="topk", d_in=D, d_sae=M, k=K, apply_b_dec_to_input=subtract)
    sae = HubSAE(config, tensors)
    got = sae.encode(x)
    same = ((got != 0) == (codes != 0)).all(1)
    # subtracting first is exact to rounding; without it a large mean passes through the product
    assert same.float().mean() >= (1.0 if subtract or kind == "ordinary" else 0.99)
    assert (got - codes)[same].abs().max() < (1e-5 if subtract or kind == "ordinary" else 1e-3)
    error = (sae(x).double() - x_hat)[same].norm() / x_hat[same].norm()
    assert error < 1e-6


def test_the_same_in_float64_is_exact_to_1e_12():
    t, (mean, std) = trained("untied", torch.float64), statistics("outliers")
    t = t._replace(encoder_biases={"b_enc": t.encoder_biases["b_enc"].double()})
    x = (torch.randn(N, D) * std + mean).double()
    codes, x_hat = reference(t, mean, std, x)
    tensors, _ = fold(t, mean, std)
    sae = HubSAE(SAEConfig(architecture="topk", d_in=D, d_sae=M, k=K, dtype="float64"), tensors)
    assert torch.equal(sae.encode(x) != 0, codes != 0)
    assert (sae.encode(x) - codes).abs().max() < 1e-10
    assert (sae(x) - x_hat).norm() / x_hat.norm() < 1e-13


def test_what_needs_no_arithmetic_passes_bit_for_bit():
    tied = trained("tied")
    tensors, subtract = fold(tied)
    assert subtract
    assert torch.equal(tensors["b_enc"], tied.encoder_biases["b_enc"])
    assert torch.equal(tensors["W_enc"], tied.W_enc)
    none = trained("none")
    tensors, subtract = fold(none)
    assert not subtract
    assert torch.equal(tensors["b_enc"], none.encoder_biases["b_enc"])


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_unfold_inverts_fold(subtract, gated):
    t, (mean, std) = trained("untied", torch.float64), statistics("outliers")
    biases = (
        {"b_gate": torch.randn(M).double(), "b_mag": torch.randn(M).double()}
        if gated
        else {"b_enc": t.encoder_biases["b_enc"].double()}
    )
    t = t._replace(encoder_biases=biases, r_mag=torch.randn(M).double() * 0.1 if gated else None)
    tensors, _ = fold(t, mean, std, apply_b_dec_to_input=subtract)
    back = unfold(tensors, mean, std, apply_b_dec_to_input=subtract)
    torch.testing.assert_close(back.W_enc, t.W_enc)
    torch.testing.assert_close(back.W_dec, t.W_dec)
    torch.testing.assert_close(back.b_dec, t.b_dec)
    # the pre-bias may have moved into the encoder bias: the pre-activations are what must agree
    z = torch.randn(20, D, dtype=torch.float64)
    for name, bias in biases.items():
        scale = t.r_mag.exp() if name == "b_mag" and t.r_mag is not None else 1.0
        want = (z - t.pre_bias) @ t.W_enc * scale + bias
        p = 0 if back.pre_bias is None else back.pre_bias
        got = (z - p) @ back.W_enc * scale + back.encoder_biases[name]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_decoder_norms_move_into_the_encoder():
    t = trained("tied", torch.float64)
    t = t._replace(W_dec=t.W_dec * (torch.rand(M, 1).double() + 0.5), encoder_biases={"b_enc": torch.randn(M).double()})
    z = torch.randn(64, D, dtype=torch.float64)
    norms = t.W_dec.norm(dim=1)
    scaled = ((z - t.pre_bias) @ t.W_enc + t.encoder_biases["b_enc"]) * norms
    values, indices = scaled.topk(K)
    want = (torch.zeros_like(scaled).scatter(1, indices, values.relu()) / norms) @ t.W_dec + t.b_dec
    tensors, _ = fold(fold_decoder_norms(t))
    sae = HubSAE(SAEConfig(architecture="topk", d_in=D, d_sae=M, k=K, dtype="float64"), tensors)
    torch.testing.assert_close(sae(z), want)


def test_statistics_that_cannot_be_divided_by_are_refused():
    with pytest.raises(ConfigError, match="standard deviation of zero"):
        Normalizer(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ConfigError, match="NaN"):
        Normalizer(torch.tensor([float("nan")]), torch.ones(1))
