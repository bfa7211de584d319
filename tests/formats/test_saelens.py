"""SAELens: what it writes we read, what we write it reads, with its own numbers."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import FormatError
from hubsae.core.hooks import hook_record
from hubsae.core.normalizer import Normalizer
from hubsae.formats import detect, fidelity, read, saelens, write
from hubsae.formats.base import ReadWarning

sae_lens = pytest.importorskip("sae_lens")
from sae_lens.registry import get_sae_class, get_sae_training_class  # noqa: E402
from sae_lens.saes.sae import SAEMetadata  # noqa: E402

from .conftest import D_IN, D_SAE, K  # noqa: E402

META = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post", "context_size": 64, "prepend_bos": True}


def lens_sae(architecture, rand, *, subtract=True, norm="none", training=False, **extra):
    sae_class, cfg_class = (get_sae_training_class if training else get_sae_class)(architecture)
    cfg = cfg_class(
        d_in=D_IN, d_sae=D_SAE, dtype="float32", device="cpu", apply_b_dec_to_input=subtract,
        normalize_activations=norm, metadata=SAEMetadata(**META), **extra,
    )  # fmt: skip
    sae = sae_class(cfg)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            value = rand(*parameter.shape, scale=0.3 if parameter.ndim == 2 else 0.5)
            parameter.copy_(
                value.abs().log() if name == "log_threshold" else value.abs() if name == "threshold" else value
            )
    return sae.eval()


CASES = [
    ("standard", {}),
    ("topk", {"k": K, "rescale_acts_by_decoder_norm": False}),
    ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ("jumprelu", {}),
    ("gated", {}),
]


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("architecture", "extra"), CASES)
def test_folder_written_by_saelens_reads_with_its_numbers(architecture, extra, subtract, norm, rand, x, same, tmp_path):
    lens = lens_sae(architecture, rand, subtract=subtract, norm=norm, **extra)
    lens.save_model(tmp_path)
    assert [r.format for r in detect(tmp_path)] == ["saelens"]
    sae = read(tmp_path)
    same(sae, x, lens.encode(x), lens(x))
    assert sae.config.apply_b_dec_to_input is subtract
    assert sae.metadata.hook.transformer_lens == META["hook_name"]
    assert sae.metadata.hook.module_path == "model.layers.3"
    assert (sae.metadata.hook.context_size, sae.metadata.hook.prepend_bos) == (64, True)
    assert sae.metadata.base_model.id == "gpt2"


def ours(architecture, **extra):
    return SAEConfig(architecture=architecture, d_in=D_IN, d_sae=D_SAE, **extra)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        ours("relu"),
        ours("topk", k=K),
        ours("batch_topk", k=K, threshold=0.8),
        ours("jumprelu"),
        ours("gated"),
        ours("topk", k=K, token_norm="layer_norm"),
        ours("topk", k=K, token_norm="constant_norm"),
        ours("topk", k=K, token_norm="unit_norm"),
    ],
    ids=lambda c: f"{c.architecture}-{c.token_norm}",
)
@pytest.mark.parametrize("form", ["native", "saelens"])
def test_folder_written_by_hubsae_loads_in_stock_saelens(config, subtract, form, rand, x, same, tmp_path):
    sae = random_sae(config.model_copy(update={"apply_b_dec_to_input": subtract}), rand)
    write(sae, tmp_path / "sae", form)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReadWarning)
        lens = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    same(sae, x, lens.encode(x), lens(x))
    # and the round trip through our own reader
    again = read(tmp_path / "sae")
    same(again, x, lens.encode(x), lens(x))
    assert again.config.architecture == config.architecture
    assert again.config.threshold == pytest.approx(config.threshold, abs=1e-7)


def random_sae(config, rand) -> HubSAE:
    tensors = {n: rand(*config.tensor_shape(n), scale=0.3 if n.startswith("W_") else 0.5) for n in config.tensor_names}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    return HubSAE(config, tensors)


@pytest.mark.parametrize("config", [ours("relu"), ours("topk", k=K), ours("jumprelu"), ours("gated")], ids=str)
def test_live_objects_go_both_ways(config, rand, x, same):
    sae = random_sae(config, rand)
    sae.metadata.base_model.id = "gpt2"
    lens = sae.to_saelens()
    same(sae, x, lens.encode(x), lens(x))
    back = HubSAE.from_saelens(lens)
    same(back, x, lens.encode(x), lens(x))
    assert back.metadata.base_model.id == "gpt2"
    with torch.no_grad():
        lens.W_dec.zero_()
    assert float(sae.W_dec.abs().sum()) > 0, "to_saelens must copy"


def test_batchtopk_from_training_class_and_from_its_inference_export(rand, x, same, tmp_path):
    training = lens_sae("batchtopk", rand, training=True, k=K)
    training.topk_threshold.fill_(0.7)
    inference = tmp_path / "inference"
    training.save_inference_model(inference)
    lens = sae_lens.SAE.load_from_disk(inference)
    for sae in (HubSAE.from_saelens(training), read(inference)):
        assert (sae.config.architecture, sae.config.k) == ("batch_topk", K)
        same(sae, x, lens.encode(x), lens(x))
    training.save_model(tmp_path / "training")  # stock SAELens cannot load this folder, we can
    with pytest.raises(KeyError):
        sae_lens.SAE.load_from_disk(tmp_path / "training")
    same(read(tmp_path / "training"), x, lens.encode(x), lens(x))


@pytest.mark.parametrize("architecture", ["jumprelu", "topk", "gated", "standard"])
def test_training_classes_read_like_their_inference_model(architecture, rand, x, same, tmp_path):
    training = lens_sae(architecture, rand, training=True, **({"k": K} if architecture == "topk" else {}))
    training.save_inference_model(tmp_path)
    lens = sae_lens.SAE.load_from_disk(tmp_path)
    same(HubSAE.from_saelens(training), x, lens.encode(x), lens(x))


def test_config_from_before_saelens_6(rand, x, same, tmp_path):
    lens = lens_sae("topk", rand, k=K, rescale_acts_by_decoder_norm=False)
    lens.save_model(tmp_path)
    old = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small",
        "hook_name": "blocks.5.hook_resid_pre", "hook_layer": 5, "hook_head_index": None, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        "normalize_activations": "none", "context_size": 128, "prepend_bos": True, "sae_lens_training_version": "3.1.0",
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    stock = sae_lens.SAE.load_from_disk(tmp_path)
    sae = read(tmp_path)
    same(sae, x, stock.encode(x), stock(x))
    assert (sae.metadata.hook.kind, sae.metadata.hook.layer) == ("resid_pre", 5)
    assert sae.metadata.hook.context_size == 128


def test_inputs_scaled_in_training_are_read_as_saelens_does_and_fold_on_demand(rand, x, same, tmp_path):
    lens = lens_sae("standard", rand, norm="expected_average_only_in")
    lens.save_model(tmp_path)
    with pytest.warns(ReadWarning, match="expected_average_only_in"):
        sae = read(tmp_path)
    same(sae, x, lens.encode(x), lens(x))
    folded = read(tmp_path, input_scale=0.25)
    lens.fold_activation_norm_scaling_factor(0.25)
    same(folded, x, lens.encode(x), lens(x))


def test_what_saelens_cannot_express_is_said(rand, x, tmp_path):
    signed = random_sae(ours("topk", k=D_SAE // 2 + 40, topk_relu=False), rand)
    assert not fidelity(signed.config).exact
    with pytest.warns(ReadWarning, match="ReLU after top-k"):
        lens = signed.to_saelens()
    # the note is true: latents differ exactly where a negative one was selected
    z, theirs = signed.encode(x), lens.encode(x)
    assert torch.equal(theirs, z.clamp_min(0)) and bool((z < 0).any())
    batch = random_sae(ours("batch_topk", k=K), rand)
    assert "per token" in fidelity(batch.config).note
    write(batch, tmp_path / "b")
    assert sae_lens.SAE.load_from_disk(tmp_path / "b").encode(x).count_nonzero(-1).max() <= K
    assert read(tmp_path / "b").config == batch.config


def test_normaliser_and_sparsity_travel_beside_the_weights(rand, x, tmp_path):
    sae = random_sae(ours("topk", k=K), rand)
    sae.normalizer = Normalizer(rand(D_IN), rand(D_IN).abs() + 0.1, 1234, {"50": 3.5})
    sae.sparsity = rand(D_SAE)
    sae.save_pretrained(tmp_path)
    again = read(tmp_path)
    assert torch.equal(again.normalizer.mean, sae.normalizer.mean) and again.normalizer.count == 1234
    assert again.normalizer.norm_percentiles == {"50": 3.5}
    assert torch.equal(again.sparsity, sae.sparsity)
    assert again.metadata.normalizer.file == "normalizer.safetensors"
    # SAELens is strict about extra tensors: they must not be in the weights file
    sae_lens.SAE.load_from_disk(tmp_path)


def test_architectures_without_a_canonical_form_are_refused(tmp_path, rand):
    lens = lens_sae("standard", rand)
    lens.save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text()) | {"architecture": "transcoder"}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(FormatError, match="transcoder"):
        read(tmp_path)


def test_cfg_has_every_key_saelens_tools_need():
    sae = HubSAE.random(ours("topk", k=K))
    cfg = saelens.cfg_of(sae)
    assert cfg["metadata"]["model_from_pretrained_kwargs"] == {}
    # rows of norm one: the same function, and SAEDashboard and Neuronpedia's runner refuse top-k without it
    assert cfg["rescale_acts_by_decoder_norm"] is True
    sae.W_dec.data[0] *= 1.01
    assert saelens.cfg_of(sae)["rescale_acts_by_decoder_norm"] is False
    assert cfg["metadata"]["hubsae_assumed"] == ["context_size", "prepend_bos"]


@pytest.mark.parametrize("arch", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("hook", ["blocks.5.hook_resid_pre", "blocks.5.attn.hook_z", "hook_embed"])
def test_a_config_survives_hubsae_key_by_key(arch, hook, rand, tmp_path):
    lens = lens_sae(arch, rand, **({"k": K} if arch == "topk" else {}))
    lens.save_model(tmp_path / "lens")
    cfg = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    cfg |= {
        "reshape_activations": "hook_z" if hook.endswith("hook_z") else "none",
        "a_new_key": [1, {"a": 2}],
    }
    cfg["metadata"] |= {
        "model_name": "gpt2-small", "hook_name": hook, "hf_hook_name": "transformer.h.5.output",
        "hook_head_index": None,
        "model_class_name": "AutoModelForCausalLM", "model_from_pretrained_kwargs": {"fold_ln": False, "n_devices": 1},
        "neuronpedia_id": "gpt2-small/5-res-jb", "exclude_special_tokens": [0, 1, 2], "seqpos_slice": [None, -1, 2],
        "training_architecture": "matryoshka_batchtopk", "sae_lens_training_version": "6.1.0",
        "training_architecture_details": {"matryoshka_widths": [16, 64], "k": 6.5}, "dataset_path": "some/texts",
        "context_size": 128, "prepend_bos": True, "sequence_separator_token": "bos", "anything": {"at": "all"},
    }  # fmt: skip
    (tmp_path / "lens" / "cfg.json").write_text(json.dumps(cfg))
    sae = read(tmp_path / "lens")
    assert sae.metadata.base_model.id == "openai-community/gpt2"
    sae.save_pretrained(tmp_path / "native")
    write(read(tmp_path / "native"), tmp_path / "back", "saelens")
    for folder in ("native", "back"):
        after = json.loads((tmp_path / folder / "cfg.json").read_text())
        for key in ("rescale_acts_by_decoder_norm", "dtype", "device"):  # what the tensors say now
            cfg.pop(key, None), after.pop(key, None)
        assert {k: after.get(k) for k in cfg} == cfg
        assert {k: after["metadata"].get(k) for k in cfg["metadata"]} == cfg["metadata"]
    other = read(tmp_path / "native")
    other.metadata.base_model.id = "me/another"
    assert saelens.cfg_of(other)["metadata"]["model_name"] == "me/another"


def test_resid_pre_is_written_with_the_module_path_of_its_input(rand, tmp_path):
    sae = HubSAE.random(ours("topk", k=K))
    for name, value in hook_record("blocks.5.hook_resid_pre", None, "Qwen/Qwen3-8B").items():
        setattr(sae.metadata.hook, name, value)
    assert saelens.cfg_of(sae)["metadata"]["hf_hook_name"] == "model.layers.5.input"


def test_an_sae_on_heads_runs_in_stock_saelens_after_republishing(rand, tmp_path):
    """Before, the republished config said `none` and stock SAELens failed on the four dimensions of hook_z."""
    sae_lens = pytest.importorskip("sae_lens")
    lens = lens_sae("standard", rand)
    lens.cfg.metadata.hook_name, lens.cfg.reshape_activations = "blocks.5.attn.hook_z", "hook_z"
    lens.save_model(tmp_path / "lens")
    sae = read(tmp_path / "lens")
    assert (sae.metadata.hook.kind, sae.metadata.hook.layer) == ("attn_z", 5)
    sae.save_pretrained(tmp_path / "native")
    again = sae_lens.SAE.load_from_disk(tmp_path / "native")
    heads = rand(2, 5, 4, D_IN // 4)
    with torch.no_grad():
        assert torch.allclose(again(heads), sae(heads.flatten(2)).reshape(heads.shape), atol=1e-5)
