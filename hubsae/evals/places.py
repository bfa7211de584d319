"""Whether an SAE is where it belongs: at its layer, in its model. A width that fits proves neither."""

from __future__ import annotations

import os
from typing import Any

from hubsae.core.errors import ConfigError, HookError
from hubsae.core.hooks import HookPoint
from hubsae.core.sae import SAE


def check_place(
    label: str, sae: SAE, hook: HookPoint | None, model: str | None, hook_out: HookPoint | None = None
) -> None:
    """Raise where an SAE's record names another layer or model; what is not recorded is not checked.

    A model in a folder has no id to compare. `hook_out` is where a transcoder's output is compared.

    >>> from hubsae.core.config import SAEConfig
    >>> sae = SAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> sae.metadata.hook.layer = 15
    >>> check_place("a", sae, HookPoint(8), None)
    Traceback (most recent call last):
    hubsae.core.errors.HookError: SAE 'a' was trained at layers.15, these activations are those of layers.8
      -> pass force=True (--force) to use it there all the same
    """
    base = sae.metadata.base_model.id
    again = "pass force=True (--force) to use it there all the same"
    for info, here, what in (
        (sae.metadata.hook, hook, "was trained at"),
        (sae.metadata.hook_out, hook_out, "predicts"),
    ):
        if here is None or info is None or info.layer is None:
            continue
        own = HookPoint.parse(f"{info.layer}.{info.kind}")
        if own != here:
            raise HookError(f"SAE {label!r} {what} {own.name}, these activations are those of {here.name}", hint=again)
    if base and model and not os.path.exists(model) and not os.path.exists(base) and base.lower() != model.lower():
        raise ConfigError(f"SAE {label!r} was trained on {base}, this is {model}", hint=again)


def check_target(label: str, sae: SAE, d_out: int | None) -> None:
    """Raise where a transcoder gets activations of one hook point, an autoencoder those of two, or widths differ."""
    if sae.config.is_transcoder and d_out is None:
        raise ConfigError(
            f"SAE {label!r} is a transcoder: it predicts another hook point than the one it reads",
            hint="measure it on both: harvested.pair('layers.3.mlp_in', 'layers.3.mlp_out'), or PairedActivations",
        )
    if d_out is not None and not sae.config.is_transcoder:
        raise ConfigError(f"SAE {label!r} is no transcoder, and these activations are pairs", hint="pass pairs.source")
    if d_out is not None and sae.config.width_out != d_out:
        raise ConfigError(f"the target has width {d_out}, SAE {label!r} gives {sae.config.width_out}")


def place_of(data: Any) -> tuple[HookPoint | None, str | None]:
    """The hook point and model that an activation dataset records; None where it does not say."""
    info = getattr(data, "info", None) or {}
    named = info.get("hook_point") or info.get("hook")
    return (HookPoint.parse(named) if named else None), info.get("model")
