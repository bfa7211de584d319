"""sparsify loads the top-k SAE of the release from its own folder, beside hubsae's files."""

from __future__ import annotations

from importlib.metadata import version

import torch
from common import WORK, X, close, run
from sparsify import SparseCoder


def load() -> str:
    coder = SparseCoder.load_from_disk(WORK / "release" / "topk", device="cpu")
    with torch.no_grad():
        out = coder.encode(X)
        dense = torch.zeros(len(X), coder.num_latents).scatter(1, out.top_indices, out.top_acts)
        return close("topk", dense, coder.decode(out.top_acts, out.top_indices))


run({"topk": load}, version("eai-sparsify"))
