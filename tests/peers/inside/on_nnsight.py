"""nnsight reads the activations that `attach` reads, and the SAE's tensors spliced in give hubsae's logits."""

from __future__ import annotations

from importlib.metadata import version

import torch
from common import EXPECTED, WORK, close, run
from nnsight import NNsight
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LAYER = 1


def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w = load_file(WORK / "release" / "relu" / "sae_weights.safetensors")
    z = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    return z, z @ w["W_dec"] + w["b_dec"]


def spliced() -> str:
    model = AutoModelForCausalLM.from_pretrained(WORK / "model").eval()
    traced = NNsight(model)
    with torch.no_grad(), traced.trace(input_ids=EXPECTED["ids"].long()):
        hidden = traced.model.layers[LAYER].output.save()
        traced.model.layers[LAYER].output = encode(hidden)[1]
        logits = traced.output.logits.save()
    assert torch.allclose(encode(hidden)[0], EXPECTED["attach/latents"], atol=1e-5), "other codes"
    return close("splice", None, logits)


run({"codes and spliced logits": spliced}, version("nnsight"))
