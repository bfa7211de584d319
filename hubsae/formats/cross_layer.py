"""Cross-layer transcoders from disk: circuit-tracer's folders, and those of Gemma Scope 2.

    W_enc_{N}.safetensors         W_enc_N [d_sae, d_in]  b_enc_N  b_dec_N  threshold_N in some
    W_dec_{N}.safetensors         W_dec_N [d_sae, layers - N, d_out]                     config.yaml beside them
    ..layer_{N}.safetensors       w_enc [d_in, d_sae]  w_dec [d_sae, layers, d_out]  b_enc  b_dec  threshold
                                  affine_skip_connection [d_in, d_out] in some

A latent of layer N writes to N and later layers; what Gemma Scope's decoder holds for earlier ones is not used.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from hubsae.core.cross_layer import CrossLayerTranscoder
from hubsae.core.errors import FormatError
from hubsae.core.hooks import KINDS, HookPoint
from hubsae.formats import tensors as io
from hubsae.formats.assembling import expect_keys
from hubsae.formats.base import Probe, reading

ENCODER = re.compile(r"^W_enc_(\d+)\.safetensors$")
DECODER = re.compile(r"^W_dec_(\d+)\.safetensors$")
GEMMA = re.compile(r"^(?:.*[_-])?layer_(\d+)\.safetensors$")
GEMMA_KEYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
GEMMA_SKIP = "affine_skip_connection"
GEMMA_REPO = re.compile(r"gemma-scope-2-(?P<size>[0-9]+m|[0-9]+b)-(?P<kind>pt|it)")


def is_cross_layer(probe: Probe) -> bool:
    """Whether a file is one layer of a cross-layer transcoder, or a folder holds one."""
    if probe.is_dir:
        return any(ENCODER.match(name) for name in probe.names) or any(
            _three_dimensional(probe, name) for name in probe.names if GEMMA.match(name)
        )
    name = probe.path.name
    return bool(ENCODER.match(name) or DECODER.match(name)) or (
        bool(GEMMA.match(name)) and _three_dimensional(probe, "")
    )


def _three_dimensional(probe: Probe, name: str) -> bool:
    header = probe.header(name)
    return set(GEMMA_KEYS) <= set(header) and len(header["w_dec"][1]) == 3


def read_cross_layer(
    path: str | os.PathLike[str], *, hook: str | None = None, hook_out: str | None = None, base_model: str | None = None
) -> CrossLayerTranscoder:
    """Read a folder that holds a cross-layer transcoder, all its layers.

    `hook` and `hook_out` are kinds of hook points (`mlp_in`, `mlp_out`, or TransformerLens' `hook_resid_mid`) where the
    folder does not say; circuit-tracer's own default is resid_mid to mlp_out, and Gemma Scope's mlp_in to mlp_out.
    """
    probe = Probe(Path(path))
    with reading(probe.path):
        if not probe.is_dir or not is_cross_layer(probe):
            raise FormatError(
                probe.path, "a folder with a file for every layer of a cross-layer transcoder", "something else",
                hint="W_enc_0.safetensors and W_dec_0.safetensors (circuit-tracer), or params_layer_0.safetensors "
                "(Gemma Scope 2)",
            )  # fmt: skip
        gemma = not any(ENCODER.match(name) for name in probe.names)
        numbers = _numbers(probe, GEMMA if gemma else ENCODER)
        if numbers != list(range(len(numbers))):
            raise FormatError(
                probe.path, f"the layers 0 to {max(numbers)}", f"{numbers}", hint="download all its files"
            )
        layers = [_gemma_layer(probe, n) if gemma else _layer(probe, n) for n in numbers]
        for n, tensors in enumerate(layers):
            later = tensors["W_dec"].shape[1]
            if later != len(layers) - n:
                raise FormatError(
                    probe.path, f"{n + later} layers, as the decoder of layer {n} says", f"{len(layers)}",
                    hint="download all its files",
                )  # fmt: skip
        config = probe.yaml("config.yaml")
        model, repo = config.get("model_name"), GEMMA_REPO.search(probe.path.absolute().as_posix())
        if repo and gemma:
            model = f"google/gemma-3-{repo['size']}-{repo['kind']}".replace("270m-pt", "270m")
        default = "mlp_in" if gemma else "hook_resid_mid"
        inputs = _hooks(hook or config.get("feature_input_hook") or default, len(layers))
        outputs = _hooks(hook_out or config.get("feature_output_hook") or "hook_mlp_out", len(layers))
        known = base_model or (model if isinstance(model, str) else None)
        return CrossLayerTranscoder(layers, hooks=inputs, hooks_out=outputs, base_model=known)


def _numbers(probe: Probe, pattern: re.Pattern[str]) -> list[int]:
    return sorted(int(match[1]) for name in probe.names if (match := pattern.match(name)))


def _layer(probe: Probe, n: int) -> dict[str, Tensor]:
    encoder = io.read_safetensors(_there(probe, f"W_enc_{n}.safetensors"))
    decoder = io.read_safetensors(_there(probe, f"W_dec_{n}.safetensors"))
    expect_keys(probe.path / f"W_enc_{n}.safetensors", encoder, [f"{k}_{n}" for k in ("W_enc", "b_enc", "b_dec")],
                (f"threshold_{n}",))  # fmt: skip
    expect_keys(probe.path / f"W_dec_{n}.safetensors", decoder, [f"W_dec_{n}"], ())
    out = {name: encoder[f"{name}_{n}"] for name in ("b_enc", "b_dec")}
    out |= {"W_enc": encoder[f"W_enc_{n}"].t().contiguous(), "W_dec": decoder[f"W_dec_{n}"]}
    if f"threshold_{n}" in encoder:
        out["threshold"] = encoder[f"threshold_{n}"].flatten()
    return {name: tensor.float() for name, tensor in out.items()}


def _gemma_layer(probe: Probe, n: int) -> dict[str, Tensor]:
    name = next(name for name in sorted(probe.names) if (match := GEMMA.match(name)) and int(match[1]) == n)
    tensors = io.read_safetensors(probe.path / name)
    expect_keys(probe.path / name, tensors, GEMMA_KEYS, (GEMMA_SKIP,))
    out = {"W_enc": tensors["w_enc"], "W_dec": tensors["w_dec"][:, n:].contiguous()}
    out |= {key: tensors[key] for key in ("b_enc", "b_dec", "threshold")}
    if GEMMA_SKIP in tensors:
        out["W_skip"] = tensors[GEMMA_SKIP].t().contiguous()
    return {key: tensor.float() for key, tensor in out.items()}


def _there(probe: Probe, name: str) -> Path:
    if name not in probe.names:
        raise FormatError(probe.path, name, "no such file", hint="download all files of the cross-layer transcoder")
    return probe.path / name


def _hooks(kind: Any, layers: int) -> list[HookPoint]:
    """Hook points of all layers by their kind, in our name or TransformerLens'."""
    name = "hook_mlp_out" if kind == "mlp.hook_out" else str(kind)
    return [HookPoint.parse(f"{n}.{name}" if name in KINDS else f"blocks.{n}.{name}") for n in range(layers)]
