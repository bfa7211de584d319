"""Published transcoders, by the file: numbers and places of SAELens' own loaders, never an autoencoder silently."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file

from hubsae.core.errors import FormatError
from hubsae.formats import detect, read
from hubsae.formats.base import ReadWarning

from .conftest import D_IN, D_SAE


@pytest.fixture
def gemma(rand):
    return {"w_enc": rand(D_IN, D_SAE, scale=0.3), "w_dec": rand(D_SAE, D_IN, scale=0.3), "b_enc": rand(D_SAE),
            "b_dec": rand(D_IN), "threshold": rand(D_SAE).abs()}  # fmt: skip


def loaded(loader, monkeypatch, root, repo, folder):
    """What SAELens' loader function makes of files that it thinks it downloaded: the SAE and the config."""
    sae_lens = pytest.importorskip("sae_lens")
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    from huggingface_hub.utils import EntryNotFoundError

    from hubsae.formats.tensors import safetensors_header

    def download(repo_id, filename, subfolder=None, **_):
        file = root / repo_id.replace("/", "--") / (subfolder or "") / filename
        if not file.is_file():
            raise EntryNotFoundError(str(file))
        return str(file)

    def shapes(repo_id, filename):
        return {name: list(shape) for name, (_, shape) in safetensors_header(download(repo_id, filename)).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    cfg, state, _ = getattr(loaders, loader)(repo, folder, device="cpu")
    # its widths are those of the real suite
    cfg = cfg | {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"} | ({"d_out": D_IN} if "d_out" in cfg else {})
    whole = loaders.handle_config_defaulting(dict(cfg))
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    return sae_lens.SAE.load_from_disk("unused", converter=lambda path, device, cfg_overrides: (whole, state)), cfg


def test_gemma_scope_transcoder_npz(gemma, x, same, tmp_path, monkeypatch):
    """It was read as an autoencoder at an unknown place, without a word."""
    repo, inner = "google/gemma-scope-2b-pt-transcoders", "layer_20/width_16k/average_l0_71"
    folder = tmp_path / repo.replace("/", "--") / inner
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in gemma.items()})
    lens, cfg = loaded("gemma_2_transcoder_huggingface_loader", monkeypatch, tmp_path, repo, inner)
    sae = read(folder)
    same(sae, x, lens.encode(x), lens(x))
    assert sae.config.d_out == D_IN
    assert sae.metadata.hook.transformer_lens == cfg["hook_name"] == "blocks.20.ln2.hook_normalized"
    assert sae.metadata.hook_out.transformer_lens == cfg["hook_name_out"] == "blocks.20.hook_mlp_out"
    assert sae.metadata.hook_out.module_path == "model.layers.20.post_feedforward_layernorm"
    assert sae.metadata.base_model.id == "google/gemma-2-2b"
    back = sae.to_saelens()
    assert type(back) is type(lens)
    same(sae, x, back.encode(x), back(x))


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("inner", "kind", "place", "out"),
    [
        ("resid_post/layer_12_width_16k_l0_small", "jumprelu", "resid_post", None),
        ("mlp_out_all/layer_12_width_16k_l0_small", "jumprelu", "mlp_out", None),
        ("attn_out/layer_12_width_16k_l0_small", "jumprelu", "attn_z", None),
        ("transcoder/layer_12_width_16k_l0_small", "jumprelu_transcoder", "mlp_in", "mlp_out"),
        ("transcoder_all/layer_12_width_16k_l0_small_affine", "jumprelu_skip_transcoder", "mlp_in", "mlp_out"),
    ],
)
def test_gemma_scope_2_with_and_without_its_config(
    inner, kind, place, out, with_config, gemma, rand, x, same, tmp_path, monkeypatch
):
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    repo = "google/gemma-scope-2-270m-pt"
    folder = tmp_path / repo.replace("/", "--") / inner
    folder.mkdir(parents=True)
    if "affine" in inner:
        gemma["affine_skip_connection"] = rand(D_IN, D_IN, scale=0.3)
    save_file(gemma, folder / "params.safetensors")
    if with_config:
        (folder / "config.json").write_text(json.dumps(loaders._infer_gemma_3_raw_cfg_dict(repo, inner)))
    lens, cfg = loaded("gemma_3_sae_huggingface_loader", monkeypatch, tmp_path, repo, inner)
    assert cfg["architecture"] == kind
    sae = read(folder)
    same(sae, x, lens.encode(x), lens(x))
    assert (sae.config.is_transcoder, bool(sae.config.skip)) == ("transcoder" in kind, "skip" in kind)
    assert (sae.metadata.hook.layer, sae.metadata.hook.kind) == (12, place)
    assert (sae.metadata.hook_out.kind if sae.metadata.hook_out else None) == out
    assert sae.metadata.base_model.id == cfg["model_name"] == "google/gemma-3-270m"


def test_gemma_scope_files_whose_path_says_nothing_are_not_taken_silently(gemma, rand, tmp_path):
    np.savez(tmp_path / "params.npz", **{k: v.numpy() for k, v in gemma.items()})
    with pytest.warns(ReadWarning, match="hook_out= for a transcoder"):
        read(tmp_path)
    sae = read(tmp_path, hook="20.mlp_norm", hook_out="20.mlp_out")
    assert sae.config.is_transcoder and sae.metadata.hook_out.kind == "mlp_out"
    (tmp_path / "b").mkdir()
    save_file(gemma | {"affine_skip_connection": rand(D_IN, D_IN)}, tmp_path / "b" / "params.safetensors")
    with pytest.raises(FormatError, match="the place that a transcoder predicts"):
        read(tmp_path / "b")


def test_transcoder_of_one_layer_as_circuit_tracer_has_them(rand, x, same, tmp_path, monkeypatch):
    repo = "mwhanna/qwen3-8b-transcoders"
    root = tmp_path / repo.replace("/", "--")
    root.mkdir()
    file = root / "layer_7.safetensors"
    t = {"W_enc": rand(D_SAE, D_IN, scale=0.3), "W_dec": rand(D_SAE, D_IN, scale=0.3), "b_enc": rand(D_SAE),
         "b_dec": rand(D_IN)}  # fmt: skip
    save_file(t, file)
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    (root / "config.yaml").write_text(yaml.safe_dump({"model_name": "Qwen/Qwen3-8B", **hooks}))
    about = {"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 128}}
    (root / "wanb-config.yaml").write_text(yaml.safe_dump(about))
    lens, cfg = loaded("mwhanna_transcoder_huggingface_loader", monkeypatch, tmp_path, repo, "layer_7.safetensors")
    assert [r.format for r in detect(file)] == ["circuit_tracer"]
    sae = read(file)
    same(sae, x, lens.encode(x), lens(x))
    assert (sae.metadata.hook.transformer_lens, sae.metadata.hook.kind) == (cfg["hook_name"], "mlp_in")
    assert sae.metadata.hook_out.transformer_lens == cfg["hook_name_out"]
    assert sae.metadata.base_model.id == cfg["model_name"]
    assert sae.to_saelens().cfg.metadata.model_from_pretrained_kwargs == {"fold_ln": False}
    # without any config its shape still tells: both matrices hold one latent per row
    for name in ("config.yaml", "wanb-config.yaml"):
        (root / name).unlink()
    assert read(file).config.is_transcoder
    save_file(t | {"W_skip": rand(D_IN, D_IN), "activation_function.threshold": rand(D_SAE).abs()}, file)
    with_skip = read(file)
    assert with_skip.config.skip and with_skip.config.architecture == "jumprelu"


def test_llama_scope_transcoder(rand, x, same, tmp_path):
    t = {"encoder.weight": rand(D_SAE, D_IN, scale=0.3), "encoder.bias": rand(D_SAE),
         "decoder.weight": rand(D_IN, D_SAE, scale=0.3), "decoder.bias": rand(D_IN)}  # fmt: skip
    hyper = {"d_model": D_IN, "d_sae": D_SAE, "hook_point_in": "blocks.3.ln2.hook_normalized", "act_fn": "jumprelu",
             "hook_point_out": "blocks.3.hook_mlp_out", "jump_relu_threshold": 0.4, "norm_activation": "dataset-wise",
             "dataset_average_activation_norm": {"in": 5.0, "out": 3.0}, "use_decoder_bias": True}  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    save_file(t, tmp_path / "checkpoints" / "final.safetensors")
    (tmp_path / "hyperparams.json").write_text(json.dumps(hyper))
    (tmp_path / "lm_config.json").write_text(json.dumps({"model_name": "meta-llama/Llama-3.1-8B"}))
    into, out = math.sqrt(D_IN) / 5.0, math.sqrt(D_IN) / 3.0
    pre = (x * into) @ t["encoder.weight"].t() + t["encoder.bias"]
    codes = pre.relu() * (pre > 0.4 * into)
    sae = read(tmp_path)
    same(sae, x, codes, (codes @ t["decoder.weight"].t() + t["decoder.bias"]) / out)
    assert (sae.metadata.hook.kind, sae.metadata.hook_out.kind) == ("mlp_norm", "mlp_out")
    assert sae.metadata.base_model.id == "meta-llama/Llama-3.1-8B"


def test_cross_layer_ones_and_other_maths_are_refused_with_the_tool_that_loads_them(gemma, rand, tmp_path):
    def refused(path, *words):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert all(word in str(caught.value) for word in words), caught.value

    save_file({"W_dec_3": rand(D_SAE, 4, D_IN)}, tmp_path / "W_dec_3.safetensors")
    refused(tmp_path / "W_dec_3.safetensors", "many layers", "read_cross_layer", "circuit-tracer")
    folder = tmp_path / "gemma-scope-2-1b-pt" / "transcoder" / "layer_3"
    folder.mkdir(parents=True)
    save_file(gemma | {"w_dec": rand(D_SAE, 4, D_IN)}, folder / "params.safetensors")
    refused(folder, "cross-layer")
    (tmp_path / "t").mkdir()
    save_file({"D": rand(4, 4)}, tmp_path / "t" / "latest_ckpt.safetensors")
    (tmp_path / "t" / "conf.yaml").write_text("sae: {}")
    refused(tmp_path / "t", "temporal", "SAELens")
    (tmp_path / "m").mkdir()
    save_file({"W_dec": rand(D_SAE, D_IN), "b_dec": rand(D_IN)}, tmp_path / "m" / "sae_weights.safetensors")
    for kind in ("matching_pursuit", "abstopk", "temporal"):
        cfg = {"architecture": kind, "d_in": D_IN, "d_sae": D_SAE, "metadata": {"sae_lens_version": "6.0.0"}}
        (tmp_path / "m" / "cfg.json").write_text(json.dumps(cfg))
        refused(tmp_path / "m", kind, "SAELens")
