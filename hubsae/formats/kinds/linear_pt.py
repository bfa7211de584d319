"""PyTorch files with `b_pre`, `encoder.{weight,bias}`, `decoder.{weight,bias}`: two layouts, one set of keys.

    rl_chain   {"state_dict": ..., "config": {...}}    decoding is decoder(z); top-k without a ReLU
    grid       a bare state dict, kind in the file name    decoding is decoder(z) + b_pre; ReLU after selecting

Names and shapes are the same and only the decoder differs, so nothing in the tensors tells them apart: the
container does, or the person (`decode_adds_b_pre`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hubsae.core.errors import FormatError
from hubsae.core.fold import TrainedTensors
from hubsae.core.metadata import DecoderFlags
from hubsae.core.sae import SAE
from hubsae.formats.assembling import Found, assemble, expect_keys, linear_pair
from hubsae.formats.base import Format, Overrides, Probe
from hubsae.formats.tensors import PICKLES

KEYS = ("b_pre", "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
# Older files of the RL chains were saved before the pre-bias existed; their loader took it as zero.
KEYS_OLD = KEYS[1:]


def _wrapped(probe: Probe) -> dict[str, Any] | None:
    value = probe.pickle()
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict) and isinstance(value.get("config"), dict):
        return value
    return None


def _detect_chain(probe: Probe) -> str | None:
    value = _wrapped(probe)
    if value is not None and set(value["state_dict"]) in (set(KEYS), set(KEYS_OLD)):
        return "a dict with state_dict and config; the state dict has encoder, decoder and b_pre"
    fits = _bare(probe) and not _follows_the_grid(probe)
    return "a bare state dict with b_pre, decoder(z)" if fits else None


def _detect_grid(probe: Probe) -> str | None:
    if _bare(probe) and _follows_the_grid(probe):
        return f"a bare state dict with b_pre, named {probe.path.name}"
    return "a bare state dict with b_pre, decoder(z) + b_pre" if _bare(probe) else None


def _bare(probe: Probe) -> bool:
    value = probe.pickle()
    return isinstance(value, dict) and set(value) == set(KEYS)


def _follows_the_grid(probe: Probe) -> bool:
    """By its name; where a bare state dict has another, both readings fit."""
    info = probe.name
    return info.architecture is not None and (info.k is not None or info.threshold is not None)


def _found(probe: Probe, state: dict[str, Tensor], choices: Overrides, name: str, adds: bool) -> Found:
    b_pre = state.get("b_pre")
    bias = state["decoder.bias"]
    if choices.decode_adds_b_pre is not None:
        adds = choices.decode_adds_b_pre
    W_enc, W_dec = linear_pair(probe.path, state["encoder.weight"], state["decoder.weight"], bias.shape[0])
    b_dec = bias if b_pre is None or not adds else (bias.double() + b_pre.double()).float()
    return Found(
        format=name,
        path=probe.path,
        trained=TrainedTensors(W_enc, W_dec, b_dec, b_pre, {"b_enc": state["encoder.bias"]}),
        architecture="topk",
        layer=probe.name.layer,
        stage=probe.name.stage,
        flags=DecoderFlags(
            decode_adds_b_pre=adds if b_pre is not None else None,
            encoder_orientation="[d_sae, d_in]",
            decoder_orientation="[d_in, d_sae]",
        ),
    )


def _read_chain(probe: Probe, choices: Overrides) -> SAE:
    value = _wrapped(probe) or {"state_dict": probe.state(), "config": {}}
    state, config = value["state_dict"], value["config"]
    expect_keys(probe.path, state, KEYS_OLD, ("b_pre",))
    found = _found(probe, state, choices, "rl_chain", adds=False)
    found.topk_relu = False
    found.k = config.get("k", probe.name.k)
    found.stage = found.stage or _stage_of(config)
    shape = (config.get("d_sae"), config.get("d_model"))
    if None not in shape and shape != tuple(state["encoder.weight"].shape):
        raise FormatError(
            probe.path, f"encoder.weight {shape} as config says", str(tuple(state["encoder.weight"].shape))
        )
    found.record = {"training": _training(config)}
    return assemble(found, choices)


def _stage_of(config: dict[str, Any]) -> str | None:
    """`source` is the name of the activations: `{stage}_layer{N}`."""
    source = config.get("source")
    return source.rpartition("_layer")[0] or None if isinstance(source, str) else None


def _training(config: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if isinstance(config.get("seed"), int):
        out["seed"] = config["seed"]
    if config.get("init_from_stage"):
        out["warm_start"] = {"id": str(config["init_from_stage"])}
    chosen = [f"{key}={config[key]}" for key in ("selection_metric", "best_epoch") if config.get(key) is not None]
    if chosen:
        out["selection"] = ", ".join(chosen)
    # losses as the trainer logged them: kept under their own names, not as metrics of ours
    for key in ("best_train_loss", "best_val_loss", "source_kind"):
        if isinstance(config.get(key), (int, float, str)):
            out[key] = config[key]
    return out


def _read_grid(probe: Probe, choices: Overrides) -> SAE:
    state = probe.state()
    expect_keys(probe.path, state, KEYS)
    info = probe.name
    kind = choices.architecture or info.architecture
    if kind is None:
        raise FormatError(
            probe.path,
            "a name such as BatchTopK_exp8x_k220.pt, which says how latents are selected",
            probe.path.name,
            hint="give architecture=batch_topk (or topk) and k=...",
        )
    if kind not in ("topk", "batch_topk"):
        raise FormatError(
            probe.path, "TopK or BatchTopK under these keys", kind, hint="the layout of other kinds is not published"
        )
    found = _found(probe, state, choices, "grid", adds=True)
    found.architecture, found.k = kind, info.k
    d_sae, d_in = state["encoder.weight"].shape
    if info.expansion is not None and d_sae != info.expansion * d_in:
        raise FormatError(probe.path, f"{info.expansion}x expansion of {d_in} as its name says", f"d_sae {d_sae}")
    return assemble(found, choices)


RL_CHAIN = Format(
    name="rl_chain",
    title="RL-chain checkpoint",
    detect=_detect_chain,
    read=_read_chain,
    suffixes=PICKLES,
    layout='`sae_{stage}_layer{N}.pt`: `{"state_dict", "config"}`, decoder without `b_pre`, no ReLU',
)
GRID = Format(
    name="grid",
    title="grid-search state dict",
    detect=_detect_grid,
    read=_read_grid,
    suffixes=PICKLES,
    layout="`BatchTopK_exp8x_k220.pt`: bare state dict, decoder plus `b_pre`, batch rule",
)
