"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`, `config.json`): JumpReLU, nothing is subtracted.

w_enc [d_in, d_sae], w_dec [d_sae, d_in], b_enc, b_dec, threshold [d_sae]
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from hubsae.core.errors import FormatError
from hubsae.core.fold import TrainedTensors
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import Found, assemble, expect_keys
from hubsae.formats.base import Files, Format, Overrides, Probe, ReadWarning

NPZ = "params.npz"
SAFETENSORS = "params.safetensors"
KEYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
GEMMA_REPO = re.compile(r"gemma-scope-(?P<size>2b|9b|27b)-(?P<kind>pt|it)-(?P<site>res|mlp|att)")
GEMMA_LAYER = re.compile(r"layer_(\d+)")
SITES = {"res": "blocks.{}.hook_resid_post", "mlp": "blocks.{}.hook_mlp_out", "att": "blocks.{}.attn.hook_z"}


def _gemma_file(probe: Probe) -> Path | None:
    if not probe.is_dir:
        return probe.path if probe.path.name in (NPZ, SAFETENSORS) else None
    return next((probe.path / name for name in (NPZ, SAFETENSORS) if name in probe.names), None)


def detect(probe: Probe) -> str | None:
    """Those five arrays in one of the two files."""
    file = _gemma_file(probe)
    if file is None:
        return None
    names = set(io.npz_shapes(file) if file.suffix == ".npz" else io.safetensors_header(file))
    return f"{file.name} with {', '.join(KEYS)}" if set(KEYS) <= names else None


def _read(probe: Probe, choices: Overrides) -> SAE:
    file = _gemma_file(probe)
    if file is None:
        raise FormatError(probe.path, f"{NPZ} or {SAFETENSORS}", "neither")
    tensors = io.read_npz(file) if file.suffix == ".npz" else io.read_safetensors(file)
    expect_keys(file, tensors, KEYS)
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


FORMAT = Format(
    name="gemma_scope",
    title="Gemma Scope (1 and 2)",
    detect=detect,
    read=_read,
    files=(Files((NPZ,), ("config.json",)), Files((SAFETENSORS,), ("config.json",))),
    layout="`params.npz`, or `params.safetensors` with `config.json`",
)
