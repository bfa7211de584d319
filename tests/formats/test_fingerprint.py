"""A model is checked against what was kept of it: every fault that gives activations of the right shape is named."""

from __future__ import annotations

import copy

import pytest
import torch
from typer.testing import CliRunner

from hubsae import HubSAE, SAEConfig
from hubsae.cli.main import build
from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.fingerprint import Fingerprint
from hubsae.core.hooks import edit_hook
from hubsae.formats import Release, estimate_threshold, read


@pytest.fixture(scope="module")
def model(quick_world):
    return quick_world.model


@pytest.fixture(scope="module")
def tokenizer(quick_world):
    """One that puts a token in front, as those of Llama and Gemma do."""

    class WithBOS:
        def __call__(self, text):
            return {"input_ids": [3, *quick_world.tokenizer(text)["input_ids"]]}

    return WithBOS()


@pytest.fixture(scope="module")
def sae(model, tokenizer):
    made = HubSAE.random(SAEConfig(architecture="topk", d_in=64, d_sae=128, k=8))
    made.metadata.hook.layer, made.metadata.base_model.id = 2, "local/tiny"
    made.metadata.hook.module_path = "model.layers.2"
    made.fingerprint = Fingerprint.take(model, tokenizer, 2)
    return made


def test_the_same_model_fits_in_every_precision(sae, model, tokenizer):
    found = sae.check(model, tokenizer)
    assert found and found.difference < 1e-3 and "the same activations at layers.2" in str(found)
    rounded = sae.check(copy.deepcopy(model).bfloat16(), tokenizer)
    assert rounded.ok and "up to rounding" in str(rounded)


def test_a_wrong_layer_and_a_wrong_place_are_named(sae, model, tokenizer):
    found = sae.check(model, tokenizer, hook=1)
    assert not found and "wrong layer: these are the activations of layers.2, and layers.1" in str(found)
    found = sae.check(model, hook="3.resid_pre")
    assert found.ok  # the same tensor
    assert "wrong place" in str(sae.check(model, hook="2.mlp_out"))


def test_a_missing_and_an_added_bos_and_another_tokenizer_are_named(sae, model, tokenizer, quick_world):
    found = sae.check(model, quick_world.tokenizer)
    assert not found.ok and "BOS missing: the text was read with token 3" in str(found)
    without = copy.copy(sae)
    without.fingerprint = Fingerprint.take(model, quick_world.tokenizer, 2)
    assert without.check(model, quick_world.tokenizer).ok
    assert "BOS added" in str(without.check(model, tokenizer))
    assert "other tokenizer" in str(sae.check(model, lambda text: {"input_ids": [3, 5, 5]}))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda h: h - h.mean(-1, keepdim=True), "centred"),
        (lambda h: 3.5 * h, "3.5 times"),
        (lambda h: h / h.norm(dim=-1, keepdim=True), "divided by their norm"),
        (lambda h: torch.nn.functional.layer_norm(h, h.shape[-1:]) * (63 / 64) ** 0.5, "layer norm"),
    ],
    ids=["centred", "scaled", "unit norm", "layer norm"],
)
def test_processed_activations_are_named_whichever_side_they_are_on(edit, words, sae, model, tokenizer):
    with edit_hook(model, 2, lambda hidden, _: edit(hidden)):
        found = sae.check(model, tokenizer)
        theirs = Fingerprint.take(model, tokenizer, 2)
    assert not found.ok and "other processing" in str(found) and words in str(found), found
    other = copy.copy(sae)
    other.fingerprint = theirs
    assert "other processing" in str(other.check(model, tokenizer))


def test_another_revision_is_near_and_another_model_is_not(sae, model, tokenizer):
    torch.manual_seed(0)
    near, far = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
        for parameter in far.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.02)
    found = sae.check(near, tokenizer)
    assert not found.ok and "other revision" in str(found) and "cosine 0.9" in str(found)
    assert "another model" in str(sae.check(far, tokenizer))


def test_another_width_or_vocabulary_is_another_model(sae, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=416, hidden_size=32, **sizes))
    assert "width 32" in str(sae.check(wide, tokenizer))
    small = LlamaForCausalLM(LlamaConfig(vocab_size=5, hidden_size=64, **sizes))
    assert "vocabulary" in str(sae.check(small, tokenizer))


def test_it_travels_with_the_sae_and_weighs_little(sae, model, tokenizer, tmp_path):
    sae.save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "fingerprint.safetensors"
    assert file.stat().st_size < 2000
    again = HubSAE.from_pretrained(tmp_path / "one")
    assert torch.allclose(again.fingerprint.activations, sae.fingerprint.activations, rtol=2e-3, atol=1e-2)
    assert again.check(model, tokenizer).ok and read(tmp_path / "one").fingerprint is not None
    plain = HubSAE.random(sae.config)
    with pytest.raises(ConfigError, match="came without a fingerprint"):
        plain.check(model)
    file.write_bytes((tmp_path / "one" / "sae_weights.safetensors").read_bytes())
    with pytest.raises(FormatError, match="a fingerprint"):
        HubSAE.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize("norm", ["none", "unit_norm"])
def test_it_stays_with_an_sae_that_is_written_with_a_threshold_or_on_another_norm(norm, sae, tmp_path):
    made = HubSAE.random(SAEConfig(architecture="batch_topk", d_in=64, d_sae=128, k=8, token_norm=norm))
    made.fingerprint = sae.fingerprint
    estimate_threshold(made, torch.randn(256, 64)).save_pretrained(tmp_path)
    kept = read(tmp_path).fingerprint
    assert kept is not None and kept.about == sae.fingerprint.about


def test_a_release_gets_them_from_the_command_line_and_is_checked(model, quick_world, tmp_path):
    release = Release.create(tmp_path / "r", name="r", base_model="local/tiny")
    for layer in (1, 2):
        made = HubSAE.random(SAEConfig(architecture="topk", d_in=64, d_sae=128, k=8))
        made.metadata.hook.layer, made.metadata.hook.module_path = layer, f"model.layers.{layer}"
        release.add(made, f"layer{layer}")
    run, where = CliRunner(), ["--model", str(quick_world.model_path)]
    done = run.invoke(build(), ["check", str(release.path), *where], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout.count("no fingerprint") == 2
    done = run.invoke(build(), ["check", str(release.path), *where, "--take"], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout.count("taken") == 2
    release = Release.open(release.path)
    release.verify()
    assert all(any(f.path.endswith("fingerprint.safetensors") for f in entry.files) for entry in release)
    assert run.invoke(build(), ["check", str(release.path), *where]).exit_code == 0
    first = sorted(quick_world.stages)[0]  # an earlier checkpoint of the same model
    done = run.invoke(build(), ["check", str(release.path), "--model", str(quick_world.stages[first])])
    assert done.exit_code == 1 and "layers.1" in done.stdout
