"""SAELens folders (6.x and older) and live SAELens objects, read and written without importing SAELens.

    cfg.json, sae_weights.safetensors, optional sparsity.safetensors

What SAELens cannot express, it gets as the nearest thing it can, and `fidelity` says what that changes.
"""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError, FormatError, HookError
from hubsae.core.extras import require
from hubsae.core.files import write_json_atomic
from hubsae.core.fold import TrainedTensors, fold_decoder_norms
from hubsae.core.hooks import HookPoint
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

# hook names of TransformerLens under which SAELens flattens the heads itself
HEADS = ".hook_z"
UNIT_NORM = 1e-6  # rows this near to norm one are of norm one

ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
TOOLS = {
    "temporal": "attends over tokens",
    "matching_pursuit": "encodes by a loop over its decoder",
    "abstopk": "keeps the largest magnitudes, negative ones too",
}
"""Architectures of SAELens that have no canonical form, and what they do that has none."""
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
    loads: bool = True
    """Whether SAELens loads it at all."""


def fidelity(config: SAEConfig) -> Fidelity:
    """What stock SAELens will compute from a folder written for this config.

    >>> fidelity(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2)).exact
    True
    >>> fidelity(SAEConfig(architecture="batch_topk", d_in=4, d_sae=8, k=2)).exact
    False
    """
    if config.is_transcoder and _architecture(config) not in ARCHITECTURES:
        return Fidelity(False, f"SAELens has no transcoder with {config.selection} and refuses to load it", False)
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


def _architecture(config: SAEConfig) -> str:
    """Its name in SAELens; one that SAELens does not have where it has no such transcoder."""
    stored = config.architecture == "batch_topk" and config.threshold is not None
    name = "jumprelu" if stored else {"relu": "standard", "batch_topk": "topk"}.get(
        config.architecture, config.architecture
    )  # fmt: skip
    if not config.is_transcoder:
        return name
    return f"{'' if name == 'standard' else name + '_'}{'skip_' if config.skip else ''}transcoder"


def cfg_of(sae: SAE, metadata: Metadata | None = None) -> dict[str, Any]:
    """The content of cfg.json: what the record says, and what a SAELens config said beyond it."""
    config, metadata = sae.config, metadata or sae.metadata
    kept = metadata.saelens or {}
    architecture = _architecture(config)
    extra: dict[str, Any] = dict(kept.get("metadata") or {})
    if config.architecture == "batch_topk" and config.threshold is not None:
        details = extra.get("training_architecture_details") or {}
        extra |= {"training_architecture_details": {**details, "k": config.k}}
        extra.setdefault("training_architecture", "batchtopk")
    known = fidelity(config)
    if not known.exact:
        extra["hubsae_fidelity"] = known.note
    assumed = {k: v for k, v in ASSUMED.items() if getattr(metadata.hook, k) is None}
    if assumed:
        extra["hubsae_assumed"] = sorted(assumed)
    hook, out = metadata.hook, metadata.hook_out
    hook_name = hook.transformer_lens or hook.module_path
    named: dict[str, Any] = {"model_name": metadata.base_model.id, "hf_hook_name": hook.module_path}
    if out is not None:
        extra["hook_name_out"] = out.transformer_lens or out.module_path
        named["hf_hook_name_out"] = out.module_path
    for key, now in named.items():
        # the spelling of the source, where it means the same
        before = extra.get(key)
        same = isinstance(before, str) and now in (hub_id(before), before.removesuffix(".output"))
        extra[key] = before if same else now
    norm = {"layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}.get(config.token_norm, "none")
    heads = "hook_z" if (hook_name or "").endswith(HEADS) else "none"
    cfg: dict[str, Any] = {
        **(kept.get("cfg") or {}),
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": config.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": norm,
        "reshape_activations": (kept.get("cfg") or {}).get("reshape_activations") or heads,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "hook_head_index": None,
            "model_class_name": "HookedTransformer",
            "model_from_pretrained_kwargs": {},
            **extra,
            "hook_name": hook_name,
            "prepend_bos": hook.prepend_bos if hook.prepend_bos is not None else ASSUMED["prepend_bos"],
            "context_size": hook.context_size or ASSUMED["context_size"],
            "dataset_path": metadata.activations.text_dataset,
        },
        "architecture": architecture,
    }
    if config.d_out is not None:
        cfg["d_out"] = config.d_out
    if architecture == "topk":
        # with rows of norm one the rule changes nothing, and SAEDashboard and Neuronpedia's runner ask for it
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": has_unit_rows(sae)}
    return cfg


def has_unit_rows(sae: SAE) -> bool:
    """Whether every decoder row has norm one, so that SAELens' scaling by decoder norms changes nothing."""
    return bool(((sae.W_dec.detach().float().norm(dim=1) - 1).abs() <= UNIT_NORM).all())


# TransformerLens' short names of models, and where on the Hub they are.
_ALIASES = {
    r"gpt2-small": "openai-community/gpt2",
    r"(gemma-.+)": "google/{}",
    r"(pythia-.+)": "EleutherAI/{}",
    r"(Qwen\d.*)": "Qwen/{}",
    r"qwen3-([\d.]+)b": "Qwen/Qwen3-{}B",
    r"(Llama-3.+|Llama-2.+)": "meta-llama/{}",
    r"(OLMo-.+)": "allenai/{}",
    r"mistral-7b": "mistralai/Mistral-7B-v0.1",
}


def hub_id(name: str | None) -> str | None:
    """The Hub id of a model that SAELens calls by TransformerLens' short name; other names as they are.

    >>> hub_id("gpt2-small"), hub_id("gemma-2-2b"), hub_id("Qwen/Qwen3-8B"), hub_id("my-model")
    ('openai-community/gpt2', 'google/gemma-2-2b', 'Qwen/Qwen3-8B', 'my-model')
    """
    if not isinstance(name, str) or "/" in name:
        return name
    found = ((to, re.fullmatch(short, name)) for short, to in _ALIASES.items())
    return next((to.format(*match.groups()) for to, match in found if match), name)


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


def _is_modern(cfg: dict[str, Any]) -> bool:
    nested = cfg.get("metadata")
    version = cfg.get("sae_lens_version") or (nested.get("sae_lens_version") if isinstance(nested, dict) else None)
    major = str(version or "0").partition(".")[0]
    return major.isascii() and major.isdigit() and int(major[:9]) >= 6


def modern_cfg(cfg: dict[str, Any]) -> dict[str, Any]:
    """A cfg.json of any SAELens version in the shape of 6.x: what describes the SAE on top, the rest nested."""
    nested = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else {}
    if _is_modern(cfg):
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
            hook=_readable_hook(meta, ""),
            hook_out=_readable_hook(meta, "_out") if transcoder else None,
            base_model=hub_id(meta.get("model_name")),
            record=_record(cfg, meta),
        ),
        choices,
    )


def _readable_hook(meta: dict[str, Any], suffix: str) -> str | None:
    """The TransformerLens name, or the module path where only that says which place is meant."""
    names = [meta.get(f"hook_name{suffix}"), meta.get(f"hf_hook_name{suffix}")]
    given = [name for name in names if isinstance(name, str)]
    for name in given:
        with suppress(HookError):
            HookPoint.parse(name)
            return name
    return given[0] if given else None


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


# Keys of cfg.json that a record has a field for, or that follow from the tensors; all others are kept as they are.
_OWN_CFG = {
    "architecture", "d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "metadata", "k", "rescale_acts_by_decoder_norm",
}  # fmt: skip
_OWN_META = {
    "hook_name", "hook_name_out", "context_size", "prepend_bos", "dataset_path", "hubsae_assumed", "hubsae_fidelity",
}  # fmt: skip


def _record(cfg: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    assumed = meta.get("hubsae_assumed") or []
    hook = {k: meta.get(k) for k in ("context_size", "prepend_bos") if meta.get(k) is not None and k not in assumed}
    for section, suffix, known in (("hook", "", hook), ("hook_out", "_out", {})):
        module, lens = meta.get(f"hf_hook_name{suffix}"), meta.get(f"hook_name{suffix}")
        if isinstance(module, str):
            known["module_path"] = module.removesuffix(".output")
        if isinstance(lens, str) and lens.startswith(("blocks.", "hook_")):
            known["transformer_lens"] = lens
        if known and (section == "hook" or cfg.get("d_out") is not None):
            record[section] = known
    if isinstance(meta.get("dataset_path"), str):
        record["activations"] = {"text_dataset": meta["dataset_path"]}
    # before 6.0 all keys are on one level, and the version of then would make SAELens drop what is nested
    modern = _is_modern(cfg)
    own = _OWN_META if modern else _OWN_META | _OWN_CFG | {"sae_lens_version", "reshape_activations"}
    beyond = {k: v for k, v in cfg.items() if k not in _OWN_CFG} if modern else {}
    about = {k: v for k, v in meta.items() if k not in own}
    record["saelens"] = {k: v for k, v in (("cfg", beyond), ("metadata", about)) if v}
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
