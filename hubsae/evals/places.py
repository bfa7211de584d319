"""Whether an SAE is where it belongs: at its layer, in its model. A width that fits proves neither."""

from __future__ import annotations

import os
from typing import Any

from hubsae.core.errors import ConfigError, HookError
from hubsae.core.hooks import HookPoint
from hubsae.core.sae import SAE


def check_place(label: str, sae: SAE, hook: HookPoint | None, model: str | None) -> None:
    """Raise where an SAE's record names another layer or model; what is not recorded is not checked.

    A model in a folder has no id to compare.

    >>> from hubsae.core.config import SAEConfig
    >>> sae = SAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> sae.metadata.hook.layer = 15
    >>> check_place("a", sae, HookPoint(8), None)
    Traceback (most recent call last):
    hubsae.core.errors.HookError: SAE 'a' was trained at layers.15, these activations are those of layers.8
      -> pass force=True (--force) to use it there all the same
    """
    info, base = sae.metadata.hook, sae.metadata.base_model.id
    again = "pass force=True (--force) to use it there all the same"
    if hook is not None and info.layer is not None:
        own = HookPoint.parse(f"{info.layer}.{info.kind}")
        if own != hook:
            raise HookError(
                f"SAE {label!r} was trained at {own.name}, these activations are those of {hook.name}", hint=again
            )
    if base and model and not os.path.exists(model) and not os.path.exists(base) and base.lower() != model.lower():
        raise ConfigError(f"SAE {label!r} was trained on {base}, this is {model}", hint=again)


def place_of(data: Any) -> tuple[HookPoint | None, str | None]:
    """The hook point and model that an activation dataset records; None where it does not say."""
    info = getattr(data, "info", None) or {}
    named = info.get("hook_point") or info.get("hook")
    return (HookPoint.parse(named) if named else None), info.get("model")
