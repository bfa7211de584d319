"""SAEs as people write them by hand: read with the few facts that tensors cannot tell, or asked for them by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hubsae.core.errors import ConfigError, FormatError
from hubsae.formats import detect, package, read

from .conftest import D_IN, D_SAE, K


class HandMade(nn.Module):
    """Two linear layers and a top-k, as in a hundred notebooks."""

    def __init__(self, rand, *, pre_bias: bool):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D_IN, D_SAE), nn.Linear(D_SAE, D_IN)
        self.pre_bias = nn.Parameter(rand(D_IN)) if pre_bias else None
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            parameter.data = rand(*parameter.shape, scale=0.3)

    def codes(self, x):
        top = self.encoder(x if self.pre_bias is None else x - self.pre_bias).topk(K)
        return torch.zeros(len(x), D_SAE).scatter(-1, top.indices, top.values.relu())

    def forward(self, x):
        return self.decoder(self.codes(x))


def saved(model, path, wrapper):
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    return path


@pytest.mark.parametrize("pre_bias", [False, True])
@pytest.mark.parametrize(
    ("name", "wrapper"), [("a.safetensors", None), ("a.pt", None), ("a.pt", "model_state_dict"), ("a.pth", "model")]
)
def test_two_linear_layers_in_any_wrapping(name, wrapper, pre_bias, rand, x, same, tmp_path):
    model = HandMade(rand, pre_bias=pre_bias)
    file = saved(model, tmp_path / name, wrapper)
    assert [r.format for r in detect(file)] == ["linear"]
    with pytest.raises(FormatError, match="how latents are selected"):
        read(file)
    fact, question = ("decode_adds_b_pre", "adds the pre-bias") if pre_bias else ("apply_b_dec_to_input", "subtracted")
    with pytest.raises(FormatError, match=question):
        read(file, architecture="topk", k=K)
    same(read(file, architecture="topk", k=K, **{fact: False}), x, model.codes(x), model(x))
    if not pre_bias:
        subtracting = read(file, architecture="topk", k=K, apply_b_dec_to_input=True)
        same(subtracting, x, model.codes(x - model.decoder.bias), model(x - model.decoder.bias))


def test_what_the_hub_mixin_uploads_is_read_with_its_config(rand, x, same, tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Mixed(HandMade, hub.PyTorchModelHubMixin):
        def __init__(self, k: int = K, activation: str = "topk", apply_b_dec_to_input: bool = False):
            super().__init__(rand, pre_bias=False)

    model = Mixed()
    model.save_pretrained(tmp_path, config={"k": K, "activation": "topk", "apply_b_dec_to_input": False})
    sae = read(tmp_path / "model.safetensors")
    same(sae, x, model.codes(x), model(x))
    assert sae.config.k == K


def test_facts_stand_once_in_hubsae_yaml(rand, tmp_path):
    pile = tmp_path / "pile"
    pile.mkdir()
    for layer in (3, 9):
        saved(HandMade(rand, pre_bias=True), pile / f"layer{layer}.pt", "model_state_dict")
    facts = "choices: {architecture: topk, k: 6, decode_adds_b_pre: false}"
    (pile / "hubsae.yaml").write_text(f"base_model: Qwen/Qwen3-8B\nhook: model.layers.{{layer}}\n{facts}\n")
    release = package(pile, tmp_path / "release")
    assert [entry.layer for entry in release] == [3, 9] and release.load(layer=9).config.k == 6


@pytest.mark.parametrize("as_text", [True, False])
def test_a_key_map_reads_tensors_of_any_name(as_text, rand, x, same, tmp_path):
    model = HandMade(rand, pre_bias=True)
    state = model.state_dict()
    own = {"net.up.w": state["encoder.weight"], "net.up.b": state["encoder.bias"], "centre": state["pre_bias"],
           "net.down.w": state["decoder.weight"], "net.down.b": state["decoder.bias"]}  # fmt: skip
    torch.save({"model": own, "step": 3}, tmp_path / "odd.pt")
    assert detect(tmp_path / "odd.pt") == []
    names = {"W_enc": "net.up.w.T", "b_enc": "net.up.b", "W_dec": "net.down.w.T", "b_dec": "net.down.b",
             "pre_bias": "centre"}  # fmt: skip
    keys = ", ".join(f"{name}={source}" for name, source in names.items()) if as_text else names

    def mapped(keys):
        return read(tmp_path / "odd.pt", map=keys, architecture="topk", k=K, decode_adds_b_pre=False)

    same(mapped(keys), x, model.codes(x), model(x))
    with pytest.raises(FormatError, match=r"net\.up\.weight.*net\.up\.w"):
        mapped(names | {"W_enc": "net.up.weight"})
    with pytest.raises(ConfigError, match="gives no 'encoder'"):
        mapped({"encoder": "net.up.w"})
    with pytest.raises(FormatError, match="transposed"):
        mapped(names | {"W_dec": "net.down.w"})


@pytest.mark.parametrize(
    ("name", "enc", "dec", "model"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "encoder_linear", "decoder_linear", "meta-llama/Llama-3.1-8B-Instruct"),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "encoder", "decoder", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ],
)
def test_published_files_that_say_nothing_of_themselves(name, enc, dec, model, rand, x, same, tmp_path):
    t = {f"{enc}.weight": rand(D_SAE, D_IN), f"{enc}.bias": rand(D_SAE), f"{dec}.weight": rand(D_IN, D_SAE),
         f"{dec}.bias": rand(D_IN)}  # fmt: skip
    torch.save(t, tmp_path / name)
    sae = read(tmp_path / name)
    codes = (x @ t[f"{enc}.weight"].t() + t[f"{enc}.bias"]).relu()
    same(sae, x, codes, codes @ t[f"{dec}.weight"].t() + t[f"{dec}.bias"])
    assert (sae.metadata.hook.layer, sae.metadata.base_model.id) == (19, model)


def test_sae_on_heads_beside_its_cfg(rand, x, same, tmp_path):
    t = {"W_enc": rand(D_IN, D_SAE, scale=0.3), "W_dec": rand(D_SAE, D_IN, scale=0.3), "b_enc": rand(D_SAE),
         "b_dec": rand(D_IN)}  # fmt: skip
    torch.save(t, tmp_path / "gpt2-small_L5_v9.pt")
    cfg = {"act_name": "blocks.5.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE}
    (tmp_path / "gpt2-small_L5_v9_cfg.json").write_text(json.dumps(cfg))
    sae = read(tmp_path / "gpt2-small_L5_v9.pt")
    codes = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    same(sae, x, codes, codes @ t["W_dec"] + t["b_dec"])
    assert (sae.metadata.hook.kind, sae.metadata.hook.layer) == ("attn_z", 5)


def test_checkpoint_of_dictionary_learning_from_the_middle_of_a_training(rand, x, tmp_path):
    folder = tmp_path / "trainer_0" / "checkpoints"
    folder.mkdir(parents=True)
    state = {"encoder.weight": rand(D_SAE, D_IN), "encoder.bias": rand(D_SAE), "decoder.weight": rand(D_IN, D_SAE),
             "bias": rand(D_IN)}  # fmt: skip
    trainer = {"dict_class": "AutoEncoder", "layer": 4, "lm_name": "EleutherAI/pythia-70m"}
    (tmp_path / "trainer_0" / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save(state, folder / "ae_309.pt")
    torch.save(state, tmp_path / "trainer_0" / "ae.pt")
    assert [r.format for r in detect(folder / "ae_309.pt")] == ["dictionary_learning"]
    assert torch.equal(read(folder / "ae_309.pt")(x), read(tmp_path / "trainer_0")(x))
