"""Shared by what runs inside a peer's environment: hubsae is not there, only the peer and what it brings."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from names import NAMES, VOCABULARY  # noqa: F401  (for the scripts)
from safetensors.torch import load_file

WORK = Path(sys.argv[1])
"""The release, and what hubsae says of its SAEs."""
EXPECTED = load_file(WORK / "expected.safetensors")
X = EXPECTED["x"]


def close(name: str, latents: torch.Tensor | None, output: torch.Tensor) -> str:
    """How far numbers are from hubsae's; an assertion where they are not the same."""
    wanted = EXPECTED[f"{name}/output"]
    far = float((output.detach().float() - wanted).norm() / wanted.norm())
    if latents is not None:
        codes = EXPECTED[f"{name}/latents"]
        assert bool(((latents != 0) == (codes != 0)).all()), "other latents fire"
        assert float((latents - codes).abs().max() / codes.abs().max()) < 2e-5, "other latents"
    assert far < 1e-6, f"the output is {far:.2g} away"
    return f"equal ({far:.0e})"


def tokens(rows: int = 32, length: int = 24) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def transformer_lens_model():
    """A small TransformerLens model with a tokenizer."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        d_model=X.shape[1], n_layers=3, n_ctx=64, d_head=8, n_heads=4, d_mlp=64, d_vocab=VOCABULARY, act_fn="gelu",
        normalization_type="LN", model_name="tiny", seed=0, device="cpu",
    )  # fmt: skip
    model = HookedSAETransformer(config)
    model.set_tokenizer(PreTrainedTokenizerFast.from_pretrained(WORK / "tokenizer"))
    return model.eval()


def run(checks: dict[str, Callable[[], str]], version: str) -> None:
    """Run checks by name and print what came of each, as JSON on the last line."""
    found = {}
    for name, check in checks.items():
        try:
            found[name] = ("ok", check())
        except Exception as error:  # whatever a peer raises is the result
            traceback.print_exc()
            found[name] = (
                "fails",
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
            )
    print(json.dumps({"version": version, "checks": found}))
