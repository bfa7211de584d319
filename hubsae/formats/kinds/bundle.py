"""A bundle: `model.safetensors` with `model.metadata.json`, which holds per-dimension input_mean and input_std.

Which keys and which orientation such files use is not written down anywhere, so both are taken from what is
there: several spellings are known, matrices are turned by their shape, and square ones are refused. Written ones say
all of it: the weights are those of the training space, unfolded from the statistics that stand beside them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import write_json_atomic
from hubsae.core.fold import TrainedTensors, unfold
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import Found, assemble, orient, statistic
from hubsae.formats.base import Files, Format, Overrides, Probe, ReadWarning

WEIGHTS_NAME = "model.safetensors"
METADATA_NAME = "model.metadata.json"

SPELLINGS = {
    "W_enc": ("W_enc", "w_enc", "encoder.weight", "encoder"),
    "W_dec": ("W_dec", "w_dec", "decoder.weight", "decoder"),
    "b_enc": ("b_enc", "encoder.bias", "latent_bias"),
    "b_dec": ("b_dec", "decoder.bias", "pre_bias"),
}
MEAN = ("input_mean", "normalizer.mean", "normalization.mean")
STD = ("input_std", "normalizer.std", "normalization.std")
ARCHITECTURES = {"batchtopk": "batch_topk", "topk": "topk", "relu": "relu", "standard": "relu"}


def detect(probe: Probe) -> str | None:
    """model.safetensors beside model.metadata.json."""
    fits = probe.is_dir and {WEIGHTS_NAME, METADATA_NAME} <= probe.names
    return "model.safetensors beside model.metadata.json" if fits else None


def _read(probe: Probe, choices: Overrides) -> SAE:
    file, meta = probe.path / WEIGHTS_NAME, probe.json(METADATA_NAME)
    tensors = _named(file, io.read_safetensors(file))
    d_in, d_sae = tensors["b_dec"].shape[0], tensors["b_enc"].shape[0]
    W_enc, W_dec, flags = orient(file, tensors["W_enc"], tensors["W_dec"], d_in, d_sae, choices.transposed)
    _check_declared(file, meta, d_in, d_sae)
    kind = str(_find(meta, ("sae_type", "architecture", "activation", "type")) or "topk").lower()
    kind = kind.replace("_", "").replace("-", "")
    architecture = next((ours for theirs, ours in ARCHITECTURES.items() if theirs in kind), "topk")
    k = _find(meta, ("k", "topk", "top_k"))
    hook = _find(meta, ("hookpoint", "hook_point", "hook_name", "hook"))
    b_dec = tensors["b_dec"]
    return assemble(
        Found(
            format="bundle",
            path=file,
            trained=TrainedTensors(
                W_enc, W_dec, b_dec, b_dec if _subtracts(file, meta, choices) else None, {"b_enc": tensors["b_enc"]}
            ),
            architecture=architecture,
            k=int(k) if isinstance(k, (int, float)) else None,
            topk_relu=meta.get("topk_relu") is not False,
            batch_threshold=_find(meta, ("threshold",)) if architecture == "batch_topk" else None,
            mean=_statistic(file, meta, tensors, "mean", MEAN, d_in),
            std=_statistic(file, meta, tensors, "std", STD, d_in),
            keep_normalizer=True,
            hook=hook if isinstance(hook, str) else None,
            layer=None if isinstance(hook, str) else probe.name.layer,
            base_model=_text(meta, ("base_model", "model_id", "model_name", "base_model_id")),
            base_model_revision=_text(meta, ("base_model_revision", "model_revision", "revision")),
            flags=flags,
            record={"training": _training(meta)},
        ),
        choices,
    )


def _named(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for ours, spellings in SPELLINGS.items():
        # nested modules put a prefix in front: sae.W_enc, model.encoder.weight
        hits = [t for name, t in tensors.items() if any(name == s or name.endswith(f".{s}") for s in spellings)]
        if len(hits) != 1:
            raise FormatError(
                file,
                f"one tensor for {ours} (any of {', '.join(spellings)})",
                f"{len(hits)} among {', '.join(sorted(tensors))}",
            )
        out[ours] = hits[0]
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] in ("input_mean", "input_std"):
            out[name.rpartition(".")[2]] = tensor
    for name in ("b_enc", "b_dec"):
        if out[name].ndim != 1:
            raise FormatError(file, f"{name} with one dimension", str(tuple(out[name].shape)))
    return out


def _walk(meta: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if isinstance(meta, dict) and depth < 6:
        for key, value in meta.items():
            yield f"{prefix}.{key}", value
            yield from _walk(value, f"{prefix}.{key}", depth + 1)


def _find(meta: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of the names found at any depth, shallow ones first."""
    flat = sorted(_walk(meta), key=lambda item: item[0].count("."))
    flat = [(key, value) for key, value in flat if value is not None and not isinstance(value, dict)]
    return next((value for name in names for key, value in flat if key.endswith(f".{name}")), None)


def _text(meta: dict[str, Any], names: tuple[str, ...]) -> str | None:
    value = _find(meta, names)
    return value if isinstance(value, str) else None


def _check_declared(file: Path, meta: dict[str, Any], d_in: int, d_sae: int) -> None:
    for names, found in ((("d_in", "d_model", "input_dim"), d_in), (("d_sae", "num_latents", "dict_size"), d_sae)):
        declared = _find(meta, names)
        if isinstance(declared, int) and declared != found:
            raise FormatError(file, f"{names[0]} {declared} as {METADATA_NAME} says", str(found))


def _subtracts(file: Path, meta: dict[str, Any], choices: Overrides) -> bool:
    if choices.apply_b_dec_to_input is not None:
        return choices.apply_b_dec_to_input
    stated = _find(meta, ("apply_b_dec_to_input", "subtract_b_dec"))
    if isinstance(stated, bool):
        return stated
    warnings.warn(
        f"{file}: {METADATA_NAME} does not say whether b_dec is subtracted before encoding; taken as subtracted "
        "(give apply_b_dec_to_input=False if not, and check by the reconstruction error)",
        ReadWarning,
        stacklevel=4,
    )
    return True


def _statistic(
    file: Path, meta: dict[str, Any], tensors: dict[str, Tensor], name: str, names: tuple[str, ...], d_in: int
) -> Tensor:
    value = tensors.get(f"input_{name}", _find(meta, names))
    if value is None:
        raise FormatError(
            file, f"input_{name} in {METADATA_NAME}", "none", hint="the weights mean nothing without their normaliser"
        )
    return statistic(file, f"input_{name}", value, d_in)


def _training(meta: dict[str, Any]) -> dict[str, Any]:
    wanted = {"lr": ("lr", "learning_rate"), "batch_size": ("batch_size",), "steps": ("step", "steps"),
              "tokens": ("tokens_seen", "tokens"), "seed": ("seed",)}  # fmt: skip
    found = {ours: _find(meta, names) for ours, names in wanted.items()}
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def write(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write the weights in training space, and the normaliser in full beside them."""
    if sae.config.architecture not in ARCHITECTURES.values() or sae.config.is_transcoder:
        raise ConfigError(f"a bundle holds no {sae.config.selection} SAE", hint=f"{', '.join(ARCHITECTURES.values())}")
    folder, config, record, space = Path(folder), sae.config, sae.metadata, sae.normalizer
    mean, std = (torch.zeros(sae.d_in), torch.ones(sae.d_in)) if space is None else (space.mean, space.std)
    t = unfold(sae.tensors(), mean.to(sae.device), std.to(sae.device), apply_b_dec_to_input=config.apply_b_dec_to_input)
    named = {"W_enc": t.W_enc, "W_dec": t.W_dec, "b_enc": t.encoder_biases["b_enc"], "b_dec": t.b_dec}
    folder.mkdir(parents=True, exist_ok=True)
    io.write_safetensors(folder / WEIGHTS_NAME, {name: x.float().contiguous().cpu() for name, x in named.items()})
    about = {
        "format": "hubsae-bundle", "sae_type": config.architecture, "k": config.k, "d_in": sae.d_in, "d_sae": sae.d_sae,
        "topk_relu": config.topk_relu, "threshold": config.threshold,
        "apply_b_dec_to_input": config.apply_b_dec_to_input, "W_enc": "[d_in, d_sae]", "W_dec": "[d_sae, d_in]",
        "hookpoint": record.hook.module_path or record.hook.transformer_lens, "base_model": record.base_model.id,
        "base_model_revision": record.base_model.revision,
        "training": record.training.model_dump(mode="json", exclude_none=True),
        "input_count": 0 if space is None else space.count, "input_mean": mean.tolist(), "input_std": std.tolist(),
    }  # fmt: skip
    write_json_atomic(folder / METADATA_NAME, {name: value for name, value in about.items() if value is not None})
    return folder


FORMAT = Format(
    name="bundle",
    title="safetensors with model.metadata.json",
    detect=detect,
    read=_read,
    write=write,
    write_beside=write,
    files=(Files((WEIGHTS_NAME, METADATA_NAME), ("release_manifest.json",)),),
    covers=frozenset({"raw"}),
    layout="`model.safetensors`, `model.metadata.json` with `input_mean` and `input_std`",
)
