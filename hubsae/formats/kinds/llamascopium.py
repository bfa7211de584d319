"""Llamascopium (OpenMOSS Language-Model-SAEs) folders, current and older, and Llama Scope's first releases.

    config.json with sae_type    sae_weights.safetensors (or checkpoints/final.safetensors ...)
    hyperparams.json             checkpoints/final.safetensors (Llama Scope)

Inputs are scaled to an average norm of sqrt(d_in); the average lies in the weights file or the config. With
`sparsity_include_decoder_norm` selection looks at latents times their decoder norm.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.core.errors import FormatError
from hubsae.core.fold import TrainedTensors, fold_decoder_norms
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import Found, assemble, expect_keys, linear_pair
from hubsae.formats.base import Files, Format, Overrides, Probe

WEIGHT_FILES = (
    "sae_weights.safetensors", "sae_weights.pt", "checkpoints/pruned.safetensors", "checkpoints/pruned.pt",
    "checkpoints/final.safetensors", "checkpoints/final.pt",
)  # fmt: skip
NORM_PREFIX = "dataset_average_activation_norm."
LOG_THRESHOLD = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
ARCHITECTURES = {"relu": "relu", "topk": "topk", "batchtopk": "batch_topk", "jumprelu": "jumprelu"}


def _config(probe: Probe) -> dict[str, Any]:
    config = probe.json("config.json")
    if "sae_type" in config and "d_model" in config:
        return config
    hyper = probe.json("hyperparams.json")
    return hyper if {"d_model", "hook_point_in"} <= set(hyper) else {}


def _weights(probe: Probe) -> Path | None:
    return next((probe.path / name for name in WEIGHT_FILES if (probe.path / name).is_file()), None)


def detect(probe: Probe) -> str | None:
    """config.json with sae_type, or hyperparams.json with hook_point_in, and weights."""
    if not probe.is_dir or not _config(probe) or (file := _weights(probe)) is None:
        return None
    source = "config.json with sae_type" if "sae_type" in _config(probe) else "hyperparams.json"
    return f"{source} and {file.relative_to(probe.path).as_posix()}"


def _read(probe: Probe, choices: Overrides) -> SAE:
    config, file = _config(probe), _weights(probe)
    if not config or file is None:
        raise FormatError(probe.path, "config.json or hyperparams.json, and weights", "a folder without them")
    _supported(file, config)
    tensors = io.read_safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    norms = {name[len(NORM_PREFIX) :]: float(t) for name, t in tensors.items() if name.startswith(NORM_PREFIX)}
    tensors = {name: t for name, t in tensors.items() if not name.startswith(NORM_PREFIX)}
    first_release = "sae_type" not in config
    log_threshold = next((tensors.pop(name) for name in LOG_THRESHOLD if name in tensors), None)
    trained = _trained(file, config, tensors)
    act = str(config.get("act_fn", "relu")).lower()
    found = Found(
        format="llamascopium",
        path=file,
        trained=trained,
        architecture=ARCHITECTURES[act],
        transcoder=_is_transcoder(config),
        hook_out=config.get("hook_point_out"),
        base_model=_base_model(probe),
        k=config.get("top_k") if act in ("topk", "batchtopk") else None,
        hook=config.get("hook_point_in"),
        layer=probe.name.layer,
    )
    _scale(found, config, norms, choices)
    if act == "jumprelu":
        found.threshold = _threshold(file, config, log_threshold, found, first_release)
    if config.get("sparsity_include_decoder_norm", True) and not first_release:
        if act in ("topk", "batchtopk"):
            found.trained = fold_decoder_norms(found.trained)
        elif found.threshold is not None:
            # comparing pre * norm with t is comparing pre with t / norm, which keeps the latents' own units
            found.threshold = (found.threshold.double() / found.trained.W_dec.double().norm(dim=1)).float()
    return assemble(found, choices)


def _supported(file: Path, config: dict[str, Any]) -> None:
    if config.get("sae_type", "sae") not in ("sae", "transcoder"):
        raise FormatError(
            file,
            "sae_type 'sae' or 'transcoder'",
            repr(config["sae_type"]),
            hint="crosscoders, clt, lorsa and molt have no canonical form; load them with Llamascopium",
        )
    if _is_transcoder(config) and config.get("norm_activation", "dataset-wise") not in ("dataset-wise", "inference"):
        raise FormatError(file, "a transcoder normalised by the data set", repr(config["norm_activation"]))
    if config.get("use_glu_encoder"):
        raise FormatError(file, "a linear encoder", "use_glu_encoder")
    act = str(config.get("act_fn", "relu")).lower()
    if act not in ARCHITECTURES:
        raise FormatError(file, f"act_fn among {', '.join(ARCHITECTURES)}", repr(act))


def _is_transcoder(config: dict[str, Any]) -> bool:
    return config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in")


def _pickled(file: Path) -> dict[str, Tensor]:
    value = io.read_pickle(file)
    state = value.get("sae") if isinstance(value, dict) else None
    if not isinstance(state, dict):
        raise FormatError(file, "a state dict under 'sae'", type(state).__name__)
    return state


def _trained(file: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> TrainedTensors:
    bias = config.get("use_decoder_bias", True)
    if "W_E" in tensors:
        expect_keys(file, tensors, ("W_E", "b_E", "W_D", *(("b_D",) if bias else ())))
        W_enc, W_dec, b_enc, b_dec = tensors["W_E"], tensors["W_D"], tensors["b_E"], tensors.get("b_D")
    else:
        expect_keys(
            file, tensors, ("encoder.weight", "encoder.bias", "decoder.weight", *(("decoder.bias",) if bias else ()))
        )
        d_in = tensors["encoder.weight"].shape[-1]
        W_enc, W_dec = linear_pair(file, tensors["encoder.weight"], tensors["decoder.weight"], d_in)
        b_enc, b_dec = tensors["encoder.bias"], tensors.get("decoder.bias")
    if W_enc.shape[0] != config["d_model"]:
        raise FormatError(file, f"d_model {config['d_model']} as the config says", str(W_enc.shape[0]))
    if b_dec is None:
        b_dec = torch.zeros(W_dec.shape[1])
    pre = b_dec if config.get("apply_decoder_bias_to_pre_encoder") and not _is_transcoder(config) else None
    return TrainedTensors(W_enc, W_dec, b_dec, pre, {"b_enc": b_enc})


def _scale(found: Found, config: dict[str, Any], norms: dict[str, float], choices: Overrides) -> None:
    """Input scaling to norm sqrt(d_in): of the data set it folds, of each token it stays, of a batch it cannot be."""
    kind = config.get("norm_activation", "dataset-wise")
    d_in = int(config["d_model"])
    if kind == "inference" or choices.input_scale is not None:
        return
    if kind == "token-wise":
        found.token_norm = "constant_norm"
        return
    if kind != "dataset-wise":
        raise FormatError(found.path, "a norm that does not depend on the batch", f"norm_activation {kind!r}")
    found.mean = torch.zeros(d_in, dtype=torch.float64)
    found.std = torch.full((d_in,), _average(found.path, config, norms, "in") / math.sqrt(d_in), dtype=torch.float64)
    found.keep_normalizer = True
    if found.transcoder:
        d_out = found.trained.W_dec.shape[1]
        out = _average(found.path, config, norms, "out") / math.sqrt(d_out)
        zero = torch.zeros(d_out, dtype=torch.float64)
        found.output = (zero, zero + out)


def _average(path: Path, config: dict[str, Any], norms: dict[str, float], side: str) -> float:
    """The average norm of the activations at one side over the data set."""
    stored, hook = config.get("dataset_average_activation_norm"), str(config.get(f"hook_point_{side}"))
    average = norms.get(hook)
    if average is None and isinstance(stored, dict):
        average = stored.get(side, stored.get(hook))
    if not isinstance(average, (int, float)) or not math.isfinite(average) or average <= 0:
        raise FormatError(
            path,
            "the average activation norm of the data set",
            repr(average) if average is not None else "none in the weights or the config",
            hint="give input_scale=sqrt(d_in)/average_norm, or input_scale=1 if it was folded into the weights",
        )
    return float(average)


def _base_model(probe: Probe) -> str | None:
    """Llama Scope says its language model in a file of its own."""
    config = probe.json("lm_config.json")
    named = [config.get(key) for key in ("model_from_pretrained_path", "model_name")]
    return next((name for name in named if isinstance(name, str) and name and not name.startswith("/")), None)


def _threshold(
    file: Path, config: dict[str, Any], log_threshold: Tensor | None, found: Found, first_release: bool
) -> Tensor:
    d_sae = found.trained.W_enc.shape[1]
    if log_threshold is not None:
        return log_threshold.double().exp().float()
    if not first_release or "jump_relu_threshold" not in config:
        raise FormatError(file, "log_jumprelu_threshold", "no threshold")
    # Llama Scope's first releases give one threshold for latents of unscaled inputs; ours are of scaled ones
    scale = 1.0 if found.std is None else 1 / float(found.std[0])
    return torch.full((d_sae,), float(config["jump_relu_threshold"]) * scale)


FORMAT = Format(
    name="llamascopium",
    title="Llamascopium / Language-Model-SAEs / Llama Scope",
    detect=detect,
    read=_read,
    files=(
        *(Files(("config.json", name)) for name in WEIGHT_FILES),
        *(Files(("hyperparams.json", name), ("lm_config.json",)) for name in WEIGHT_FILES),
    ),
    layout="`config.json` with `sae_type` (or `hyperparams.json`), `sae_weights.safetensors` or `checkpoints/`",
)
