"""Hook points mean in every family what TransformerLens means by them: compared on tiny models, or refused by name."""

from __future__ import annotations

import pytest
import torch

from hubsae.core.errors import HookError
from hubsae.core.hooks import KINDS, HookPoint, edit_hook, read_hook

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_LIKE = ["llama", "qwen2", "qwen3", "mistral", "gpt2"]
POST_NORMS = ["gemma2", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4"]
PARALLEL = ["gpt_neox", "phi"]
IDS = torch.tensor([[1, 9, 33, 4, 60], [1, 7, 7, 12, 5]])


def tiny(family: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    grouped = {} if family in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **grouped)).eval()
    for parameter in model.parameters():  # norms too, so that a wrong side of one shows
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def lens_cache(model, folder):
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    with torch.no_grad():
        return bridge.boot_transformers(str(folder), dtype=torch.float32).run_with_cache(IDS)[1]


def activations(model, hook):
    seen = []
    with torch.no_grad(), read_hook(model, hook, lambda hidden: seen.append(hidden.clone())):
        model(IDS)
    return seen[0]


@pytest.mark.parametrize("family", LLAMA_LIKE + POST_NORMS + PARALLEL)
def test_every_place_is_where_transformer_lens_takes_it(family, tmp_path):
    model = tiny(family)
    cache = lens_cache(model, tmp_path)
    compared = []
    for kind in KINDS:
        hook = HookPoint(1 if kind != "embed" else 0, kind)
        try:
            mine = activations(model, hook)
        except HookError as error:
            assert kind in ("resid_mid", "mlp_norm"), error  # places that a family may lack
            continue
        name = hook.transformer_lens
        assert name in cache, f"{family} has {kind} here and not in TransformerLens"
        theirs = cache[name].flatten(2)  # hook_z has a dimension for the heads
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5, (family, kind)
        compared.append(kind)
    needed = {"resid_post", "resid_pre", "mlp_out", "attn_out", "attn_z", "mlp_in", "embed"}
    assert needed <= set(compared)
    assert ("resid_mid" in compared) is (family not in PARALLEL)


@pytest.mark.parametrize("family", LLAMA_LIKE + POST_NORMS + PARALLEL)
def test_what_the_parts_add_is_what_the_block_adds(family):
    model = tiny(family)
    pre, post = activations(model, "1.resid_pre"), activations(model, "1.resid_post")
    added = activations(model, "1.attn_out") + activations(model, "1.mlp_out")
    assert float((pre + added - post).norm() / post.norm()) < 1e-5


def test_a_module_that_is_not_what_is_added_is_refused_or_taken_as_itself():
    model = tiny("gemma2")
    with pytest.raises(HookError, match=r"1\.mlp_out.*post_feedforward_layernorm"):
        activations(model, "model.layers.1.mlp")
    with pytest.raises(HookError, match=r"self_attn and attn_out differ"):
        activations(model, "model.layers.1.self_attn")
    itself, added = activations(model, "model.layers.1.mlp.output"), activations(model, "1.mlp_out")
    assert float((itself - added).norm() / added.norm()) > 0.1
    assert torch.equal(added, activations(model, "model.layers.1.post_feedforward_layernorm.output"))
    llama = tiny("llama")
    assert torch.equal(activations(llama, "model.layers.1.mlp"), activations(llama, "1.mlp_out"))


@pytest.mark.parametrize("family", ["granite", "bloom", "falcon_h1"])
def test_a_family_that_does_not_just_add_its_parts_refuses_them(family):
    model = tiny(family)
    for kind in ("mlp_out", "attn_out"):
        with pytest.raises(HookError, match="does not just add"):
            activations(model, f"1.{kind}")
    assert activations(model, "1.resid_pre").shape == (2, 5, 32)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mlp_norm"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_module_paths_and_transformer_lens_names_lead_back_to_the_place(kind, family):
    hook = HookPoint(0 if kind == "embed" else 1, kind)
    model = tiny(family)
    want = activations(model, hook)
    base = "google/gemma-2-2b" if family == "gemma2" else "meta-llama/Llama-3.1-8B"
    for name in (hook.name, hook.transformer_lens, hook.module_path(model), hook.module_path(base_model=base)):
        assert name is not None and torch.equal(activations(model, name), want), name
    assert HookPoint.parse(hook.transformer_lens or "") == HookPoint.parse(hook.name) == hook


def test_replacing_at_an_input_and_inside_a_norm():
    model = tiny("llama")
    with torch.no_grad():
        plain = model(IDS).logits
        with edit_hook(model, "1.attn_z", lambda hidden, _: hidden.clone()):
            assert torch.equal(model(IDS).logits, plain)
        with edit_hook(model, "1.attn_z", lambda hidden, _: hidden * 0):
            assert not torch.allclose(model(IDS).logits, plain)
        with pytest.raises(HookError, match="read, not replaced"), edit_hook(model, "1.mlp_norm", lambda h, _: h):
            model(IDS)
