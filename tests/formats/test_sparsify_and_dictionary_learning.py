"""sparsify and dictionary_learning: their own code writes, we read; we write, their own code loads."""

from __future__ import annotations

import json

import pytest
import torch

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import ConfigError, FormatError
from hubsae.formats import detect, read, write, write_also

from .conftest import D_IN, D_SAE, K

# ---- sparsify -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparsify():
    return pytest.importorskip("sparsify")


def peer_coder(sparsify, rand, **cfg):
    coder = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K, **cfg))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(rand(*parameter.shape, scale=0.3))
    return coder


def coder_numbers(coder, x):
    codes = coder.encode(x)
    dense = torch.zeros(x.shape[0], coder.num_latents).scatter_(1, codes.top_indices, codes.top_acts)
    return dense, coder(x).sae_out


def test_skip_transcoder_of_an_mlp_reads_and_is_written_as_in_sparsify(sparsify, rand, x, same, tmp_path):
    coder = peer_coder(sparsify, rand, transcode=True, skip_connection=True)
    coder.W_skip.data = rand(D_IN, D_IN, scale=0.3)
    folder = tmp_path / "layers.4.mlp"
    coder.save_to_disk(folder)
    sae = read(folder)
    same(sae, x, *coder_numbers(coder, x))
    assert (sae.metadata.hook.kind, sae.metadata.hook_out.kind) == ("mlp_in", "mlp_out")
    write(sae, tmp_path / "again", "sparsify")
    same(sae, x, *coder_numbers(sparsify.SparseCoder.load_from_disk(tmp_path / "again"), x))


@pytest.mark.parametrize("transcode", [False, True])
def test_folder_written_by_sparsify_reads_with_its_numbers(sparsify, transcode, rand, x, same, tmp_path):
    coder = peer_coder(sparsify, rand, transcode=transcode)
    folder = tmp_path / "layers.4"
    folder.mkdir()
    coder.save_to_disk(folder)
    (tmp_path / "config.json").write_text(json.dumps({"sae": {}, "model": "HuggingFaceTB/SmolLM2-135M"}))
    assert [r.format for r in detect(folder)] == ["sparsify"]
    sae = read(folder)
    same(sae, x, *coder_numbers(coder, x))
    assert sae.config.is_transcoder is transcode
    assert sae.metadata.hook.kind == ("resid_pre" if transcode else "resid_post")
    assert (sae.metadata.hook_out.kind if transcode else sae.metadata.hook_out) == ("resid_post" if transcode else None)
    assert sae.metadata.base_model.id == "HuggingFaceTB/SmolLM2-135M"


def test_default_sparsify_config_with_expansion_factor_instead_of_num_latents(sparsify, rand, x, same, tmp_path):
    coder = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(expansion_factor=4, k=K))
    coder.save_to_disk(tmp_path)
    sae = read(tmp_path)
    assert sae.d_sae == 4 * D_IN
    same(sae, x, *coder_numbers(coder, x))


@pytest.mark.parametrize("subtract", [True, False])
def test_folder_written_by_hubsae_loads_in_stock_sparsify(sparsify, subtract, rand, x, same, tmp_path):
    config = SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K, apply_b_dec_to_input=subtract)
    sae = HubSAE(config, {n: rand(*config.tensor_shape(n), scale=0.3) for n in config.tensor_names})
    write(sae, tmp_path / "s", "sparsify")
    coder = sparsify.SparseCoder.load_from_disk(tmp_path / "s")
    same(sae, x, *coder_numbers(coder, x))
    same(read(tmp_path / "s"), x, *coder_numbers(coder, x))


def test_one_folder_serves_hubsae_saelens_and_sparsify(sparsify, rand, x, same, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    config = SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K)
    sae = HubSAE(config, {n: rand(*config.tensor_shape(n), scale=0.3) for n in config.tensor_names})
    write(sae, tmp_path / "s")
    write_also(sae, tmp_path / "s", ["sparsify"])
    lens = sae_lens.SAE.load_from_disk(tmp_path / "s")
    coder = sparsify.SparseCoder.load_from_disk(tmp_path / "s")
    same(sae, x, lens.encode(x), lens(x))
    same(sae, x, *coder_numbers(coder, x))
    assert [r.format for r in detect(tmp_path / "s")] == ["native"]


def test_sparsify_forms_without_a_canonical_form_are_refused(sparsify, rand, tmp_path):
    for name, cfg in {"group": {"activation": "groupmax"}, "skip": {"skip_connection": True}}.items():
        (tmp_path / name).mkdir()
        peer_coder(sparsify, rand, **cfg).save_to_disk(tmp_path / name)
        with pytest.raises(FormatError):
            read(tmp_path / name)
    with pytest.raises(ConfigError, match="ReLU-then-topk"):
        write(HubSAE.random(SAEConfig(architecture="relu", d_in=4, d_sae=8)), tmp_path / "no", "sparsify")
    assert not (tmp_path / "no").exists()


# ---- dictionary_learning ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(dl):
    from dictionary_learning.dictionary import (
        AutoEncoder,
        AutoEncoderNew,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
    )
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    return {
        "AutoEncoder": lambda: AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": lambda: AutoEncoderNew(D_IN, D_SAE),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [D_SAE // 2, D_SAE // 2]),
        "GatedAutoEncoder": lambda: GatedAutoEncoder(D_IN, D_SAE),
        "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D_IN, D_SAE),
    }


def peer_dictionary(classes, name, rand, threshold=0.6):
    ae = classes[name]()
    with torch.no_grad():
        for key, parameter in ae.named_parameters():
            parameter.copy_(rand(*parameter.shape, scale=0.3))
            if key == "threshold":
                parameter.abs_()
        if "threshold" in dict(ae.named_buffers()):
            ae.threshold.fill_(threshold)
    return ae


def save(ae, name, folder, **trainer):
    torch.save(ae.state_dict(), folder / "ae.pt")
    config = {
        "trainer": {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 12, "k": K,
                    "lm_name": "Qwen/Qwen3-8B", "submodule_name": "resid_post_layer_12", **trainer},
        "buffer": {"ctx_len": 1024},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


NAMES = [
    "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
    "GatedAutoEncoder", "JumpReluAutoEncoder",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_folder_of_dictionary_learning_reads_with_its_numbers(classes, name, rand, x, same, tmp_path):
    ae = peer_dictionary(classes, name, rand)
    save(ae, name, tmp_path)
    assert [r.format for r in detect(tmp_path)] == ["dictionary_learning"]
    sae = read(tmp_path)
    same(sae, x, ae.encode(x.clone()), ae(x.clone()))
    assert sae.metadata.base_model.id == "Qwen/Qwen3-8B", "the organisation must not be lost"
    assert sae.metadata.hook.module_path == "model.layers.12"
    assert sae.metadata.hook.context_size == 1024


def test_threshold_that_was_never_tracked_keeps_what_is_positive(classes, rand, x, same, tmp_path):
    ae = peer_dictionary(classes, "BatchTopKSAE", rand, threshold=-1.0)
    save(ae, "BatchTopKSAE", tmp_path)
    same(read(tmp_path), x, ae.encode(x), ae(x))


def test_submodule_other_than_the_residual_is_kept(classes, rand, tmp_path):
    save(peer_dictionary(classes, "AutoEncoder", rand), "AutoEncoder", tmp_path, submodule_name="mlp_out_layer_12")
    assert read(tmp_path).metadata.hook.transformer_lens == "blocks.12.hook_mlp_out"


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "relu"},
        {"architecture": "topk", "k": K},
        {"architecture": "batch_topk", "k": K, "threshold": 0.5},
        {"architecture": "jumprelu"},
        {"architecture": "gated"},
    ],
    ids=lambda f: f["architecture"],
)
def test_folder_written_by_hubsae_loads_in_stock_dictionary_learning(dl, fields, subtract, rand, x, same, tmp_path):
    from dictionary_learning.utils import load_dictionary

    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=subtract, **fields)
    tensors = {n: rand(*config.tensor_shape(n), scale=0.3) for n in config.tensor_names}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    # its AutoEncoder rescales itself on loading unless decoder columns have norm one
    tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    sae = HubSAE(config, tensors)
    write(sae, tmp_path / "d", "dictionary_learning")
    ae, _ = load_dictionary(str(tmp_path / "d"), "cpu")
    same(sae, x, ae.encode(x), ae(x))
    again = read(tmp_path / "d")
    same(again, x, ae.encode(x), ae(x))
    assert again.config.architecture == config.architecture


def test_k_that_contradicts_the_config_is_an_error(classes, rand, tmp_path):
    save(peer_dictionary(classes, "AutoEncoderTopK", rand), "AutoEncoderTopK", tmp_path, k=K + 1)
    with pytest.raises(FormatError, match=f"k={K + 1} as config.json says, found k={K}"):
        read(tmp_path)
