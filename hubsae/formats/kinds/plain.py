"""Canonical tensors without a format of their own: a PyTorch file, a safetensors file, or raw tensor files.

    pt     {"state_dict": {W_enc, ...}, "config": {...}} as hubsae writes it, or any dict with these names
    raw    W_enc, W_dec, b_enc, b_dec ... each a bare little-endian float32 file, and tensors.json

A file hubsae wrote says what its tensors mean. Of others only the names are known: how latents are selected
and whether b_dec is subtracted must be given.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from hubsae.core.config import SAEConfig
from hubsae.core.errors import FormatError
from hubsae.core.files import atomic_path, safe_join, write_json_atomic
from hubsae.core.metadata import Metadata, describe_validation
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import expect_keys, named_tensors, orient
from hubsae.formats.base import Format, Overrides, Probe
from hubsae.formats.names import stem_of
from hubsae.version import __version__

MATRICES = ("W_enc", "W_dec", "b_dec")
OTHERS = ("b_enc", "threshold", "log_threshold", "b_gate", "b_mag", "r_mag", "W_skip")
INDEX_NAME = "tensors.json"
MARK = "hubsae"
# Connor Kissane's and Rob Krzyzanowski's SAEs on the heads of GPT-2: `{name}.pt` beside `{name}_cfg.json`
CFG_SUFFIX = "_cfg.json"
BASE_OF_CFG = "openai-community/gpt2"


def _state(value: Any) -> dict[str, Tensor] | None:
    """Tensors by canonical name, bare or under state_dict; None where they are not what the file holds."""
    if not isinstance(value, dict):
        return None
    inner = value.get("state_dict", value)
    if not isinstance(inner, dict) or not set(MATRICES) <= set(inner):
        return None
    tensors = {k: v for k, v in inner.items() if isinstance(v, Tensor)}
    return tensors if set(tensors) <= {*MATRICES, *OTHERS} else None


# ---- one file ---------------------------------------------------------------------------------------------


def _detect_file(probe: Probe) -> str | None:
    if probe.path.suffix == ".safetensors":
        names = set(probe.header())
        fits = set(MATRICES) <= names <= {*MATRICES, *OTHERS}
        return "a safetensors file with W_enc, W_dec and b_dec" if fits else None
    value = probe.pickle()
    if _state(value) is None:
        return None
    return "a file of hubsae" if value.get("format") == MARK else "a dict with W_enc, W_dec and b_dec"


def _read_file(probe: Probe, choices: Overrides) -> SAE:
    if probe.path.suffix == ".safetensors":
        value: Any = io.read_safetensors(probe.path)
    else:
        value = probe.pickle()
    tensors = _state(value)
    if tensors is None:
        raise FormatError(probe.path, "W_enc, W_dec and b_dec", "other tensors")
    if value.get("format") == MARK:
        return _from_config(probe.path, value.get("config"), tensors, value.get("metadata"))
    return _unnamed(probe, "tensors", tensors, choices)


def write_pt(sae: SAE, path: str | os.PathLike[str]) -> Path:
    """Write one PyTorch file; `torch.load(path)["state_dict"]` is the state dict of HubSAE and of SAELens."""
    content = {
        "format": MARK,
        "hubsae_version": __version__,
        "config": sae.config.model_dump(mode="json", exclude_none=True),
        "metadata": sae.metadata.to_dict(),
        "state_dict": {name: t.detach().cpu().contiguous() for name, t in sae.tensors().items()},
    }
    # a file object, because torch writes a path's name into the archive: equal SAEs are equal files
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
    return Path(path)


def _from_config(path: Path, config: Any, tensors: dict[str, Tensor], metadata: Any) -> SAE:
    try:
        parsed = SAEConfig.model_validate(config)
    except ValidationError as error:
        raise FormatError(path, "the config of an SAE", describe_validation(error)) from error
    expect_keys(path, tensors, parsed.tensor_names)
    io.ensure_finite(path, tensors)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != parsed.tensor_shape(name):
            raise FormatError(path, f"{name} of shape {parsed.tensor_shape(name)}", str(tuple(tensor.shape)))
    record = Metadata.from_dict(metadata, where=path) if isinstance(metadata, dict) else Metadata(config=parsed)
    kept = io.owned(path, {name: tensors[name] for name in parsed.tensor_names}, tensors.values())
    return SAE.build(parsed, kept, metadata=record)


def _unnamed(probe: Probe, name: str, tensors: dict[str, Tensor], choices: Overrides) -> SAE:
    """Tensors whose names are canonical and of which nothing else is known."""
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").double().exp().float()
    config, about = probe.json(f"{stem_of(probe.path.name)}{CFG_SUFFIX}") if not probe.is_dir else {}, {}
    if isinstance(config.get("act_name"), str):  # what published this way has a ReLU and subtracts b_dec
        about = {"architecture": "relu", "hook": config["act_name"], "base_model": BASE_OF_CFG, "subtract": True}
    if "W_skip" in tensors or choices.hook_out is not None:
        raise FormatError(
            probe.path, "an autoencoder", "a transcoder", hint="name its tensors: map='W_enc=W_enc,...' with hook_out="
        )
    bias = next((tensors[key] for key in ("b_enc", "b_gate", "b_mag") if key in tensors), None)
    if bias is None:
        raise FormatError(probe.path, "an encoder bias", f"only {', '.join(sorted(tensors))}")
    d_in, d_sae = tensors["b_dec"].shape[0], bias.shape[0]
    W_enc, W_dec, flags = orient(probe.path, tensors["W_enc"], tensors["W_dec"], d_in, d_sae, choices.transposed)
    return named_tensors(probe, {**tensors, "W_enc": W_enc, "W_dec": W_dec}, choices, name, about, flags)


# ---- raw tensor files -------------------------------------------------------------------------------------


def _detect_raw(probe: Probe) -> str | None:
    if not probe.is_dir or not {"W_enc", "W_dec", "b_dec"} <= {name.removesuffix(".npy") for name in probe.names}:
        return None
    return "raw tensor files W_enc, W_dec, b_dec" + (" with tensors.json" if INDEX_NAME in probe.names else "")


def _raw_files(probe: Probe) -> dict[str, Path]:
    wanted = {*MATRICES, *OTHERS}
    return {n.removesuffix(".npy"): probe.path / n for n in sorted(probe.names) if n.removesuffix(".npy") in wanted}


def _read_raw(probe: Probe, choices: Overrides) -> SAE:
    index = probe.json(INDEX_NAME)
    if index:
        return _read_index(probe.path, index)
    files = _raw_files(probe)
    vectors = {name: io.read_raw(file) for name, file in files.items() if not name.startswith("W_")}
    d_in = vectors["b_dec"].numel()
    d_sae = next((v.numel() for name, v in vectors.items() if name != "b_dec"), 0)
    tensors = dict(vectors)
    for name in ("W_enc", "W_dec"):
        matrix = io.read_raw(files[name], d_in * d_sae if files[name].suffix != ".npy" else None)
        if matrix.ndim == 1:
            # bare bytes have no shape: both orientations fit, whatever the widths
            if choices.transposed is None:
                raise FormatError(
                    files[name],
                    "to be told its orientation",
                    "bytes without a shape",
                    hint="give transposed=False for W_enc [d_in, d_sae], transposed=True for [d_sae, d_in]",
                )
            shape = (d_in, d_sae) if (name == "W_enc") != choices.transposed else (d_sae, d_in)
            matrix = matrix.reshape(shape)
        tensors[name] = matrix
    return _unnamed(probe, "raw", tensors, choices)


def _read_index(folder: Path, index: dict[str, Any]) -> SAE:
    file = folder / INDEX_NAME
    entries = index.get("tensors")
    if not isinstance(entries, dict) or not all(isinstance(e, dict) and "shape" in e for e in entries.values()):
        raise FormatError(file, "tensors with their shapes", "something else")
    tensors = {}
    for name, entry in entries.items():
        shape = tuple(int(n) for n in entry["shape"])
        if any(n < 1 for n in shape) or entry.get("dtype", "float32") != "float32":
            raise FormatError(file, f"float32 and positive shapes for {name}", f"{entry}")
        tensors[name] = io.read_raw(safe_join(folder, name), int(np.prod(shape))).reshape(shape)
    return _from_config(file, index.get("config"), tensors, index.get("metadata"))


def write_raw(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write each tensor as a bare little-endian float32 file, and tensors.json that says what they are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, tensor in sae.tensors().items():
        with atomic_path(folder / name) as temporary:
            tensor.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False).tofile(temporary)
        entries[name] = {"shape": list(tensor.shape), "dtype": "float32", "order": "C", "endian": "little"}
    config = sae.config.model_dump(mode="json", exclude_none=True) | {"dtype": "float32"}
    record = sae.metadata.to_dict() | {"config": config}
    write_json_atomic(folder / INDEX_NAME, {"format": MARK, "config": config, "tensors": entries, "metadata": record})
    return folder


TENSORS = Format(
    name="pt",
    title="plain tensors in one file",
    detect=_detect_file,
    read=_read_file,
    write=write_pt,
    write_beside=lambda sae, folder: write_pt(sae, folder / "model.pt"),
    suffixes=(*io.PICKLES, ".safetensors"),
    beside=("{stem}" + CFG_SUFFIX,),
    suffix=".pt",
    layout="`.pt` or `.safetensors` with `W_enc`, `W_dec`, `b_enc`, `b_dec`",
)
RAW = Format(
    name="raw",
    title="raw tensor files",
    detect=_detect_raw,
    read=_read_raw,
    write=write_raw,
    write_beside=lambda sae, folder: write_raw(sae, folder / "raw"),
    layout="`W_enc`, `W_dec`, `b_enc`, `b_dec` (float32 bytes or .npy), `tensors.json`",
)
