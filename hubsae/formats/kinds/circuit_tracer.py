"""circuit-tracer's per-layer transcoders: `layer_{N}.safetensors`, and `config.yaml` beside all of them.

    W_enc [d_sae, d_in]   W_dec [d_sae, d_out]   b_enc [d_sae]   b_dec [d_out]
    W_skip [d_out, d_in] and activation_function.threshold [d_sae] in some

Both matrices hold one latent per row, which tells these files from autoencoders of the same names. Its cross-layer
transcoders are read by `formats/cross_layer.py`.
"""

from __future__ import annotations

import re
from typing import Any

from hubsae.core.errors import FormatError
from hubsae.core.fold import TrainedTensors
from hubsae.core.metadata import DecoderFlags
from hubsae.core.sae import SAE
from hubsae.formats import tensors as io
from hubsae.formats.assembling import Found, assemble, expect_keys
from hubsae.formats.base import Format, Overrides, Probe

FILE = re.compile(r"^layer_(\d+)\.safetensors$")
KEYS = ("W_enc", "W_dec", "b_enc", "b_dec")
THRESHOLDS = ("activation_function.threshold", "threshold")
CONFIGS = ("config.yaml", "wandb-config.yaml", "wanb-config.yaml")  # the last is how some repos spell it
REPO = re.compile(r"qwen3-(\d+(?:\.\d+)?)b-transcoders", re.IGNORECASE)


def detect(probe: Probe) -> str | None:
    """layer_N.safetensors with W_enc and W_dec of one latent per row."""
    if probe.is_dir:
        return None
    header = probe.header()
    if not FILE.match(probe.path.name) or not set(KEYS) <= set(header):
        return None
    encoder, decoder, bias = (header[name][1] for name in ("W_enc", "W_dec", "b_enc"))
    rows = encoder[:1] == decoder[:1] == bias[:1]
    square = encoder[-1:] == encoder[:1]
    known = square and any(probe.yaml(name) for name in CONFIGS)
    return "layer_N.safetensors with one latent per row of W_enc and W_dec" if rows and (not square or known) else None


def _read(probe: Probe, choices: Overrides) -> SAE:
    match = FILE.match(probe.path.name)
    if match is None:
        raise FormatError(probe.path, "a transcoder of one layer (layer_N.safetensors)", "another name")
    tensors = io.read_safetensors(probe.path)
    expect_keys(probe.path, tensors, KEYS, ("W_skip", *THRESHOLDS))
    config, layer = probe.yaml("config.yaml"), int(match[1])
    threshold = next((tensors[name] for name in THRESHOLDS if name in tensors), None)
    repo = REPO.search(probe.path.absolute().as_posix())
    model = config.get("model_name") or (f"Qwen/Qwen3-{repo[1]}B" if repo else None)
    return assemble(
        Found(
            format="circuit_tracer",
            path=probe.path,
            trained=TrainedTensors(
                tensors["W_enc"].t(), tensors["W_dec"], tensors["b_dec"], None, {"b_enc": tensors["b_enc"]},
                W_skip=tensors.get("W_skip"),
            ),
            architecture="relu" if threshold is None else "jumprelu",
            threshold=threshold,
            transcoder=True,
            layer=layer,
            hook=_hook(config.get("feature_input_hook", "mlp.hook_in"), layer),
            hook_out=_hook(config.get("feature_output_hook", "hook_mlp_out"), layer),
            base_model=model if isinstance(model, str) else None,
            flags=DecoderFlags(encoder_orientation="[d_sae, d_in]", decoder_orientation="[d_sae, d_out]"),
            # activations of the model as it is, not of TransformerLens' folded one
            record={"saelens": {"metadata": {"model_from_pretrained_kwargs": {"fold_ln": False}}}},
        ),
        choices,
    )  # fmt: skip


def _hook(name: Any, layer: int) -> str:
    # mlp.hook_out is the same tensor under the name of the MLP itself
    return f"blocks.{layer}.{'hook_mlp_out' if name == 'mlp.hook_out' else name}"


FORMAT = Format(
    name="circuit_tracer",
    title="circuit-tracer transcoders",
    detect=detect,
    read=_read,
    suffixes=(".safetensors",),
    beside=CONFIGS,
    covers=frozenset({"pt"}),
    layout="`layer_{N}.safetensors` with one latent per row, `config.yaml`",
)
