"""dictionary_learning folders: `ae.pt` (a state dict) and `config.json` with a `trainer` section.

AutoEncoder, AutoEncoderNew, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE, GatedAutoEncoder and
JumpReluAutoEncoder. A threshold below zero means it was never tracked; BatchTopK then selects as ReLU does.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import atomic_path, write_json_atomic
from hubsae.core.fold import TrainedTensors
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import Found, assemble, expect_keys, linear_pair, with_b_dec
from hubsae.formats.base import Files, Format, Overrides, Probe

WEIGHTS_NAME = "ae.pt"
CONFIG_NAME = "config.json"
CHECKPOINT = re.compile(r"^ae_\d+\.pt$")

LINEAR = ("encoder.weight", "decoder.weight")
CLASSES: dict[str, tuple[str, ...]] = {
    "AutoEncoder": ("bias", *LINEAR, "encoder.bias"),
    "AutoEncoderNew": (*LINEAR, "encoder.bias", "decoder.bias"),
    "AutoEncoderTopK": ("b_dec", *LINEAR, "encoder.bias"),
    "BatchTopKSAE": ("b_dec", *LINEAR, "encoder.bias"),
    "MatryoshkaBatchTopKSAE": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "GatedAutoEncoder": ("decoder_bias", "r_mag", "gate_bias", "mag_bias", *LINEAR),
    "JumpReluAutoEncoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
}
BUFFERS = ("k", "threshold", "group_sizes")


def detect(probe: Probe) -> str | None:
    """ae.pt beside config.json with trainer.dict_class."""
    if probe.is_dir and not {WEIGHTS_NAME, CONFIG_NAME} <= probe.names:
        return None
    if not probe.is_dir and not CHECKPOINT.match(probe.path.name):
        return None
    trainer = _config(probe).get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        return None
    return f"config.json with trainer.dict_class {trainer['dict_class']!r} beside ae.pt"


def _config(probe: Probe) -> dict[str, Any]:
    """config.json of the folder; of a checkpoint while training (checkpoints/ae_309.pt), of the folder above."""
    return probe.json(CONFIG_NAME if probe.is_dir else f"../{CONFIG_NAME}")


def _read(probe: Probe, choices: Overrides) -> SAE:
    config = _config(probe)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise FormatError(probe.path, "config.json with trainer.dict_class", "none")
    file = probe.path / WEIGHTS_NAME if probe.is_dir else probe.path
    name = trainer["dict_class"]
    if name not in CLASSES:
        raise FormatError(file, f"a dict_class among {', '.join(CLASSES)}", repr(name))
    state = probe.state(WEIGHTS_NAME if probe.is_dir else "")
    expect_keys(file, state, CLASSES[name], BUFFERS)
    buffer = config.get("buffer") if isinstance(config.get("buffer"), dict) else {}
    submodule = trainer.get("submodule_name")
    found = Found(
        format="dictionary_learning",
        path=file,
        trained=_trained(file, name, state),
        architecture={"AutoEncoderTopK": "topk", "GatedAutoEncoder": "gated", "JumpReluAutoEncoder": "jumprelu"}.get(
            name, "relu"
        ),
        layer=trainer.get("layer") if isinstance(trainer.get("layer"), int) else None,
        hook=_hook(submodule, trainer.get("layer")),
        base_model=trainer.get("lm_name"),
        record=_record(trainer, buffer or {}),
    )
    if name == "AutoEncoderTopK":
        found.k = _k(file, state, trainer)
    if name == "JumpReluAutoEncoder":
        found.threshold = state["threshold"]
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        found.architecture, found.k = "batch_topk", _k(file, state, trainer)
        # untracked (-1): the class then keeps everything above 0, which a threshold of 0 says
        found.batch_threshold = max(float(state["threshold"]), 0.0) if "threshold" in state else 0.0
    return assemble(found, choices)


def _k(file: Path, state: dict[str, Any], trainer: dict[str, Any]) -> int | None:
    stored = int(state["k"]) if "k" in state else None
    declared = trainer.get("k")
    if stored is not None and declared is not None and stored != declared:
        raise FormatError(file, f"k={declared} as config.json says", f"k={stored} in the weights")
    return stored if stored is not None else declared


def _trained(file: Path, name: str, state: dict[str, Tensor]) -> TrainedTensors:
    if name in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        b_dec = state["b_dec"]
        pre = b_dec if name == "MatryoshkaBatchTopKSAE" else None
        return TrainedTensors(state["W_enc"], state["W_dec"], b_dec, pre, {"b_enc": state["b_enc"]})
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}.get(
        name, "b_dec"
    )
    b_dec = state[bias]
    W_enc, W_dec = linear_pair(file, state["encoder.weight"], state["decoder.weight"], b_dec.shape[0])
    if name == "GatedAutoEncoder":
        biases = {"b_gate": state["gate_bias"], "b_mag": state["mag_bias"]}
        return TrainedTensors(W_enc, W_dec, b_dec, b_dec, biases, state["r_mag"])
    pre = None if name == "AutoEncoderNew" else b_dec
    return TrainedTensors(W_enc, W_dec, b_dec, pre, {"b_enc": state["encoder.bias"]})


def _hook(submodule: str | None, layer: Any) -> str | None:
    if not isinstance(layer, int):
        return None
    kind = next((k for k in ("resid_post", "resid_pre", "mlp_out", "attn_out") if k in (submodule or "")), None)
    return f"{layer}.{kind}" if kind else None


def _record(trainer: dict[str, Any], buffer: dict[str, Any]) -> dict[str, Any]:
    training = {"steps": trainer.get("steps"), "lr": trainer.get("lr"), "seed": trainer.get("seed")}
    record: dict[str, Any] = {"training": {k: v for k, v in training.items() if isinstance(v, (int, float))}}
    if isinstance(buffer.get("ctx_len"), int):
        record["hook"] = {"context_size": buffer["ctx_len"]}
    return record


def write(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write a folder `dictionary_learning.utils.load_dictionary` opens."""
    config = sae.config
    unsupported = None
    if config.is_transcoder:
        unsupported = "transcoders"
    elif config.token_norm != "none":
        unsupported = config.token_norm
    elif config.architecture == "topk" and not config.topk_relu:
        unsupported = "signed top-k"
    elif config.architecture == "batch_topk" and config.threshold is None:
        unsupported = "batch_topk without a threshold"
    if unsupported:
        raise ConfigError(f"dictionary_learning has no {unsupported} at inference", hint="write it as native")
    tensors = with_b_dec(sae, subtracted=config.architecture != "jumprelu")
    linear = {"encoder.weight": tensors["W_enc"].t().contiguous(), "decoder.weight": tensors["W_dec"].t().contiguous()}
    k = {"k": torch.tensor(config.k or 1, dtype=torch.int)}
    if config.architecture == "relu":
        name, state = "AutoEncoder", linear | {"bias": tensors["b_dec"], "encoder.bias": tensors["b_enc"]}
    elif config.architecture == "topk":
        state = linear | {"b_dec": tensors["b_dec"], "encoder.bias": tensors["b_enc"]} | k
        name, state = "AutoEncoderTopK", state | {"threshold": torch.tensor(-1.0)}
    elif config.architecture == "batch_topk":
        state = linear | {"b_dec": tensors["b_dec"], "encoder.bias": tensors["b_enc"]} | k
        name, state = "BatchTopKSAE", state | {"threshold": torch.tensor(config.threshold)}
    elif config.architecture == "gated":
        gates = {"gate_bias": tensors["b_gate"], "mag_bias": tensors["b_mag"], "r_mag": tensors["r_mag"]}
        name, state = "GatedAutoEncoder", linear | {"decoder_bias": tensors["b_dec"]} | gates
    else:
        name, state = "JumpReluAutoEncoder", tensors
    meta = sae.metadata
    trainer: dict[str, Any] = {
        "dict_class": name,
        "activation_dim": config.d_in,
        "dict_size": config.d_sae,
        "layer": meta.hook.layer,
        "lm_name": meta.base_model.id,
        "submodule_name": f"{meta.hook.kind}_layer_{meta.hook.layer}",
    }
    if config.k is not None:
        trainer["k"] = config.k
    folder = Path(folder)
    io.ensure_finite(folder / WEIGHTS_NAME, state)
    # a file object, because torch writes a path's name into the archive: equal SAEs are equal files
    with atomic_path(folder / WEIGHTS_NAME) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    write_json_atomic(folder / CONFIG_NAME, {"trainer": trainer, "buffer": {"ctx_len": meta.hook.context_size}})
    return folder


FORMAT = Format(
    name="dictionary_learning",
    title="dictionary_learning",
    detect=detect,
    read=_read,
    write=write,
    files=(Files((CONFIG_NAME, WEIGHTS_NAME)),),
    suffixes=(".pt",),
    beside=(f"../{CONFIG_NAME}",),
    covers=frozenset({"linear", "pt"}),
    layout="`ae.pt`, `config.json` with `trainer.dict_class`",
)
