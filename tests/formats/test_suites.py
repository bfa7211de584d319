"""Folder layouts of public suites: Gemma Scope, Llamascopium and Llama Scope, bundles with a normaliser."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.normalizer import Normalizer
from hubsae.formats import Release, detect, read, write
from hubsae.formats.base import ReadWarning

from .conftest import D_IN, D_SAE, K


def topk(pre, k=K):
    top = pre.topk(k)
    return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())


# ---- Gemma Scope -------------------------------------------------------------------------------------------------


@pytest.fixture
def gemma(rand):
    return {"w_enc": rand(D_IN, D_SAE, scale=0.3), "w_dec": rand(D_SAE, D_IN, scale=0.3), "b_enc": rand(D_SAE),
            "b_dec": rand(D_IN), "threshold": rand(D_SAE).abs()}  # fmt: skip


def gemma_numbers(t, x):
    pre = x @ t["w_enc"] + t["b_enc"]
    codes = (pre > t["threshold"]) * pre.relu()
    return codes, codes @ t["w_dec"] + t["b_dec"]


def test_gemma_scope_npz(gemma, x, same, tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-mlp" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in gemma.items()})
    for path in (folder, folder / "params.npz"):
        assert [r.format for r in detect(path)] == ["gemma_scope"]
        sae = read(path)
        same(sae, x, *gemma_numbers(gemma, x))
        assert sae.metadata.hook.transformer_lens == "blocks.20.hook_mlp_out"
        assert sae.metadata.base_model.id == "google/gemma-2-2b"
        assert sae.config.apply_b_dec_to_input is False


def test_gemma_scope_2_safetensors(gemma, x, same, tmp_path):
    folder = tmp_path / "resid_post" / "layer_12_width_16k_l0_small"
    folder.mkdir(parents=True)
    save_file(gemma, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.12.output", "model_name": "gemma-v3-1b-pt"}
    (folder / "config.json").write_text(json.dumps(config))
    sae = read(folder)
    same(sae, x, *gemma_numbers(gemma, x))
    assert (sae.metadata.hook.module_path, sae.metadata.base_model.id) == ("model.layers.12", "google/gemma-3-1b-pt")
    assert not sae.config.is_transcoder


def test_gemma_scope_reads_as_in_saelens(gemma, x, same, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    state = {"W_enc": gemma["w_enc"], "W_dec": gemma["w_dec"], **{k: gemma[k] for k in ("b_enc", "b_dec", "threshold")}}
    cfg = {"architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "apply_b_dec_to_input": False,
           "normalize_activations": None, "device": "cpu"}  # fmt: skip
    lens = sae_lens.SAE.load_from_disk("unused", converter=lambda path, device, cfg_overrides: (cfg, state))
    np.savez(tmp_path / "params.npz", **{k: v.numpy() for k, v in gemma.items()})
    same(read(tmp_path), x, lens.encode(x), lens(x))


# ---- Llamascopium ------------------------------------------------------------------------------------------------


def llama_numbers(t, config, norm, x):
    """The forward of its SparseAutoEncoder, normalisation and undoing it included."""
    scale = 1.0
    if config["norm_activation"] == "dataset-wise":
        scale = math.sqrt(D_IN) / norm
    elif config["norm_activation"] == "token-wise":
        scale = math.sqrt(D_IN) / x.norm(dim=-1, keepdim=True)
    inner = x * scale
    if config.get("apply_decoder_bias_to_pre_encoder"):
        inner = inner - t["b_D"]
    pre = inner @ t["W_E"] + t["b_E"]
    norms = t["W_D"].norm(dim=1) if config["sparsity_include_decoder_norm"] else 1.0
    score = pre * norms
    if config["act_fn"] == "relu":
        kept = score.relu()
    elif config["act_fn"] == "jumprelu":
        kept = score * (score > t["activation_function.log_jumprelu_threshold"].exp())
    else:
        kept = topk(score)
    codes = kept / norms
    return codes, kept, (codes @ t["W_D"] + t["b_D"]) / scale


@pytest.mark.parametrize("include_norm", [True, False])
@pytest.mark.parametrize("norm_activation", ["dataset-wise", "token-wise", "inference"])
@pytest.mark.parametrize("act_fn", ["relu", "topk", "jumprelu"])
def test_llamascopium_folder(act_fn, norm_activation, include_norm, rand, x, same, tmp_path):
    t = {
        "W_E": rand(D_IN, D_SAE, scale=0.3),
        "b_E": rand(D_SAE),
        "W_D": rand(D_SAE, D_IN, scale=0.3),
        "b_D": rand(D_IN),
    }
    if act_fn == "jumprelu":
        t["activation_function.log_jumprelu_threshold"] = rand(D_SAE, scale=0.3)
    hook = "blocks.9.hook_resid_post"
    config = {"sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": D_IN,
              "expansion_factor": 4.0, "act_fn": act_fn, "norm_activation": norm_activation,
              "sparsity_include_decoder_norm": include_norm,
              "top_k": K, "use_decoder_bias": True}  # fmt: skip
    save_file(t | {f"dataset_average_activation_norm.{hook}": torch.tensor(11.5)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [r.format for r in detect(tmp_path)] == ["llamascopium"]
    codes, kept, rebuilt = llama_numbers(t, config, 11.5, x)
    sae = read(tmp_path)
    # selection by latents times decoder norm needs latents in those units; all others keep their own
    same(sae, x, kept if act_fn == "topk" else codes, rebuilt)
    assert sae.metadata.hook.transformer_lens == hook


def test_llamascopium_older_names_and_pt(rand, x, same, tmp_path):
    t = {
        "W_E": rand(D_IN, D_SAE, scale=0.3),
        "b_E": rand(D_SAE),
        "W_D": rand(D_SAE, D_IN, scale=0.3),
        "b_D": rand(D_IN),
    }
    old = {"encoder.weight": t["W_E"].t().contiguous(), "encoder.bias": t["b_E"],
           "decoder.weight": t["W_D"].t().contiguous(), "decoder.bias": t["b_D"]}  # fmt: skip
    config = {"sae_type": "sae", "hook_point_in": "blocks.9.hook_resid_post", "d_model": D_IN, "act_fn": "relu",
              "norm_activation": "inference", "sparsity_include_decoder_norm": False,
              "apply_decoder_bias_to_pre_encoder": True}  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    torch.save({"sae": old, "version": "2.0"}, tmp_path / "checkpoints" / "final.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    codes, _, rebuilt = llama_numbers(t, config, None, x)
    same(read(tmp_path), x, codes, rebuilt)


def test_llama_scope_first_release_reads_as_in_saelens(rand, x, same, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    W_E, W_D = rand(D_SAE, D_IN, scale=0.3), rand(D_IN, D_SAE, scale=0.3)
    hyper = {"d_model": D_IN, "d_sae": D_SAE, "hook_point_in": "blocks.19.hook_resid_post", "act_fn": "jumprelu",
             "hook_point_out": "blocks.19.hook_resid_post", "jump_relu_threshold": 0.52,
             "norm_activation": "dataset-wise", "top_k": 50,
             "dataset_average_activation_norm": {"in": 17.125, "out": 17.125},
             "sparsity_include_decoder_norm": True, "use_decoder_bias": True}  # fmt: skip
    folder = tmp_path / "Llama3_1-8B-Base-L19R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {"encoder.weight": W_E, "encoder.bias": rand(D_SAE), "decoder.weight": W_D, "decoder.bias": rand(D_IN)}
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(hyper))
    scale = math.sqrt(D_IN) / 17.125
    state = {"W_enc": W_E.t().contiguous(), "W_dec": W_D.t().contiguous(), "b_enc": tensors["encoder.bias"],
             "b_dec": tensors["decoder.bias"], "threshold": torch.full((D_SAE,), 0.52 * scale)}  # fmt: skip
    cfg = {"architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "apply_b_dec_to_input": False,
           "normalize_activations": "expected_average_only_in", "device": "cpu"}  # fmt: skip
    lens = sae_lens.SAE.load_from_disk("unused", converter=lambda path, device, cfg_overrides: (cfg, state))
    lens.fold_activation_norm_scaling_factor(scale)
    sae = read(folder)
    same(sae, x, lens.encode(x), lens(x))
    assert sae.normalizer is not None and sae.metadata.hook.layer == 19


def test_llamascopium_without_its_norm_or_of_another_kind_is_refused(rand, tmp_path):
    t = {"W_E": rand(D_IN, D_SAE), "b_E": rand(D_SAE), "W_D": rand(D_SAE, D_IN), "b_D": rand(D_IN)}
    save_file(t, tmp_path / "sae_weights.safetensors")
    config = {"sae_type": "sae", "hook_point_in": "blocks.9.hook_resid_post", "d_model": D_IN, "act_fn": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="average activation norm"):
        read(tmp_path)
    assert read(tmp_path, input_scale=0.5).d_sae == D_SAE
    for change in ({"sae_type": "crosscoder"}, {"sae_type": "clt"}, {"sae_type": "lorsa"}, {"use_glu_encoder": True}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(FormatError):
            read(tmp_path)


# ---- bundles -------------------------------------------------------------------------------------------------------


def bundle(
    folder, rand, *, enc_turned=False, dec_turned=False, names=("W_enc", "W_dec", "b_enc", "b_dec"), nested=True
):
    t = {
        "W_enc": rand(D_IN, D_SAE, scale=0.3),
        "W_dec": rand(D_SAE, D_IN, scale=0.3),
        "b_enc": rand(D_SAE),
        "b_dec": rand(D_IN),
    }
    stored = dict(t)
    stored["W_enc"] = t["W_enc"].t().contiguous() if enc_turned else t["W_enc"]
    stored["W_dec"] = t["W_dec"].t().contiguous() if dec_turned else t["W_dec"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({new: stored[old] for old, new in zip(t, names, strict=True)}, folder / "model.safetensors")
    mean, std = rand(D_IN) * 3, rand(D_IN).abs() + 0.2
    mean[5], std[5] = 3000.0, 40.0
    norm = {"input_mean": mean.tolist(), "input_std": std.tolist()}
    meta = {"sae_type": "topk", "k": K, "d_in": D_IN, "d_sae": D_SAE, "hookpoint": "layers.35",
            "model": {"base_model": "Qwen/Qwen3-8B", "base_model_revision": "b968826"},
            "training": {"lr": 3e-4, "batch_size": 32768, "step": 70000}}  # fmt: skip
    meta |= {"normalizer": norm} if nested else norm
    (folder / "model.metadata.json").write_text(json.dumps(meta))
    return t, mean, std


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("enc_turned", "dec_turned"), [(False, False), (True, True), (True, False)])
def test_bundle_in_any_orientation(enc_turned, dec_turned, subtract, rand, same, tmp_path):
    t, mean, std = bundle(tmp_path, rand, enc_turned=enc_turned, dec_turned=dec_turned, nested=subtract)
    x = rand(200, D_IN) * std + mean
    t64 = {k: v.double() for k, v in t.items()}
    z = (x.double() - mean.double()) / std.double()
    codes = topk((z - t64["b_dec"] if subtract else z) @ t64["W_enc"] + t64["b_enc"])
    rebuilt = (codes @ t64["W_dec"] + t64["b_dec"]) * std.double() + mean.double()
    sae = read(tmp_path, apply_b_dec_to_input=subtract)
    same(sae, x, codes, rebuilt)
    assert (sae.metadata.base_model.id, sae.metadata.base_model.revision) == ("Qwen/Qwen3-8B", "b968826")
    assert sae.metadata.hook.module_path == "model.layers.35"
    assert torch.allclose(sae.normalizer.std, std) and sae.metadata.normalizer.folded
    assert sae.metadata.training.steps == 70000


def test_bundle_with_other_key_names_beside_its_other_exports(rand, tmp_path):
    bundle(tmp_path, rand, enc_turned=True, dec_turned=True,
           names=("sae.encoder.weight", "sae.decoder.weight", "sae.encoder.bias", "sae.decoder.bias"))  # fmt: skip
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        (tmp_path / name).write_bytes(b"\0" * 16)
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert [r.format for r in detect(tmp_path)] == ["bundle"]
    with pytest.warns(ReadWarning, match="b_dec is subtracted"):
        assert read(tmp_path).config.k == K


def test_bundle_that_is_square_or_lacks_its_normaliser_is_refused(rand, tmp_path):
    eye = {"W_enc": rand(8, 8), "W_dec": rand(8, 8), "b_enc": rand(8), "b_dec": rand(8)}
    save_file(eye, tmp_path / "model.safetensors")
    meta = {"k": 2, "input_mean": [0.0] * 8, "input_std": [1.0] * 8, "apply_b_dec_to_input": True}
    (tmp_path / "model.metadata.json").write_text(json.dumps(meta))
    with pytest.raises(FormatError, match="square"):
        read(tmp_path)
    assert read(tmp_path, transposed=True).config.k == 2
    (tmp_path / "model.metadata.json").write_text(json.dumps({"k": 2, "apply_b_dec_to_input": True}))
    with pytest.raises(FormatError, match="input_mean"):
        read(tmp_path, transposed=True)
    (tmp_path / "model.metadata.json").write_text(json.dumps(meta | {"input_std": [0.0] * 8}))
    with pytest.raises(FormatError, match="standard deviations above zero"):
        read(tmp_path, transposed=True)
    for text in (["a"] * 8, {"0": 1.0}):
        (tmp_path / "model.metadata.json").write_text(json.dumps(meta | {"input_mean": text}))
        with pytest.raises(FormatError, match="input_mean"):
            read(tmp_path, transposed=True)


def test_folded_normaliser_gives_the_same_numbers_in_stock_saelens(rand, same, tmp_path):
    """Outlier dimensions included: published with its statistics folded, SAELens needs to know nothing of them."""
    sae_lens = pytest.importorskip("sae_lens")
    t, mean, std = bundle(tmp_path / "bundle", rand)
    x = rand(200, D_IN) * std + mean
    sae = read(tmp_path / "bundle", apply_b_dec_to_input=True)
    sae.save_pretrained(tmp_path / "native")
    lens = sae_lens.SAE.load_from_disk(tmp_path / "native")
    z = (x.double() - mean.double()) / std.double()
    codes = topk((z - t["b_dec"].double()) @ t["W_enc"].double() + t["b_enc"].double())
    rebuilt = (codes @ t["W_dec"].double() + t["b_dec"].double()) * std.double() + mean.double()
    with torch.no_grad():
        assert torch.equal(lens.encode(x) != 0, codes != 0)
        assert float((lens(x).double() - rebuilt).norm() / rebuilt.norm()) <= 1e-6
    same(sae, x, lens.encode(x), lens(x))
    again = read(tmp_path / "native")
    assert again.normalizer is not None and torch.equal(again.normalizer.mean, mean)


@pytest.mark.parametrize("fields", [
    {"architecture": "topk", "k": K}, {"architecture": "topk", "k": K, "topk_relu": False}, {"architecture": "relu"},
    {"architecture": "batch_topk", "k": K, "threshold": 0.7},
])  # fmt: skip
@pytest.mark.parametrize("subtract", [True, False])
def test_a_bundle_is_written_in_training_space_and_comes_back_with_its_normaliser(
    fields, subtract, rand, same, tmp_path
):
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=subtract, **fields)
    tensors = {name: rand(*config.tensor_shape(name), scale=0.3) for name in config.tensor_names}
    mean, std = rand(D_IN) * 3, rand(D_IN).abs() + 0.2
    sae = HubSAE(config, tensors, normalizer=Normalizer(mean, std, 1234))
    sae.metadata.base_model.id, sae.metadata.hook.module_path = "Qwen/Qwen3-8B", "model.layers.35"
    sae.metadata.training.steps = 70000
    again = read(write(sae, tmp_path / "bundle", "bundle"))
    x = rand(200, D_IN) * std + mean
    # folded with its normaliser it may subtract b_dec where the one that was written did not: the same numbers
    assert again.config == sae.config.model_copy(update={"apply_b_dec_to_input": True})
    same(again, x, sae.encode(x), sae(x))
    assert torch.equal(again.normalizer.mean.float(), mean) and torch.equal(again.normalizer.std.float(), std)
    assert again.metadata.hook.module_path == "model.layers.35" and again.metadata.training.steps == 70000
    # anyone else: the normaliser, then the tensors as they stand in the file
    stored = load_file(tmp_path / "bundle/model.safetensors")
    z = (x - mean) / std - (stored["b_dec"] if subtract else 0)
    pre = (x - sae.b_dec if subtract else x) @ sae.W_enc + sae.b_enc
    assert torch.allclose(z @ stored["W_enc"] + stored["b_enc"], pre, atol=1e-4)


def test_a_bundle_beside_an_sae_is_no_second_reading_and_goes_when_the_sae_is_written_anew(rand, tmp_path):
    config = SAEConfig(architecture="topk", k=K, d_in=D_IN, d_sae=D_SAE)
    sae = HubSAE(config, {name: rand(*config.tensor_shape(name), scale=0.3) for name in config.tensor_names})
    release = Release.create(tmp_path, name="r", base_model="Qwen/Qwen3-8B")
    release.add(sae, "layer35", also=["bundle"])
    assert [r.format for r in detect(tmp_path / "layer35")] == ["native"]
    assert {"layer35/model.safetensors", "layer35/model.metadata.json"} <= {f.path for f in release.entry().files}
    release.add(sae, "layer35")
    assert not (tmp_path / "layer35/model.safetensors").exists()


def test_a_bundle_refuses_what_it_cannot_say(rand, tmp_path):
    with pytest.raises(ConfigError, match="jumprelu"):
        write(HubSAE.random(SAEConfig(architecture="jumprelu", d_in=D_IN, d_sae=D_SAE)), tmp_path, "bundle")
