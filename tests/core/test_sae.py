"""HubSAE computes what its formula says, for every selection rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import ConfigError, HookError

D, M, K = 12, 40, 5
RULES = {
    "relu": {"architecture": "relu"},
    "topk": {"architecture": "topk", "k": K},
    "signed_topk": {"architecture": "topk", "k": K, "topk_relu": False},
    "batch_rule": {"architecture": "batch_topk", "k": K},
    "batch_threshold": {"architecture": "batch_topk", "k": K, "threshold": 0.25},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
}


def make(rule: str, **more) -> HubSAE:
    torch.manual_seed(3)
    config = SAEConfig(d_in=D, d_sae=M, **RULES[rule], **more)
    tensors = {name: torch.randn(config.tensor_shape(name)) * 0.3 for name in config.tensor_names}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    return HubSAE(config, tensors)


def slow_encode(sae: HubSAE, x: torch.Tensor) -> torch.Tensor:
    """The formula, dense and obvious, in float64."""
    t = {name: value.double() for name, value in sae.tensors().items()}
    x = x.double().reshape(-1, D)
    c = t["b_dec"] if sae.config.apply_b_dec_to_input else 0
    if sae.config.architecture == "gated":
        raw = (x - c) @ t["W_enc"]
        return ((raw + t["b_gate"]) > 0) * torch.relu(raw * t["r_mag"].exp() + t["b_mag"])
    pre = (x - c) @ t["W_enc"] + t["b_enc"]
    z = torch.zeros_like(pre)
    if sae.config.architecture == "topk":
        for row in range(len(pre)):
            for j in sorted(range(M), key=lambda j: -float(pre[row, j]))[:K]:
                z[row, j] = pre[row, j]
        return z if not sae.config.topk_relu else z.relu()
    if sae.config.architecture == "batch_topk" and sae.config.threshold is None:
        cut = pre.flatten().sort(descending=True).values[K * len(pre) - 1]
        return torch.where(pre >= cut, pre, 0).relu()
    if sae.config.architecture == "batch_topk":
        return torch.where(pre > sae.config.threshold, pre, 0).relu()
    if sae.config.architecture == "jumprelu":
        return torch.where(pre > t["threshold"], pre, 0).relu()
    return pre.relu()


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_codes_and_reconstruction_follow_the_formula(rule, subtract):
    sae = make(rule, apply_b_dec_to_input=subtract)
    x = torch.randn(3, 7, D)
    z = slow_encode(sae, x).reshape(3, 7, M)
    codes = sae.encode_sparse(x)
    assert torch.equal(codes.dense() != 0, z != 0)
    torch.testing.assert_close(codes.dense().double(), z, rtol=1e-5, atol=1e-6)
    x_hat = z @ sae.W_dec.double() + sae.b_dec.double()
    torch.testing.assert_close(sae(x).double(), x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae.decode(codes), rtol=1e-5, atol=1e-5)


def test_signed_topk_keeps_negative_values_and_relu_drops_them():
    signed, plain = make("signed_topk"), make("topk")
    for sae in (signed, plain):
        sae.b_enc.data -= 5
    x = torch.randn(4, D)
    assert (signed.encode_sparse(x).values < 0).any()
    assert (plain.encode_sparse(x).values >= 0).all()


@pytest.mark.parametrize("norm", ["layer_norm", "unit_norm", "constant_norm"])
def test_a_token_norm_is_undone_after_decoding(norm):
    sae = make("topk", token_norm=norm)
    x = torch.randn(6, D) * 30 + 4
    codes = sae.encode_sparse(x)
    scaled = (x - codes.token_mean) / codes.token_scale
    bare = HubSAE(sae.config.model_copy(update={"token_norm": "none"}), sae.tensors())
    torch.testing.assert_close(sae(x), bare(scaled) * codes.token_scale + codes.token_mean, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match=r"normalises each token .* a dense code does not hold it"):
        sae.decode(codes.dense())


def test_unsorted_codes_are_the_same_codes_and_sorted_ones_come_largest_first():
    config = SAEConfig(architecture="topk", d_in=D, d_sae=2048, k=16, topk_relu=False)
    # more rows than are encoded at once
    sae, x = HubSAE.random(config), torch.randn(1100, D)
    in_order, any_order = sae.encode_sparse(x), sae.encode_sparse(x, sorted=False)
    assert (in_order.values.diff(dim=-1) <= 0).all()
    assert torch.equal(in_order.dense(), any_order.dense())


def test_gradients_reach_input_and_weights_through_sparse_codes():
    sae = make("topk").double()
    for p in sae.parameters():
        p.requires_grad_(True)
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sae(x).square().sum(), (x,))
    sae(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sae.parameters())


def test_a_feature_subset_encodes_where_that_is_defined():
    whole = make("jumprelu")
    rows = [3, 17, 20]
    tensors = {n: (t if n == "b_dec" else t[:, rows] if n == "W_enc" else t[rows]) for n, t in whole.tensors().items()}
    part = HubSAE(whole.config.model_copy(update={"d_sae": 3}), tensors, features=rows)
    x = torch.randn(8, D)
    torch.testing.assert_close(part.encode(x), whole.encode(x)[:, rows])

    topk = make("topk")
    tensors = {n: (t if n == "b_dec" else t[:, rows] if n == "W_enc" else t[rows]) for n, t in topk.tensors().items()}
    few = HubSAE(topk.config.model_copy(update={"d_sae": 3, "k": 3}), tensors, features=rows)
    with pytest.raises(ConfigError, match="ranks all latents"):
        few.encode(x)
    torch.testing.assert_close(few.pre_activations(x), topk.pre_activations(x)[:, rows])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"W_enc": torch.zeros(M, D)}, r"W_enc has shape \(40, 12\), expected \(12, 40\) \(transposed\?\)"),
        ({"b_enc": torch.zeros(M - 1)}, r"b_enc has shape \(39,\)"),
        ({"threshold": torch.zeros(M)}, "not part of it: threshold"),
    ],
)
def test_wrong_tensors_are_named(change, says):
    sae = make("topk")
    with pytest.raises(ConfigError, match=says):
        HubSAE(sae.config, {**sae.tensors(), **change})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"architecture": "topk"}, "needs k"),
        ({"architecture": "topk", "k": 99}, "larger than d_sae"),
        ({"architecture": "relu", "threshold": 0.1}, "inference threshold of batch_topk"),
        ({"architecture": "jumprelu", "topk_relu": False}, "signed top-k"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        SAEConfig(d_in=D, d_sae=M, **fields)


def test_wrong_width_is_one_clear_error():
    with pytest.raises(ConfigError, match="width 5, this SAE takes 12"):
        make("topk")(torch.randn(2, 5))


class ToyBlock(nn.Module):
    def __init__(self, as_tuple: bool):
        super().__init__()
        self.lin, self.as_tuple = nn.Linear(D, D), as_tuple

    def forward(self, h):
        return (self.lin(h), "cache") if self.as_tuple else self.lin(h)


class Toy(nn.Module):
    def __init__(self, as_tuple: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([ToyBlock(as_tuple), ToyBlock(as_tuple)])

    def forward(self, h):
        for block in self.layers:
            out = block(h)
            h = out[0] if isinstance(out, tuple) else out
        return h


@pytest.mark.parametrize("as_tuple", [True, False])
def test_attach_splice_and_steer_on_tensor_and_tuple_outputs(as_tuple):
    model, sae, h = Toy(as_tuple), make("topk"), torch.randn(2, 5, D)
    clean = model(h)
    first = model.layers[0].lin(h)
    with sae.attach(model, hook=0) as acts:
        assert torch.equal(model(h), clean)
    assert torch.equal(acts.dense(), sae.encode(first))
    with sae.splice(model, hook=0):
        spliced = model(h)
    torch.testing.assert_close(spliced, model.layers[1].lin(sae(first)))
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 2] = True
    with sae.splice(model, hook=0, mask=mask):
        part = model(h)
    torch.testing.assert_close(part[0, 2], spliced[0, 2])
    torch.testing.assert_close(part[1], clean[1])
    row = sae.W_dec[7]
    with sae.steer(model, feature=7, strength=3.0, hook=1, unit=False):
        torch.testing.assert_close(model(h), clean + 3.0 * row)
    with sae.steer(model, feature=7, strength=3.0, hook=1):
        torch.testing.assert_close(model(h), clean + 3.0 * row / row.norm())
    assert torch.equal(model(h), clean)


def test_a_hook_is_removed_when_the_block_raises():
    model, sae = Toy(False), make("topk")
    with pytest.raises(RuntimeError), sae.splice(model, hook=0):
        raise RuntimeError
    assert not model.layers[0]._forward_hooks


def test_hook_errors_say_what_to_do():
    model, sae = Toy(False), make("topk")
    with pytest.raises(HookError, match="choose a layer from 0 to 1"), sae.splice(model, hook=9):
        pass
    with pytest.raises(HookError, match="pass hook="), sae.splice(model):
        pass
    with pytest.raises(HookError, match="features run from 0 to 39"), sae.steer(model, 40, 1.0, hook=0):
        pass
