"""JumpReLU checkpoints with their input normaliser: `sae_state_dict`, `normalization_mean`, `normalization_scale`.

W_enc [d_in, d_sae] and W_dec [d_sae, d_in], thresholds as logarithms; inputs are (x - mean) / scale with a mean
per dimension and one global scale; nothing is subtracted before encoding.
"""

from __future__ import annotations

from typing import Any

from hubsae.core.errors import FormatError
from hubsae.core.fold import TrainedTensors
from hubsae.core.sae import SAE
from hubsae.formats.assembling import Found, assemble, expect_keys, statistic
from hubsae.formats.base import Format, Overrides, Probe
from hubsae.formats.tensors import PICKLES

KEYS = ("W_enc", "b_enc", "W_dec", "b_dec", "log_threshold")


def detect(probe: Probe) -> str | None:
    """A dict with sae_state_dict and normalization_mean."""
    value = probe.pickle()
    if isinstance(value, dict) and {"sae_state_dict", "normalization_mean", "normalization_scale"} <= set(value):
        return "a dict with sae_state_dict, normalization_mean and normalization_scale"
    return None


def _read(probe: Probe, choices: Overrides) -> SAE:
    value = probe.state()
    state = value.get("sae_state_dict")
    if not isinstance(state, dict):
        raise FormatError(probe.path, "a state dict under sae_state_dict", type(state).__name__)
    expect_keys(probe.path, state, KEYS)
    d_in, d_sae = value.get("d_in"), value.get("d_sae")
    if None not in (d_in, d_sae) and tuple(state["W_enc"].shape) != (d_in, d_sae):
        raise FormatError(
            probe.path, f"W_enc ({d_in}, {d_sae}) as the checkpoint says", str(tuple(state["W_enc"].shape))
        )
    width = state["b_dec"].shape[0]
    manifest = value.get("cache_manifest")
    manifest = manifest if isinstance(manifest, dict) else {}
    layer, hook = value.get("layer"), value.get("hook")
    return assemble(
        Found(
            format="jumprelu_pt",
            path=probe.path,
            trained=TrainedTensors(state["W_enc"], state["W_dec"], state["b_dec"], None, {"b_enc": state["b_enc"]}),
            architecture="jumprelu",
            threshold=state["log_threshold"].double().exp().float(),
            mean=statistic(probe.path, "normalization_mean", value["normalization_mean"], width),
            std=statistic(probe.path, "normalization_scale", value["normalization_scale"], width),
            keep_normalizer=True,
            count=int(manifest.get("total_tokens") or 0),
            layer=layer if isinstance(layer, int) else probe.name.layer,
            stage=probe.name.stage,
            hook=f"{layer}.{hook}" if isinstance(layer, int) and isinstance(hook, str) else None,
            base_model=manifest.get("model_id"),
            record={"training": _training(value)},
        ),
        choices,
    )


def _training(value: dict[str, Any]) -> dict[str, Any]:
    config = value.get("train_config")
    if not isinstance(config, dict):
        return {}
    names = {"learning_rate": "lr", "batch_size": "batch_size", "steps": "steps", "seed": "seed"}
    out: dict[str, Any] = {
        ours: config[theirs] for theirs, ours in names.items() if isinstance(config.get(theirs), (int, float))
    }
    if isinstance(config.get("l0_coefficient"), (int, float)):
        out["loss"] = f"mse + {config['l0_coefficient']:g} * L0"
    return out


FORMAT = Format(
    name="jumprelu_pt",
    title="JumpReLU checkpoint with normaliser",
    detect=detect,
    read=_read,
    suffixes=PICKLES,
    layout="`.pt`: `sae_state_dict`, `normalization_mean`, `normalization_scale`",
)
