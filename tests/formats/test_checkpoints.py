"""PyTorch checkpoints of the published releases, each compared with a forward written from its own code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import AmbiguousFormatError, ConfigError, FormatError
from hubsae.formats import detect, estimate_threshold, read, write
from hubsae.formats.base import ReadWarning

from .conftest import D_IN, D_SAE, K


class ChainSAE(nn.Module):
    """RL chains: top-k without a ReLU; the pre-bias is not added back."""

    def __init__(self, rand):
        super().__init__()
        torch.manual_seed(0)  # of the linear layers: the same SAE in every run
        self.b_pre = nn.Parameter(rand(D_IN))
        self.encoder, self.decoder = nn.Linear(D_IN, D_SAE), nn.Linear(D_SAE, D_IN)

    def codes(self, x):
        z = self.encoder(x - self.b_pre)
        top = torch.topk(z, K, dim=-1)
        return torch.zeros_like(z).scatter_(-1, top.indices, top.values)

    def forward(self, x):
        return self.decoder(self.codes(x))


class GridSAE(ChainSAE):
    """The grid: the largest of the whole batch, then ReLU; the pre-bias is added back."""

    def codes(self, x):
        pre = self.encoder(x - self.b_pre)
        cut = pre.reshape(-1).topk(int(pre.numel() * K / pre.shape[-1])).values.min()
        return F.relu(pre * (pre >= cut))

    def forward(self, x):
        return self.decoder(self.codes(x)) + self.b_pre


def save_chain(model, path, **config):
    full = {"d_model": D_IN, "d_sae": D_SAE, "k": K, "source": "ppo_step30_layer6", "seed": None,
            "init_from_stage": "ppo_step10", "best_epoch": 20, "best_val_loss": 0.0188}  # fmt: skip
    torch.save({"state_dict": model.state_dict(), "config": full | config}, path)


def test_rl_chain_checkpoint(rand, x, same, tmp_path):
    model = ChainSAE(rand)
    path = tmp_path / "sae_ppo_step30_layer6.pt"
    save_chain(model, path)
    assert [r.format for r in detect(path)] == ["rl_chain"]
    sae = read(path)
    same(sae, x, model.codes(x), model(x))
    assert sae.config.topk_relu is False and sae.metadata.decoder.decode_adds_b_pre is False
    assert (sae.metadata.base_model.stage, sae.metadata.base_model.step) == ("ppo_step30", 30)
    assert sae.metadata.hook.module_path == "model.layers.6"
    assert sae.metadata.training.warm_start.id == "ppo_step10"


def test_rl_chain_selects_negative_latents_as_its_code_does(rand, x, same, tmp_path):
    model = ChainSAE(rand)
    with torch.no_grad():
        model.encoder.bias -= 30.0  # fewer than k positive pre-activations on every token
    save_chain(model, tmp_path / "sae_base_layer6.pt")
    codes = model.codes(x)
    assert bool((codes < 0).any())
    same(read(tmp_path / "sae_base_layer6.pt"), x, codes, model(x))
    assert bool((read(tmp_path / "sae_base_layer6.pt", topk_relu=True).encode(x) >= 0).all())


def test_rl_chain_from_before_the_pre_bias(rand, x, same, tmp_path):
    model = ChainSAE(rand)
    with torch.no_grad():
        model.b_pre.zero_()
    state = {k: v for k, v in model.state_dict().items() if k != "b_pre"}
    torch.save({"state_dict": state, "config": {"d_model": D_IN, "d_sae": D_SAE, "k": K}}, tmp_path / "sae_a_layer6.pt")
    same(read(tmp_path / "sae_a_layer6.pt"), x, model.codes(x), model(x))


def test_grid_checkpoint_uses_the_batch_rule(rand, x, same, tmp_path):
    model = GridSAE(rand)
    path = tmp_path / f"BatchTopK_exp4x_k{K}.pt"
    torch.save(model.state_dict(), path)
    assert [r.format for r in detect(path)] == ["grid"]
    with pytest.warns(ReadWarning, match="depend on it"):
        sae = read(path)
    same(sae, x, model.codes(x), model(x))
    assert (sae.config.architecture, sae.config.k, sae.config.threshold) == ("batch_topk", K, None)
    assert sae.metadata.decoder.decode_adds_b_pre is True
    # codes really depend on the batch, which is why the warning exists
    assert not torch.equal(sae.encode(x)[:9], sae.encode(x[:9]))


def test_threshold_estimated_on_data_gives_the_batch_rule_without_the_batch(rand, x, tmp_path):
    torch.save(GridSAE(rand).state_dict(), tmp_path / f"BatchTopK_exp4x_k{K}.pt")
    with pytest.warns(ReadWarning):
        sae = read(tmp_path / f"BatchTopK_exp4x_k{K}.pt")
    fixed = estimate_threshold(sae, x, batch_size=len(x))
    # one batch of exactly these tokens: the strict `>` of a stored threshold keeps what the rule's `>=` keeps
    assert torch.equal(fixed.encode(x) != 0, sae.encode(x) != 0)
    assert torch.allclose(fixed.encode(x[:5]), fixed.encode(x)[:5], atol=1e-5)
    assert not torch.allclose(sae.encode(x[:5]), sae.encode(x)[:5], atol=1e-5)
    assert fixed.metadata.config.threshold == fixed.config.threshold


def test_same_five_keys_in_a_bare_dict_without_a_telling_name_is_ambiguous(rand, x, same, tmp_path):
    chain, grid = ChainSAE(rand), GridSAE(rand)
    grid.load_state_dict(chain.state_dict())
    path = tmp_path / "final.pt"
    torch.save(chain.state_dict(), path)
    with pytest.raises(AmbiguousFormatError, match="2 readings fit") as caught:
        read(path, k=K)
    assert "rl_chain" in str(caught.value) and "grid" in str(caught.value) and "format=" in caught.value.hint
    # the readings differ in what they compute, and each can be chosen
    same(read(path, format="rl_chain", k=K), x, chain.codes(x), chain(x))
    with pytest.warns(ReadWarning):
        same(read(path, format="grid", architecture="batch_topk", k=K), x, grid.codes(x), grid(x))


def test_choice_against_the_reader_is_recorded(rand, x, tmp_path):
    model = ChainSAE(rand)
    save_chain(model, tmp_path / "sae_a_layer6.pt")
    sae = read(tmp_path / "sae_a_layer6.pt", decode_adds_b_pre=True)
    assert torch.allclose(sae(x), model(x) + model.b_pre, atol=1e-4)
    assert sae.metadata.decoder.overridden == ["decode_adds_b_pre"]
    with pytest.raises(ConfigError, match="decode_add_b_pre") as caught:
        read(tmp_path / "sae_a_layer6.pt", decode_add_b_pre=True)
    assert "decode_adds_b_pre" in caught.value.hint


def test_grid_name_that_contradicts_the_shape_and_kinds_that_are_not_published(rand, tmp_path):
    model = GridSAE(rand)
    torch.save(model.state_dict(), tmp_path / "BatchTopK_exp8x_k6.pt")
    with pytest.raises(FormatError, match="8x expansion"):
        read(tmp_path / "BatchTopK_exp8x_k6.pt")
    torch.save(model.state_dict(), tmp_path / "JumpReLU_exp4x_t0.5.pt")
    with pytest.raises(FormatError, match="jumprelu"):
        read(tmp_path / "JumpReLU_exp4x_t0.5.pt")


def test_missing_k_is_asked_for(rand, tmp_path):
    model = ChainSAE(rand)
    save_chain(model, tmp_path / "sae_a_layer6.pt", k=None)
    with pytest.raises(ConfigError, match="needs k") as caught:
        read(tmp_path / "sae_a_layer6.pt")
    assert "k=" in caught.value.hint
    assert read(tmp_path / "sae_a_layer6.pt", k=3).config.k == 3


# ---- JumpReLU with its normaliser -------------------------------------------------------------------------------


@pytest.mark.parametrize("outlier", [False, True])
def test_jumprelu_checkpoint_folds_its_normaliser(outlier, rand, same, tmp_path):
    W_enc, W_dec, b_enc, b_dec = rand(D_IN, D_SAE, scale=0.3), rand(D_SAE, D_IN, scale=0.3), rand(D_SAE), rand(D_IN)
    log_threshold, mean = rand(D_SAE, scale=0.3) - 0.5, rand(D_IN)
    if outlier:
        mean[3], mean[20] = 3000.0, -250.0
    scale = torch.tensor(17.5)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "log_threshold": log_threshold}
    path = tmp_path / "jumprelu_layer_05.pt"
    torch.save(
        {"sae_state_dict": state, "layer": 5, "hook": "resid_post", "d_in": D_IN, "d_sae": D_SAE,
         "normalization_mean": mean, "normalization_scale": scale,
         "train_config": {"learning_rate": 3e-4, "batch_size": 4096, "steps": 5000, "l0_coefficient": 1e-4, "seed": 0},
         "cache_manifest": {"model_id": "Qwen/Qwen2.5-0.5B-Instruct", "total_tokens": 1_000_000},
         "history": [{"step": 1, "train_mse": 0.5}], "best_validation_hard_objective": 0.1}, path,
    )  # fmt: skip
    assert [r.format for r in detect(path)] == ["jumprelu_pt"]
    x = rand(200, D_IN) * scale + mean
    # reference in float64: with outliers the float32 forward of the source is itself less exact
    z = (x.double() - mean.double()) / scale.double()
    pre = z @ W_enc.double() + b_enc.double()
    codes = pre * (pre > log_threshold.double().exp())
    rebuilt = (codes @ W_dec.double() + b_dec.double()) * scale.double() + mean.double()
    sae = read(path)
    same(sae, x, codes, rebuilt)
    assert torch.equal(sae.normalizer.mean, mean) and float(sae.normalizer.std[0]) == 17.5
    assert sae.normalizer.count == 1_000_000
    assert sae.metadata.base_model.id == "Qwen/Qwen2.5-0.5B-Instruct"
    assert sae.metadata.training.loss == "mse + 0.0001 * L0"


# ---- openai/sparse_autoencoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ["ReLU", "TopK"])
def test_openai_checkpoint(activation, tied, rand, x, same, tmp_path):
    pre_bias, latent_bias, encoder = rand(D_IN), rand(D_SAE), rand(D_SAE, D_IN, scale=0.3)
    decoder = encoder.t().clone() if tied else rand(D_IN, D_SAE, scale=0.3)
    checkpoint = {"pre_bias": pre_bias, "encoder.weight": encoder, "latent_bias": latent_bias,
                  "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long), "activation": activation,
                  "activation_state_dict": {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {}}  # fmt: skip
    checkpoint["decoder.linear.weight" if tied else "decoder.weight"] = encoder if tied else decoder
    path = tmp_path / "resid_post_mlp_layer_8.pt"
    torch.save(checkpoint, path)
    assert [r.format for r in detect(path)] == ["openai"]
    inner, mu, std = x, 0.0, 1.0
    if activation == "TopK":
        mu = x.mean(-1, keepdim=True)
        inner = x - mu
        std = inner.std(-1, keepdim=True)
        inner = inner / (std + 1e-5)
    latents = F.linear(inner - pre_bias, encoder, latent_bias)
    if activation == "TopK":
        top = latents.topk(K)
        codes = torch.zeros_like(latents).scatter_(-1, top.indices, top.values.relu())
    else:
        codes = latents.relu()
    rebuilt = (F.linear(codes, decoder) + pre_bias) * std + mu
    same(read(path), x, codes, rebuilt)


# ---- Qwen-Scope, plain dicts -------------------------------------------------------------------------------------


def test_qwen_scope_checkpoint_in_the_hub_cache(rand, x, same, tmp_path):
    W_enc, W_dec, b_enc, b_dec = rand(D_SAE, D_IN), rand(D_IN, D_SAE), rand(D_SAE), rand(D_IN)
    folder = tmp_path / f"models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    torch.save({"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}, folder / "layer7.sae.pt")
    sae = read(folder / "layer7.sae.pt", format="qwen_scope")
    pre = x @ W_enc.t() + b_enc
    top = pre.topk(K)
    codes = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    same(sae, x, codes, codes @ W_dec.t() + b_dec)
    assert (sae.metadata.base_model.id, sae.metadata.hook.layer) == ("Qwen/Qwen3-1.7B-Base", 7)
    assert [r.format for r in detect(folder / "layer7.sae.pt")] == ["qwen_scope"]


def test_qwen_scope_outside_its_repo_needs_k_and_stays_readable_when_square(rand, x, same, tmp_path):
    W_enc, W_dec, b_enc, b_dec = rand(D_IN, D_IN), rand(D_IN, D_IN), rand(D_IN), rand(D_IN)
    torch.save({"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}, tmp_path / "layer0.sae.pt")
    with pytest.raises(ConfigError, match="needs k"):
        read(tmp_path / "layer0.sae.pt")
    pre = x @ W_enc.t() + b_enc  # the format fixes the orientation, whatever the shape
    top = pre.topk(3)
    codes = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    same(read(tmp_path / "layer0.sae.pt", k=3), x, codes, codes @ W_dec.t() + b_dec)


@pytest.mark.parametrize("turned", [False, True])
def test_plain_dict_says_what_it_does_not_say(turned, rand, x, same, tmp_path):
    W_enc, W_dec, b_enc, b_dec = rand(D_IN, D_SAE), rand(D_SAE, D_IN), rand(D_SAE), rand(D_IN)
    stored = {"W_enc": W_enc.t() if turned else W_enc, "W_dec": W_dec.t() if turned else W_dec}
    torch.save(stored | {"b_enc": b_enc, "b_dec": b_dec}, tmp_path / "mine.pt")
    with pytest.raises(FormatError, match="how latents are selected"):
        read(tmp_path / "mine.pt")
    with pytest.raises(FormatError, match="whether b_dec is subtracted"):
        read(tmp_path / "mine.pt", architecture="relu")
    for subtract in (True, False):
        codes = ((x - b_dec if subtract else x) @ W_enc + b_enc).relu()
        sae = read(tmp_path / "mine.pt", architecture="relu", apply_b_dec_to_input=subtract)
        same(sae, x, codes, codes @ W_dec + b_dec)


def test_square_matrices_of_a_layout_without_orientation_are_refused(rand, tmp_path):
    torch.save({"W_enc": rand(8, 8), "W_dec": rand(8, 8), "b_enc": rand(8), "b_dec": rand(8)}, tmp_path / "relu.pt")
    with pytest.raises(FormatError, match="square ones") as caught:
        read(tmp_path / "relu.pt", architecture="relu", apply_b_dec_to_input=True)
    assert "transposed=" in caught.value.hint
    a = read(tmp_path / "relu.pt", architecture="relu", apply_b_dec_to_input=True, transposed=False)
    b = read(tmp_path / "relu.pt", architecture="relu", apply_b_dec_to_input=True, transposed=True)
    assert torch.equal(a.W_enc, b.W_enc.t()) and torch.equal(a.W_dec, b.W_dec.t())


def test_half_precision_is_widened_and_integers_are_refused(rand, tmp_path):
    model = ChainSAE(rand)
    state = {k: v.bfloat16() for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "config": {"k": K}}, tmp_path / "sae_a_layer1.pt")
    sae = read(tmp_path / "sae_a_layer1.pt")
    assert sae.dtype == torch.float32 and sae.config.dtype == "float32"
    assert torch.equal(sae.W_enc.t(), state["encoder.weight"].float())
    state["encoder.weight"] = torch.zeros(D_SAE, D_IN, dtype=torch.int32)
    torch.save({"state_dict": state, "config": {"k": K}}, tmp_path / "sae_b_layer1.pt")
    with pytest.raises(FormatError, match="W_enc in floating point, found int32"):
        read(tmp_path / "sae_b_layer1.pt")


def test_latents_of_the_layout_are_not_rescaled(rand, x, tmp_path):
    """Folding keeps latents in the units of training: a mean activation stays comparable with published ones."""
    model = ChainSAE(rand)
    save_chain(model, tmp_path / "sae_a_layer1.pt")
    with torch.no_grad():
        ratio = read(tmp_path / "sae_a_layer1.pt").encode(x).sum() / model.codes(x).sum()
    assert math.isclose(float(ratio), 1.0, rel_tol=1e-4)


@pytest.mark.parametrize("kind", ["rl_chain", "tensors", "ours"])
def test_checkpoint_may_be_saved_over_while_it_is_loaded(kind, rand, x, tmp_path):
    """Mapped files that shrink kill the process that has them mapped; trainers save over their checkpoints."""
    path = tmp_path / ("sae_a_layer1.pt" if kind == "rl_chain" else "relu.pt")
    if kind == "rl_chain":
        save_chain(ChainSAE(rand), path)
        sae = read(path)
    elif kind == "tensors":
        state = {"W_enc": rand(D_IN, D_SAE), "W_dec": rand(D_SAE, D_IN), "b_enc": rand(D_SAE), "b_dec": rand(D_IN)}
        torch.save(state, path)
        sae = read(path, architecture="relu", apply_b_dec_to_input=False)
    else:
        sae = read(write(HubSAE.random(SAEConfig(architecture="relu", d_in=D_IN, d_sae=D_SAE)), path, "pt"))
    with torch.no_grad():
        before = sae(x)
        path.write_bytes(b"")
        assert torch.equal(sae(x), before)
