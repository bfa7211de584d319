"""Files as people write them by hand: two `nn.Linear` and their biases, or any tensors that a key map names.

    linear    encoder.weight [d_sae, d_in], encoder.bias, decoder.weight [d_in, d_sae], decoder.bias, or Goodfire's
              encoder_linear.*, decoder_linear.*; with and without pre_bias; .pt or safetensors, bare or under
              model_state_dict, model, sae ...; with the config.json of `PyTorchModelHubMixin` where it lies beside
    mapped    whatever `map` names: W_enc=enc.weight.T, b_enc=enc.bias, W_dec=dec.weight.T, b_dec=dec.bias

What tensors cannot tell is taken from the config beside them, from a repo whose files are known, or asked for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from hubsae.core.errors import ConfigError, FormatError, nearest
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import linear_pair, named_tensors
from hubsae.formats.base import Format, Overrides, Probe

WRAPPERS = ("model_state_dict", "state_dict", "model", "sae", "sae_state_dict")
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
OPTIONAL = ("decoder.bias", "pre_bias")
TARGETS = ("W_enc", "W_dec", "b_enc", "b_dec", "pre_bias", "threshold", "b_gate", "b_mag", "r_mag", "W_skip")
# Published files that say nothing of themselves, by their names: a ReLU, nothing subtracted.
KNOWN = {
    re.compile(r"Llama-3\.3-70B-Instruct-SAE-l(\d+)\.pth?$"): "meta-llama/Llama-3.3-70B-Instruct",
    re.compile(r"Llama-3\.1-8B-Instruct-SAE-l(\d+)\.pth?$"): "meta-llama/Llama-3.1-8B-Instruct",
    re.compile(r"DeepSeek-R1-Distill-Llama-8B-SAE-l(\d+)\.pth?$"): "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
ACTIVATIONS = {"relu": "relu", "standard": "relu", "topk": "topk", "batchtopk": "batch_topk", "jumprelu": "jumprelu"}


def _tensors(probe: Probe) -> dict[str, Tensor]:
    """The tensors of a file by name, from inside what wraps them; {} where it is a folder or holds none."""
    if probe.is_dir:
        return {}
    value: Any = io.read_safetensors(probe.path) if probe.path.suffix == ".safetensors" else probe.pickle()
    for _ in range(3):  # not for ever: a pickle may hold itself
        if isinstance(value, dict):
            value = next((value[n] for n in WRAPPERS if isinstance(value.get(n), dict)), value)
    return {n: t for n, t in value.items() if isinstance(t, Tensor)} if isinstance(value, dict) else {}


def _plain_name(name: str) -> str:
    """Without the module in front, and Goodfire's word for a layer."""
    name = name.replace("encoder_linear.", "encoder.").replace("decoder_linear.", "decoder.")
    return re.sub(r"^(?:module|model|sae|autoencoder)\.(?=encoder|decoder|pre_bias)", "", name)


def detect(probe: Probe) -> str | None:
    """encoder.weight, encoder.bias and decoder.weight, and nothing that another format is known by."""
    if probe.is_dir:
        return None
    if probe.path.suffix == ".safetensors":
        names, wrapped = set(probe.header()), False
    else:
        value = probe.pickle()
        names = set(_tensors(probe)) if isinstance(value, dict) else set()
        # the RL chains' own layout, which says more
        wrapped = isinstance(value, dict) and isinstance(value.get("config"), dict) and "state_dict" in value
    found = {_plain_name(name) for name in names}
    fits = set(LINEAR) <= found <= {*LINEAR, *OPTIONAL} and found & set(OPTIONAL)
    return f"two linear layers: {', '.join(sorted(names))}" if fits and not wrapped else None


def _read(probe: Probe, choices: Overrides) -> SAE:
    tensors = {_plain_name(name): tensor for name, tensor in _tensors(probe).items()}
    missing = [name for name in LINEAR if name not in tensors]
    if missing or not {*OPTIONAL} & set(tensors):
        raise FormatError(probe.path, f"{', '.join(LINEAR)} and a bias of its input", ", ".join(sorted(tensors)))
    pre, bias = tensors.get("pre_bias"), tensors.get("decoder.bias")
    width = (bias if bias is not None else tensors["pre_bias"]).shape[0]
    W_enc, W_dec = linear_pair(probe.path, tensors["encoder.weight"], tensors["decoder.weight"], width)
    named = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": tensors["encoder.bias"]}
    named |= {n: t for n, t in (("b_dec", bias), ("pre_bias", pre)) if t is not None}
    return named_tensors(probe, named, choices, "linear", _about(probe))


def _about(probe: Probe) -> dict[str, Any]:
    """What is said beside the file, or known of a published one."""
    return _config(probe) | _published(probe.path)


def _config(probe: Probe) -> dict[str, Any]:
    """What a config.json beside the file says in words that are beyond doubt."""
    config, out = probe.json("config.json"), {}
    kind = str(config.get("activation", config.get("architecture", config.get("sae_type", ""))))
    kind = kind.lower().replace("_", "").replace("-", "")
    out["architecture"] = ACTIVATIONS.get(kind)
    k = config.get("k", config.get("top_k", config.get("topk")))
    if isinstance(k, int) and not isinstance(k, bool):
        out["k"] = k
        out["architecture"] = out["architecture"] or ("topk" if not kind else None)
    stated = config.get("apply_b_dec_to_input", config.get("subtract_b_dec"))
    out["subtract"] = stated if isinstance(stated, bool) else None
    names_of = {"hook": ("hook_point", "hook_name", "hookpoint"), "base_model": ("base_model", "model_name")}
    for ours, names in names_of.items():
        out[ours] = next((config[n] for n in names if isinstance(config.get(n), str)), None)
    return {name: value for name, value in out.items() if value is not None}


def _published(path: Path) -> dict[str, Any]:
    for pattern, model in KNOWN.items():
        if match := pattern.search(path.name):
            return {"architecture": "relu", "subtract": False, "layer": int(match[1]), "base_model": model}
    return {}


# ---- key maps ---------------------------------------------------------------------------------------------


def parse_map(given: Any) -> dict[str, str]:
    """`W_enc=enc.weight.T, b_enc=enc.bias` as names; a mapping or a list of pairs is taken as well.

    >>> parse_map("W_enc=enc.weight.T,b_enc=enc.bias")
    {'W_enc': 'enc.weight.T', 'b_enc': 'enc.bias'}
    """
    pairs = given.split(",") if isinstance(given, str) else given
    items = pairs.items() if isinstance(pairs, dict) else (str(pair).partition("=")[::2] for pair in pairs)
    out = {str(name).strip(): str(source).strip() for name, source in items}
    for name, source in out.items():
        if name not in TARGETS or not source:
            raise ConfigError(
                f"a key map gives no {name!r}" if source else f"the key map names no tensor for {name!r}",
                hint=f"write W_enc=enc.weight.T; names: {', '.join(TARGETS)}; .T turns a matrix",
            )
    return out


def _read_mapped(probe: Probe, choices: Overrides) -> SAE:
    wanted, tensors = parse_map(choices.map or {}), _tensors(probe)
    named: dict[str, Tensor] = {}
    for name, source in wanted.items():
        turned = source not in tensors and source.endswith(".T")
        key = source.removesuffix(".T") if turned else source
        if key not in tensors:
            raise FormatError(
                probe.path, f"the tensor {key}, as the key map says", f"others: {nearest(key, sorted(tensors), 8)}"
            )
        named[name] = tensors[key].t() if turned else tensors[key]
    absent = [name for name in ("W_enc", "W_dec") if name not in named]
    if absent or not {"b_enc", "b_gate"} & set(named):
        raise ConfigError(f"the key map lacks {', '.join(absent) or 'b_enc'}", hint="W_enc, W_dec, b_enc, b_dec")
    return named_tensors(probe, named, choices, "mapped", _about(probe))


FORMAT = Format(
    name="linear",
    title="two linear layers",
    detect=detect,
    read=_read,
    suffixes=(*io.PICKLES, ".safetensors"),
    beside=("config.json",),
    layout="`encoder.weight`, `encoder.bias`, `decoder.weight`, `decoder.bias` (+ `pre_bias`, `config.json`)",
)
MAPPED = Format(
    name="mapped",
    title="any tensors, by a key map",
    read=_read_mapped,
    layout="`map='W_enc=enc.weight.T,b_enc=enc.bias,...'`",
)
