"""SAELens loads every SAE of the release with the same numbers, and runs a model with it."""

from __future__ import annotations

from importlib.metadata import version

import torch
from common import NAMES, WORK, X, close, run, tokens, transformer_lens_model
from sae_lens import SAE


def load(name: str) -> str:
    sae = SAE.load_from_disk(WORK / "release" / name)
    return close(name, sae.encode(X).detach(), sae(X))


def in_a_model() -> str:
    model, sae = transformer_lens_model(), SAE.load_from_disk(WORK / "release" / "topk")
    _, cache = model.run_with_cache_with_saes(tokens(2), saes=[sae])
    plain = model.run_with_cache(tokens(2))[1]["blocks.1.hook_resid_post"]
    codes = next(value for key, value in cache.items() if key.endswith("hook_sae_acts_post"))
    assert torch.allclose(codes, sae.encode(plain), atol=1e-5)
    return "HookedSAETransformer gives its codes"


run({**{name: lambda n=name: load(n) for name in NAMES}, "in a model": in_a_model}, version("sae-lens"))
