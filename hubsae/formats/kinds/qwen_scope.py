"""Qwen-Scope: `layer{n}.sae.pt` with W_enc [d_sae, d_in], W_dec [d_in, d_sae], top-k; nothing is subtracted.

k and the base model stand only in the name of the repo.
"""

from __future__ import annotations

import re

from torch import Tensor

from hubsae.core.fold import TrainedTensors
from hubsae.core.sae import SAE
from hubsae.formats.assembling import Found, assemble, expect_keys, orient
from hubsae.formats.base import Format, Overrides, Probe

FILE = re.compile(r"^layer_?(\d+)\.sae\.pt$")
REPO = re.compile(r"SAE-Res-(?P<model>[\w.-]+?)-W\d+K-L0_(?P<k>\d+)")
KEYS = ("W_enc", "W_dec", "b_enc", "b_dec")


def detect(probe: Probe) -> str | None:
    """A file of that name with those four tensors."""
    if probe.is_dir or not FILE.match(probe.path.name):
        return None
    value = probe.pickle()
    fits = isinstance(value, dict) and set(KEYS) <= set(value)
    return "layer{n}.sae.pt with W_enc, W_dec, b_enc, b_dec" if fits else None


def _read(probe: Probe, choices: Overrides) -> SAE:
    tensors = {k: v for k, v in probe.state().items() if isinstance(v, Tensor)}
    expect_keys(probe.path, tensors, KEYS)
    match = FILE.match(probe.path.name)
    # the repo name, when the file lies in a clone or in the Hub cache (models--Qwen--SAE-Res-...)
    repo = REPO.search(probe.path.absolute().as_posix())
    d_in, d_sae = tensors["b_dec"].shape[0], tensors["b_enc"].shape[0]
    turned = True if choices.transposed is None else choices.transposed
    W_enc, W_dec, flags = orient(probe.path, tensors["W_enc"], tensors["W_dec"], d_in, d_sae, turned)
    return assemble(
        Found(
            format="qwen_scope",
            path=probe.path,
            trained=TrainedTensors(W_enc, W_dec, tensors["b_dec"], None, {"b_enc": tensors["b_enc"]}),
            architecture="topk",
            k=int(repo["k"]) if repo else None,
            layer=int(match[1]) if match else probe.name.layer,
            base_model=f"Qwen/{repo['model']}" if repo else None,
            flags=flags,
        ),
        choices,
    )


FORMAT = Format(
    name="qwen_scope",
    title="Qwen-Scope",
    detect=detect,
    read=_read,
    suffixes=(".sae.pt",),
    covers=frozenset({"pt"}),
    layout="`layer{n}.sae.pt`; k in the name of the repo",
)
