"""SAELens folders (6.x and older) and live SAELens objects, read and written without importing SAELens.

    cfg.json, sae_weights.safetensors, optional sparsity.safetensors

What SAELens cannot express, it gets as the nearest thing it can, and `fidelity` says what that changes.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubsae.core.config import SAEConfig
from hubsae.core.errors import FormatError
from hubsae.core.extras import require
from hubsae.core.files import write_json_atomic
from hubsae.core.fold import TrainedTensors, fold_decoder_norms
from hubsae.core.metadata import Metadata
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import Found, assemble, expect_keys
from hubsae.formats.base import Files, Format, Overrides, Probe, ReadWarning

CFG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
SPARSITY_NAME = "sparsity.safetensors"

# From this version on SAELens reads the nested metadata of a config; older ones lose it.
SAELENS_VERSION = "6.0.0"
# SAELens' activation store and evals stop without these; used where the record does not say.
ASSUMED = {"context_size": 1024, "prepend_bos": False}

ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
}
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


class Fidelity(NamedTuple):
    """Whether SAELens computes what hubsae does, and if not, what it gets instead."""

    exact: bool
    note: str


def fidelity(config: SAEConfig) -> Fidelity:
    """What stock SAELens will compute from a folder written for this config.

    >>> fidelity(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2)).exact
    True
    >>> fidelity(SAEConfig(architecture="batch_topk", d_in=4, d_sae=8, k=2)).exact
    False
    """
    if config.architecture == "topk" and not config.topk_relu:
        return Fidelity(
            False,
            "SAELens applies a ReLU after top-k: latents are the same on every token with at least "
            f"k={config.k} positive pre-activations, and negative ones are lost elsewhere",
        )
    if config.architecture == "batch_topk" and config.threshold is None:
        return Fidelity(
            False,
            f"SAELens has no batch rule at inference: it selects k={config.k} latents per token instead of "
            f"k·tokens over the batch (store a threshold to be exact)",
        )
    return Fidelity(True, "same latents and reconstruction")


# ---- writing ----------------------------------------------------------------------------------------------


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
    return SAE.build(config, tensors, metadata=metadata, sparsity=sae.sparsity)


def cfg_of(config: SAEConfig, metadata: Metadata) -> dict[str, Any]:
    """The content of cfg.json."""
    architecture = {"relu": "standard", "batch_topk": "topk"}.get(config.architecture, config.architecture)
    extra: dict[str, Any] = {}
    if config.architecture == "batch_topk" and config.threshold is not None:
        architecture = "jumprelu"
        extra = {"training_architecture": "batchtopk", "training_architecture_details": {"k": config.k}}
    known = fidelity(config)
    if not known.exact:
        extra["hubsae_fidelity"] = known.note
    assumed = {k: v for k, v in ASSUMED.items() if getattr(metadata.hook, k) is None}
    if assumed:
        extra["hubsae_assumed"] = sorted(assumed)
    hook = metadata.hook
    norm = {"layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}.get(config.token_norm, "none")
    cfg: dict[str, Any] = {
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": config.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": norm,
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": metadata.base_model.id,
            "hook_name": hook.transformer_lens or hook.module_path,
            "hf_hook_name": hook.module_path,
            "hook_head_index": None,
            "model_class_name": "HookedTransformer",
            "model_from_pretrained_kwargs": {},
            "prepend_bos": hook.prepend_bos if hook.prepend_bos is not None else ASSUMED["prepend_bos"],
            "context_size": hook.context_size or ASSUMED["context_size"],
            "dataset_path": metadata.activations.text_dataset,
            **extra,
        },
        "architecture": architecture,
    }
    if architecture == "topk":
        # the training default of SAELens is true, so absence would be ambiguous
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def write(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write a plain SAELens folder (the native format writes the same and the full record besides)."""
    sae = with_constant_norm(sae)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    io.write_safetensors(folder / WEIGHTS_NAME, stored_tensors(sae))
    if sae.sparsity is not None:
        io.write_safetensors(folder / SPARSITY_NAME, {"sparsity": sae.sparsity.float()})
    write_json_atomic(folder / CFG_NAME, cfg_of(sae.config, sae.metadata))
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


def modern_cfg(cfg: dict[str, Any]) -> dict[str, Any]:
    """A cfg.json of any SAELens version in the shape of 6.x: what describes the SAE on top, the rest nested."""
    nested = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else {}
    version = str(cfg.get("sae_lens_version") or nested.get("sae_lens_version") or "0")  # pyright: ignore[reportOptionalMemberAccess]
    if int(version.partition(".")[0] or 0) >= 6:
        return cfg
    rename = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    flat = {rename.get(key, key): value for key, value in cfg.items()}
    if flat.get("activation_fn") == "topk" and (flat.get("activation_fn_kwargs") or {}).get("k") is not None:
        flat |= {"architecture": "topk", "k": flat["activation_fn_kwargs"]["k"]}
    norm = flat.get("normalize_activations")
    flat["normalize_activations"] = {None: "none", False: "none", True: "expected_average_only_in"}.get(norm, norm)  # pyright: ignore[reportArgumentType]
    flat.setdefault("architecture", "standard")
    flat["metadata"] = {k: v for k, v in flat.items() if k not in ("architecture", "k", "metadata")} | dict(
        nested or {}
    )
    return flat


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
        raise FormatError(
            path,
            f"an architecture among {', '.join(ARCHITECTURES)}",
            repr(name) if name else "a config without one",
            hint="transcoders, cross-coders and matching pursuit have no canonical form here; load them with SAELens",
        )
    architecture = ARCHITECTURES[name]
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
    expect_keys(path, tensors, TENSORS[architecture])
    _check_declared(path, cfg, tensors)

    subtract = bool(cfg.get("apply_b_dec_to_input", True))
    biases = {key: tensors[key] for key in ("b_enc", "b_gate", "b_mag") if key in tensors}
    trained = TrainedTensors(
        tensors["W_enc"], tensors["W_dec"], tensors["b_dec"], tensors["b_dec"] if subtract else None, biases,
        tensors.get("r_mag"),
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
            hook=meta.get("hook_name"),
            base_model=meta.get("model_name"),
            record=_record(meta),
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


def _check_declared(path: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    declared, found = (cfg.get("d_in"), cfg.get("d_sae")), tuple(tensors["W_enc"].shape)
    if declared != found:
        raise FormatError(
            path,
            f"W_enc [d_in, d_sae] = {declared} as cfg.json says",
            f"{found}" + (", which is transposed" if found == declared[::-1] else ""),
        )


def _norm_note(path: Path, cfg: dict[str, Any], choices: Overrides) -> str | None:
    norm = cfg.get("normalize_activations", "none")
    if norm in ("none", *TOKEN_NORMS):
        return None
    if norm not in EXPECT_FOLDED:
        raise FormatError(path, "a known normalize_activations", repr(norm))
    if choices.input_scale is not None:
        return None
    note = (
        f"cfg.json says {norm}, whose statistics are not in the file; read as SAELens does, which is right only if "
        "they were folded into the weights"
    )
    warnings.warn(f"{path}: {note} (give input_scale=... to fold a scalar)", ReadWarning, stacklevel=5)
    return note


def _record(meta: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    assumed = meta.get("hubsae_assumed") or []
    hook = {k: meta.get(k) for k in ("context_size", "prepend_bos") if meta.get(k) is not None and k not in assumed}
    if isinstance(meta.get("hf_hook_name"), str):
        hook["module_path"] = meta["hf_hook_name"].removesuffix(".output")
    if hook:
        record["hook"] = hook
    if isinstance(meta.get("dataset_path"), str):
        record["activations"] = {"text_dataset": meta["dataset_path"]}
    return record


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
    if not known.exact:
        warnings.warn(known.note, ReadWarning, stacklevel=2)
    sae = with_constant_norm(sae)
    cfg = cfg_of(sae.config, sae.metadata)
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
