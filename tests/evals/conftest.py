"""Tiny models, SAEs and activations that the evaluation tests share."""

from __future__ import annotations

import pytest
import torch

from hubsae.core.config import SAEConfig
from hubsae.hub.sae import HubSAE

D, D_SAE, VOCAB = 32, 128, 97


def tiny_model(family: str, dtype: torch.dtype = torch.float32):
    """A random decoder model of a family, three layers, weights large enough that layers matter."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        config = CONFIG_MAPPING[family](n_embd=D, n_layer=3, n_head=4, n_positions=128, **sizes)
    else:
        shape = {
            "hidden_size": D,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        }
        if family != "gpt_neox":
            shape["num_key_value_heads"] = 2
        if family == "gemma":
            shape["head_dim"] = 8
        config = CONFIG_MAPPING[family](**shape, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def qwen():
    """A tiny Qwen2."""
    return tiny_model("qwen2")


@pytest.fixture(scope="session")
def make_model():
    """Tiny models by family."""
    return tiny_model


@pytest.fixture(scope="session")
def make_sae():
    """SAEs by architecture."""

    def make(architecture: str = "topk", *, d_in: int = D, d_sae: int = D_SAE, k: int = 8, seed: int = 0, **more):
        kept = k if architecture in ("topk", "batch_topk") else None
        config = SAEConfig(architecture=architecture, d_in=d_in, d_sae=d_sae, k=kept, **more)
        return HubSAE.random(config, seed=seed)

    return make


@pytest.fixture(scope="session")
def table():
    """Activations with a massive first position, a large mean and a spread of scales, and their labels."""
    torch.manual_seed(1)
    rows = 10_000
    x = torch.randn(rows, D) * torch.rand(D) * 3 + torch.randn(D) * 5
    position = torch.arange(rows) % 60
    x[position == 0] *= 40
    return {"x": x, "position": position, "is_prompt": position < 25, "sample_id": torch.arange(rows) // 60}


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer with offsets, padding and a chat template: words w0 to w96."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w96", unk_token="w0", eos_token="w96")
    made.chat_template = (
        "{% for m in messages %}{{ 'w90 ' if m.role == 'user' else 'w91 ' }}{{ m.content }}{{ ' w92 ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w91 ' }}{% endif %}"
    )
    return made
