"""What a SAELens config says and how a record is said in one, key by key, without importing SAELens.

What SAELens cannot express, it gets as the nearest thing it can, and `fidelity` says what that changes. Keys that no
field of the record stands for are kept there under `saelens` and written back as they were.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, NamedTuple

from hubsae.core.config import SAEConfig
from hubsae.core.errors import HookError
from hubsae.core.hooks import HookPoint
from hubsae.core.metadata import Metadata
from hubsae.core.sae import SAE

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
    if config.is_transcoder and architecture_in(config) not in ARCHITECTURES:
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


def architecture_in(config: SAEConfig) -> str:
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
    architecture = architecture_in(config)
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


# ---- reading ----------------------------------------------------------------------------------------------


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


def readable_hook(meta: dict[str, Any], suffix: str) -> str | None:
    """The TransformerLens name, or the module path where only that says which place is meant."""
    names = [meta.get(f"hook_name{suffix}"), meta.get(f"hf_hook_name{suffix}")]
    given = [name for name in names if isinstance(name, str)]
    for name in given:
        with suppress(HookError):
            HookPoint.parse(name)
            return name
    return given[0] if given else None


# Keys of cfg.json that a record has a field for, or that follow from the tensors; all others are kept as they are.
_OWN_CFG = {
    "architecture", "d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "metadata", "k", "rescale_acts_by_decoder_norm",
}  # fmt: skip
_OWN_META = {
    "hook_name", "hook_name_out", "context_size", "prepend_bos", "dataset_path", "hubsae_assumed", "hubsae_fidelity",
}  # fmt: skip


def record_of(cfg: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """The sections of a record that a config (in the shape of 6.x) and its metadata say."""
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
