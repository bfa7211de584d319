"""The big public suites: Qwen-Scope (`layer{n}.sae.pt`) and Gemma Scope (`params.npz`, `params.safetensors`).

qwen_scope    W_enc [d_sae, d_in], W_dec [d_in, d_sae]; top-k; nothing subtracted; k only in the repo name
gemma_scope   w_enc [d_in, d_sae], w_dec [d_sae, d_in], threshold; JumpReLU; nothing subtracted
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from hubsae.core.errors import FormatError
from hubsae.core.fold import TrainedTensors
from hubsae.core.metadata import DecoderFlags
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.base import Format, Found, Overrides, Probe, ReadWarning, assemble, expect_keys, orient

QWEN_FILE = re.compile(r"^layer_?(\d+)\.sae\.pt$")
QWEN_REPO = re.compile(r"SAE-Res-(?P<model>[\w.-]+?)-W\d+K-L0_(?P<k>\d+)")
QWEN_KEYS = ("W_enc", "W_dec", "b_enc", "b_dec")

NPZ = "params.npz"
SAFETENSORS = "params.safetensors"
GEMMA_KEYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
GEMMA_REPO = re.compile(r"gemma-scope-(?P<size>2b|9b|27b)-(?P<kind>pt|it)-(?P<site>res|mlp|att)")
GEMMA_LAYER = re.compile(r"layer_(\d+)")
SITES = {"res": "blocks.{}.hook_resid_post", "mlp": "blocks.{}.hook_mlp_out", "att": "blocks.{}.attn.hook_z"}


# ---- Qwen-Scope -------------------------------------------------------------------------------------------


def _detect_qwen(probe: Probe) -> str | None:
    if probe.is_dir or not QWEN_FILE.match(probe.path.name):
        return None
    value = probe.pickle()
    return (
        "layer{n}.sae.pt with W_enc, W_dec, b_enc, b_dec"
        if isinstance(value, dict) and set(QWEN_KEYS) <= set(value)
        else None
    )


def _read_qwen(probe: Probe, choices: Overrides) -> SAE:
    state = probe.pickle()
    if not isinstance(state, dict):
        raise FormatError(probe.path, "a dict of tensors", type(state).__name__)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    expect_keys(probe.path, tensors, QWEN_KEYS)
    match = QWEN_FILE.match(probe.path.name)
    # the repo name, when the file lies in a clone or in the Hub cache (models--Qwen--SAE-Res-...)
    repo = QWEN_REPO.search(probe.path.absolute().as_posix())
    d_in, d_sae = tensors["b_dec"].shape[0], tensors["b_enc"].shape[0]
    turned = True if choices.transposed is None else choices.transposed
    W_enc, W_dec, _ = orient(probe.path, tensors["W_enc"], tensors["W_dec"], d_in, d_sae, turned)
    return assemble(
        Found(
            format="qwen_scope",
            path=probe.path,
            trained=TrainedTensors(W_enc, W_dec, tensors["b_dec"], None, {"b_enc": tensors["b_enc"]}),
            architecture="topk",
            k=int(repo["k"]) if repo else None,
            layer=int(match[1]) if match else probe.name.layer,
            base_model=f"Qwen/{repo['model']}" if repo else None,
            flags=DecoderFlags(encoder_orientation="[d_sae, d_in]", decoder_orientation="[d_in, d_sae]"),
        ),
        choices,
    )


# ---- Gemma Scope ------------------------------------------------------------------------------------------


def _gemma_file(probe: Probe) -> Path | None:
    if not probe.is_dir:
        return probe.path if probe.path.name in (NPZ, SAFETENSORS) else None
    return next((probe.path / name for name in (NPZ, SAFETENSORS) if name in probe.names), None)


def _detect_gemma(probe: Probe) -> str | None:
    file = _gemma_file(probe)
    if file is None:
        return None
    names = set(io.npz_shapes(file) if file.suffix == ".npz" else io.safetensors_header(file))
    return f"{file.name} with {', '.join(GEMMA_KEYS)}" if set(GEMMA_KEYS) <= names else None


def _read_gemma(probe: Probe, choices: Overrides) -> SAE:
    file = _gemma_file(probe)
    if file is None:
        raise FormatError(probe.path, f"{NPZ} or {SAFETENSORS}", "neither")
    tensors = io.read_npz(file) if file.suffix == ".npz" else io.read_safetensors(file)
    expect_keys(file, tensors, GEMMA_KEYS)
    config = probe.json("config.json")
    where = file.absolute().as_posix()
    repo, layer = GEMMA_REPO.search(where), GEMMA_LAYER.search(where)
    if "embedding" in where:
        warnings.warn(
            f"{file}: trained on embeddings before they are scaled by sqrt(d_in); for the scaled ones of "
            "TransformerLens give input_scale=1/sqrt(d_in)",
            ReadWarning,
            stacklevel=3,
        )
    elif config.get("hf_hook_point_out") not in (None, config.get("hf_hook_point_in")):
        raise FormatError(file, "an autoencoder", f"a transcoder to {config['hf_hook_point_out']}")
    number = int(layer[1]) if layer else None
    hook = SITES[repo["site"]].format(number) if repo and number is not None else config.get("hf_hook_point_in")
    return assemble(
        Found(
            format="gemma_scope",
            path=file,
            trained=TrainedTensors(
                tensors["w_enc"], tensors["w_dec"], tensors["b_dec"], None, {"b_enc": tensors["b_enc"]}
            ),
            architecture="jumprelu",
            threshold=tensors["threshold"],
            layer=number,
            hook=hook if isinstance(hook, str) else None,
            base_model=_gemma_model(repo, config),
        ),
        choices,
    )


def _gemma_model(repo: re.Match[str] | None, config: dict[str, Any]) -> str | None:
    if repo:
        return f"google/gemma-2-{repo['size']}" + ("-it" if repo["kind"] == "it" else "")
    name = config.get("model_name")
    return (name if "/" in name else f"google/{name}").replace("-v3", "-3") if isinstance(name, str) else None


QWEN_SCOPE = Format(
    name="qwen_scope",
    title="Qwen-Scope",
    detect=_detect_qwen,
    read=_read_qwen,
    covers=frozenset({"pt"}),
    layout="`layer{n}.sae.pt`; k in the name of the repo",
)
GEMMA_SCOPE = Format(
    name="gemma_scope",
    title="Gemma Scope (1 and 2)",
    detect=_detect_gemma,
    read=_read_gemma,
    layout="`params.npz`, or `params.safetensors` with `config.json`",
)
