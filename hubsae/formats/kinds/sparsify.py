"""EleutherAI sparsify folders: `cfg.json` and `sae.safetensors`.

    encoder.weight [d_sae, d_in], encoder.bias, W_dec [d_sae, d_in], b_dec

ReLU first, then top-k; b_dec is subtracted before encoding unless the config says `transcode`, which makes it a
transcoder from a module's input to its output, with W_skip [d_in, d_in] where it says `skip_connection`. (SAELens' own
reader of this format turns W_dec and gets the subtraction wrong.)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import read_json, write_json_atomic
from hubsae.core.fold import TrainedTensors
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import Found, assemble, expect_keys, with_b_dec
from hubsae.formats.base import Files, Format, Overrides, Probe
from hubsae.formats.names import parse_name

CFG_NAME = "cfg.json"
WEIGHTS_NAME = "sae.safetensors"


def detect(probe: Probe) -> str | None:
    """cfg.json beside sae.safetensors."""
    if not probe.is_dir or not {CFG_NAME, WEIGHTS_NAME} <= probe.names or "d_in" not in probe.json(CFG_NAME):
        return None
    return "cfg.json beside sae.safetensors"


def _read(probe: Probe, choices: Overrides) -> SAE:
    cfg = probe.json(CFG_NAME)
    file = probe.path / WEIGHTS_NAME
    if cfg.get("activation", "topk") != "topk":
        raise FormatError(file, "the activation topk", repr(cfg["activation"]), hint="load it with sparsify itself")
    transcoder, skip = bool(cfg.get("transcode")), bool(cfg.get("skip_connection"))
    if skip and not transcoder:
        raise FormatError(
            file, "transcode with skip_connection", "transcode: false", hint="load it with sparsify itself"
        )
    tensors = io.read_safetensors(file)
    expect_keys(file, tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *(("W_skip",) if skip else ())))
    encoder, W_dec, b_dec = tensors["encoder.weight"], tensors["W_dec"], tensors["b_dec"]
    d_in = int(cfg["d_in"])
    d_sae = int(cfg.get("num_latents") or d_in * int(cfg.get("expansion_factor", 32)))
    for name, tensor in (("encoder.weight", encoder), ("W_dec", W_dec)):
        if tuple(tensor.shape) != (d_sae, d_in):
            raise FormatError(file, f"{name} [{d_sae}, {d_in}] as cfg.json says", str(tuple(tensor.shape)))
    name = parse_name(probe.path.name)
    return assemble(
        Found(
            format="sparsify",
            path=file,
            trained=TrainedTensors(
                encoder.t(),
                W_dec,
                b_dec,
                None if transcoder else b_dec,
                {"b_enc": tensors["encoder.bias"]},
                W_skip=tensors.get("W_skip"),
            ),
            transcoder=transcoder,
            architecture="topk",
            k=int(cfg["k"]) if "k" in cfg else None,
            # the hookpoint is a module: autoencoders read its output, transcoders its input and predict its output
            hook=None if name.layer is None else probe.path.name + (".input" if transcoder else ""),
            hook_out=probe.path.name if transcoder and name.layer is not None else None,
            base_model=_run_config(probe.path).get("model"),
        ),
        choices,
    )


def _run_config(folder: Path) -> dict[str, Any]:
    """sparsify's trainer writes its own config.json in the folder above."""
    file = folder.parent / "config.json"
    config = read_json(file) if file.is_file() and file.stat().st_size < io.MAX_JSON else {}
    return config if isinstance(config, dict) and "sae" in config else {}


def write(sae: SAE, folder: str | os.PathLike[str], *, merge_cfg: bool = False) -> Path:
    """Write a sparsify folder; `merge_cfg` adds its keys to the cfg.json of a SAELens folder, so one folder is both."""
    config = sae.config
    if config.d_out not in (None, config.d_in):
        raise ConfigError(f"sparsify's transcoders are as wide at the output as at the input, not {config.d_out}")
    if config.architecture != "topk" or not config.topk_relu or config.token_norm != "none":
        raise ConfigError(
            f"sparsify has ReLU-then-topk on plain activations, not {config.selection}"
            + (f" with {config.token_norm}" if config.token_norm != "none" else ""),
            hint="write it as native, saelens or onnx",
        )
    tensors = sae.tensors() if config.is_transcoder else with_b_dec(sae, subtracted=True)  # as sparsify always does
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"encoder.weight": tensors["W_enc"].t(), "encoder.bias": tensors["b_enc"]}
    stored |= {name: tensors[name] for name in ("W_dec", "b_dec", "W_skip") if name in tensors}
    io.write_safetensors(folder / WEIGHTS_NAME, stored)
    cfg: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(config.d_sae // config.d_in, 1),
        "normalize_decoder": False,
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": bool(config.skip),
        "transcode": config.is_transcoder,
        "d_in": config.d_in,
    }
    if merge_cfg and (folder / CFG_NAME).is_file():
        cfg = {**read_json(folder / CFG_NAME), **cfg}
    write_json_atomic(folder / CFG_NAME, cfg)
    return folder


FORMAT = Format(
    name="sparsify",
    title="EleutherAI sparsify",
    detect=detect,
    read=_read,
    write=write,
    write_beside=lambda sae, folder: write(sae, folder, merge_cfg=True),
    files=(Files((CFG_NAME, WEIGHTS_NAME)),),
    layout="`cfg.json`, `sae.safetensors`",
)
