"""The tiny model of these tests, importable from a subprocess."""

from __future__ import annotations

import torch


def make_qwen(seed: int = 0, layers: int = 4, vocab: int = 300, d: int = 32) -> torch.nn.Module:
    """A random Qwen2 model."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=vocab, hidden_size=d, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()
