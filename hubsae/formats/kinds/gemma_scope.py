"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`, `config.json`): JumpReLU, nothing is subtracted.

    w_enc [d_in, d_sae]   w_dec [d_sae, d_out]   b_enc, threshold [d_sae]   b_dec [d_out]
    affine_skip_connection [d_in, d_out] in some transcoders

Autoencoders and transcoders have the same tensors; config.json or the path says which it is.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from hubsae.core.errors import FormatError
from hubsae.core.fold import TrainedTensors
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import Found, assemble, expect_keys
from hubsae.formats.base import Files, Format, Overrides, Probe, ReadWarning

NPZ = "params.npz"
SAFETENSORS = "params.safetensors"
KEYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
SKIP = "affine_skip_connection"
# the repo and the folders of a path say what its tensors cannot: the site, and whether it predicts another one
REPO_1 = re.compile(r"gemma-scope-(?P<size>2b|9b|27b)-(?P<kind>pt|it)-(?P<site>res|mlp|att|transcoders)")
REPO_2 = re.compile(r"gemma-scope-2-(?P<size>[0-9]+m|[0-9]+b)-(?P<kind>pt|it)")
SITE_2 = re.compile(r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder|clt)(?:_all)?(?=/)")
LAYER = re.compile(r"layer_(\d+)")
SITES = {
    "res": ("blocks.{}.hook_resid_post", None),
    "mlp": ("blocks.{}.hook_mlp_out", None),
    "att": ("blocks.{}.attn.hook_z", None),
    "transcoders": ("blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"),
    "resid_post": ("blocks.{}.hook_resid_post", None),
    "attn_out": ("blocks.{}.attn.hook_z", None),
    "mlp_out": ("blocks.{}.hook_mlp_out", None),
    "transcoder": ("blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"),
}


class Where(NamedTuple):
    """What is read where."""

    hook: str | None
    hook_out: str | None
    layer: int | None
    base_model: str | None


def _file(probe: Probe) -> Path | None:
    if not probe.is_dir:
        return probe.path if probe.path.name in (NPZ, SAFETENSORS) else None
    return next((probe.path / name for name in (NPZ, SAFETENSORS) if name in probe.names), None)


def detect(probe: Probe) -> str | None:
    """Those five arrays in one of the two files."""
    file = _file(probe)
    if file is None:
        return None
    names = set(io.npz_shapes(file) if file.suffix == ".npz" else io.safetensors_header(file))
    return f"{file.name} with {', '.join(KEYS)}" if set(KEYS) <= names else None


def _read(probe: Probe, choices: Overrides) -> SAE:
    file = _file(probe)
    if file is None:
        raise FormatError(probe.path, f"{NPZ} or {SAFETENSORS}", "neither")
    tensors = io.read_npz(file) if file.suffix == ".npz" else io.read_safetensors(file)
    expect_keys(file, tensors, KEYS, (SKIP,))
    where = _where(file, probe.json("config.json"))
    skip = tensors.get(SKIP)
    transcoder = (choices.hook_out or where.hook_out) is not None
    if skip is not None and not transcoder:
        raise FormatError(file, "the place that a transcoder predicts", "none", hint="give hook_out='18.mlp_out'")
    if where.hook is None and choices.hook is None:
        warnings.warn(
            f"{file}: neither a config.json nor the path says where it belongs. Transcoders of this family have the "
            "same tensors; read as an autoencoder. Give hook=, and hook_out= for a transcoder",
            ReadWarning,
            stacklevel=3,
        )
    return assemble(
        Found(
            format="gemma_scope",
            path=file,
            trained=TrainedTensors(
                tensors["w_enc"], tensors["w_dec"], tensors["b_dec"], None, {"b_enc": tensors["b_enc"]},
                W_skip=None if skip is None else skip.t(),  # stored as [d_in, d_out]
            ),
            architecture="jumprelu",
            threshold=tensors["threshold"],
            transcoder=transcoder,
            layer=where.layer,
            hook=where.hook,
            hook_out=where.hook_out,
            base_model=where.base_model,
        ),
        choices,
    )  # fmt: skip


def _where(file: Path, config: dict[str, Any]) -> Where:
    path = file.absolute().as_posix()
    one, two, layer = REPO_1.search(path), REPO_2.search(path), LAYER.search(path)
    number = int(layer[1]) if layer else None
    if one:
        model = f"google/gemma-2-{one['size']}" + ("-it" if one["kind"] == "it" else "")
        if "embedding" in path:
            warnings.warn(
                f"{file}: trained on embeddings before they are scaled by sqrt(d_in); for the scaled ones of "
                "TransformerLens and of recent transformers give input_scale=1/sqrt(d_in)",
                ReadWarning,
                stacklevel=4,
            )
            return Where("hook_embed", None, 0, model)
        return _site(one["site"], number, model)
    name = config.get("model_name")
    if two and not isinstance(name, str):
        name = f"gemma-3-{two['size']}-{two['kind']}"
    model = _model_2(name) if isinstance(name, str) else None
    inputs, outputs = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    site = SITE_2.search(path)
    if isinstance(inputs, str):
        said = outputs if isinstance(outputs, str) and outputs != inputs else None
        return Where(inputs, said, number, model)
    if site and site[1] == "clt":
        raise FormatError(file, "one layer's transcoder", "a cross-layer one", hint="load it with circuit-tracer")
    # only a folder of that suite: elsewhere the same words may mean other things
    return _site(site[1], number, model) if site and two else Where(None, None, number, model)


def _site(site: str, layer: int | None, model: str | None) -> Where:
    if layer is None:
        return Where(None, None, None, model)
    inputs, outputs = SITES[site]
    return Where(inputs.format(layer), None if outputs is None else outputs.format(layer), layer, model)


def _model_2(name: str) -> str:
    model = (name if "/" in name else f"google/{name}").replace("-v3", "-3")
    return model.removesuffix("-pt") if model.endswith("270m-pt") else model  # the one whose id has no suffix


FORMAT = Format(
    name="gemma_scope",
    title="Gemma Scope (1 and 2)",
    detect=detect,
    read=_read,
    files=(Files((NPZ,), ("config.json",)), Files((SAFETENSORS,), ("config.json",))),
    layout="`params.npz`, or `params.safetensors` with `config.json`",
)
