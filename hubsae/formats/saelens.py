"""SAELens folders (6.x and older) and live SAELens objects, read and written without importing SAELens.

cfg.json, sae_weights.safetensors, optional sparsity.safetensors
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.extras import require
from hubsae.core.files import write_json_atomic
from hubsae.core.fold import TrainedTensors, fold_decoder_norms
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import Found, assemble, expect_keys
from hubsae.formats.base import Files, Format, Overrides, Probe, ReadWarning
from hubsae.formats.saelens_config import (
    ARCHITECTURES,
    SAELENS_VERSION,
    TOOLS,
    cfg_of,
    fidelity,
    hub_id,
    modern_cfg,
    readable_hook,
    record_of,
)

CFG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
SPARSITY_NAME = "sparsity.safetensors"

TENSORS = {
    "relu": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "batch_topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
}
TOKEN_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
# SAELens expects these folded into the weights and does nothing at inference.
EXPECT_FOLDED = ("expected_average_only_in", "covariance_whitening")


def stored_tensors(sae: SAE) -> dict[str, Tensor]:
    """The tensors SAELens expects, and nothing more (it refuses any other)."""
    tensors = sae.tensors()
    if sae.config.architecture == "batch_topk" and sae.config.threshold is not None:
        tensors["threshold"] = torch.full((sae.config.d_sae,), sae.config.threshold, dtype=sae.dtype)
    return tensors


def with_constant_norm(sae: SAE) -> SAE:
    """An SAE on unit-norm tokens as the same SAE on tokens of norm sqrt(d_in), which SAELens has."""
    if sae.config.token_norm != "unit_norm":
        return sae
    root = sae.config.d_in**0.5
    tensors = sae.tensors()
    tensors |= {"W_enc": tensors["W_enc"] / root, "W_dec": tensors["W_dec"] * root, "b_dec": tensors["b_dec"] * root}
    config = sae.config.model_copy(update={"token_norm": "constant_norm"})
    metadata = sae.metadata.model_copy(update={"config": config})
    scaled = SAE.build(config, tensors, metadata=metadata, sparsity=sae.sparsity)
    scaled.fingerprint = sae.fingerprint
    return scaled


def write(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write a plain SAELens folder (the native format writes the same and the full record besides)."""
    sae = with_constant_norm(sae)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    io.write_safetensors(folder / WEIGHTS_NAME, stored_tensors(sae))
    if sae.sparsity is not None:
        io.write_safetensors(folder / SPARSITY_NAME, {"sparsity": sae.sparsity.float()})
    write_json_atomic(folder / CFG_NAME, cfg_of(sae))
    return folder


# ---- reading ----------------------------------------------------------------------------------------------


def detect(probe: Probe) -> str | None:
    """cfg.json beside sae_weights.safetensors."""
    if not probe.is_dir or not {CFG_NAME, WEIGHTS_NAME} <= probe.names:
        return None
    cfg = probe.json(CFG_NAME)
    return "cfg.json with d_in and d_sae beside sae_weights.safetensors" if {"d_in", "d_sae"} <= set(cfg) else None


def _read(probe: Probe, choices: Overrides) -> SAE:
    file = probe.path / WEIGHTS_NAME
    sparsity = None
    if SPARSITY_NAME in probe.names:
        sparsity = io.read_safetensors(probe.path / SPARSITY_NAME).get("sparsity")
    return from_parts(probe.json(CFG_NAME), io.read_safetensors(file), file, choices=choices, sparsity=sparsity)


def from_parts(
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str | os.PathLike[str],
    *,
    choices: Overrides | None = None,
    sparsity: Tensor | None = None,
    source: str = "saelens",
) -> SAE:
    """An SAE from a SAELens config and its tensors; `path` is named in errors."""
    path, choices = Path(path), choices or Overrides()
    cfg = modern_cfg(cfg)
    meta = cfg.get("metadata") or {}
    name = cfg.get("architecture")
    if name not in ARCHITECTURES:
        what = TOOLS.get(str(name))
        raise FormatError(
            path,
            f"an architecture among {', '.join(ARCHITECTURES)}",
            (repr(name) + (f", which {what}" if what else "")) if name else "a config without one",
            hint="it has no canonical form here; load it with SAELens",
        )
    architecture, transcoder = ARCHITECTURES[name], name.endswith("transcoder")
    tensors = dict(tensors)
    scaling = tensors.pop("scaling_factor", tensors.pop("finetuning_scaling_factor", None))
    if scaling is not None and not bool((scaling == 1).all()):
        raise FormatError(path, "latents without a fine-tuned scaling factor", "scaling_factor other than 1")
    batch_threshold = None
    if architecture == "batch_topk" and "topk_threshold" in tensors:
        batch_threshold = float(tensors.pop("topk_threshold"))
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if architecture == "jumprelu" and _was_batch_topk(meta, tensors):
        architecture, batch_threshold = "batch_topk", float(tensors.pop("threshold")[0])
    skip = ("W_skip",) if name.endswith("skip_transcoder") else ()
    expect_keys(path, tensors, (*TENSORS[architecture], *skip))
    _check_declared(path, cfg, tensors, transcoder)

    subtract = bool(cfg.get("apply_b_dec_to_input", True)) and not transcoder
    biases = {key: tensors[key] for key in ("b_enc", "b_gate", "b_mag") if key in tensors}
    trained = TrainedTensors(
        tensors["W_enc"], tensors["W_dec"], tensors["b_dec"], tensors["b_dec"] if subtract else None, biases,
        tensors.get("r_mag"), tensors.get("W_skip"),
    )  # fmt: skip
    if cfg.get("rescale_acts_by_decoder_norm"):
        trained = fold_decoder_norms(trained)
    details = meta.get("training_architecture_details") or {}
    k = cfg.get("k", details.get("k") if architecture == "batch_topk" else None)
    return assemble(
        Found(
            format=source,
            path=path,
            trained=trained,
            architecture=architecture,
            k=None if k is None else int(k),
            batch_threshold=batch_threshold,
            threshold=tensors.get("threshold") if architecture == "jumprelu" else None,
            token_norm=TOKEN_NORMS.get(cfg.get("normalize_activations", "none"), "none"),
            normalizer_note=_norm_note(path, cfg, choices),
            sparsity=sparsity,
            transcoder=transcoder,
            hook=readable_hook(meta, ""),
            hook_out=readable_hook(meta, "_out") if transcoder else None,
            base_model=hub_id(meta.get("model_name")),
            record=record_of(cfg, meta),
        ),
        choices,
    )


def _was_batch_topk(meta: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    trained = meta.get("training_architecture")
    threshold = tensors.get("threshold")
    k = (meta.get("training_architecture_details") or {}).get("k")
    # a fractional k is a mean over tokens and has no place in k; such an SAE is a plain jumprelu
    whole = isinstance(k, (int, float)) and float(k).is_integer()
    return trained == "batchtopk" and whole and threshold is not None and bool((threshold == threshold[0]).all())


def _check_declared(path: Path, cfg: dict[str, Any], tensors: dict[str, Tensor], transcoder: bool) -> None:
    declared, found = (cfg.get("d_in"), cfg.get("d_sae")), tuple(tensors["W_enc"].shape)
    if declared != found:
        raise FormatError(
            path,
            f"W_enc [d_in, d_sae] = {declared} as cfg.json says",
            f"{found}" + (", which is transposed" if found == declared[::-1] else ""),
        )
    if transcoder and cfg.get("d_out") != tensors["W_dec"].shape[-1]:
        raise FormatError(
            path, f"a transcoder with d_out {cfg.get('d_out')} as cfg.json says", str(tensors["W_dec"].shape[-1])
        )


def _norm_note(path: Path, cfg: dict[str, Any], choices: Overrides) -> str | None:
    norm = cfg.get("normalize_activations", "none")
    if norm in ("none", *TOKEN_NORMS):
        return None
    if norm not in EXPECT_FOLDED:
        raise FormatError(path, "a known normalize_activations", repr(norm))
    if choices.input_scale is not None or choices.token_norm is not None:
        return None
    note = (
        f"cfg.json says {norm}, whose statistics are not in the file; read as SAELens does, which is right only if "
        "they were folded into the weights"
    )
    warnings.warn(f"{path}: {note} (give input_scale=... to fold a scalar)", ReadWarning, stacklevel=5)
    return note


# ---- live objects -----------------------------------------------------------------------------------------


def from_saelens(sae: Any) -> SAE:
    """A SAELens SAE (inference or training class) as a HubSAE."""
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving(state)
    cfg = sae.cfg.to_dict()
    cfg["metadata"] = {"sae_lens_version": SAELENS_VERSION} | _plain(cfg.get("metadata") or {})
    return from_parts(cfg, state, f"SAELens {type(sae).__name__}", source="saelens object")


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if v is not None}


def to_saelens(sae: SAE) -> Any:
    """The same SAE as a SAELens object; a warning says where SAELens cannot express it.

    The object holds copies, so changing one does not change the other.
    """
    module = require("sae_lens", extra="saelens")
    known = fidelity(sae.config)
    if not known.loads:
        raise ConfigError(known.note, hint="call it as it is, or save it: hubsae reads its own folders everywhere")
    if not known.exact:
        warnings.warn(known.note, ReadWarning, stacklevel=2)
    sae = with_constant_norm(sae)
    cfg = cfg_of(sae)
    config_class = module.SAE.get_sae_config_class_for_architecture(cfg["architecture"])
    lens_cfg = config_class.from_dict(cfg | {"device": str(sae.device)})
    lens = module.SAE.get_sae_class_for_architecture(lens_cfg.architecture())(lens_cfg)
    lens.load_state_dict({name: tensor.clone() for name, tensor in stored_tensors(sae).items()}, assign=True)
    return lens


FORMAT = Format(
    name="saelens",
    title="SAELens folder (6.x and older)",
    detect=detect,
    read=_read,
    write=write,
    files=(Files((CFG_NAME, WEIGHTS_NAME), (SPARSITY_NAME,)),),
    layout="`cfg.json`, `sae_weights.safetensors` (+ `sparsity.safetensors`)",
)
