"""What is no SAE or transcoder of the canonical form: recognised, and refused by name with the tool that loads it."""

from __future__ import annotations

from collections.abc import Callable

from hubsae.core.errors import FormatError
from hubsae.core.sae import SAE
from hubsae.formats.base import Files, Format, Overrides, Probe
from hubsae.formats.cross_layer import is_cross_layer


def _refuse(what: str, tool: str) -> Callable[[Probe, Overrides], SAE]:
    def read(probe: Probe, choices: Overrides) -> SAE:
        raise FormatError(probe.path, "an SAE or a transcoder of one layer", what, hint=f"load it with {tool}")

    return read


def _temporal(probe: Probe) -> str | None:
    fits = probe.is_dir and {"conf.yaml", "latest_ckpt.safetensors"} <= probe.names
    return "conf.yaml beside latest_ckpt.safetensors" if fits else None


TEMPORAL = Format(
    name="temporal",
    title="temporal SAE (refused)",
    detect=_temporal,
    read=_refuse("a temporal SAE, which attends over the tokens before", "SAELens (TemporalSAE)"),
    files=(Files(("conf.yaml", "latest_ckpt.safetensors")),),
    layout="`conf.yaml`, `latest_ckpt.safetensors`",
)

CROSS_LAYER = Format(
    name="cross_layer",
    title="cross-layer transcoder (read whole)",
    detect=lambda probe: "a layer of a cross-layer transcoder" if is_cross_layer(probe) else None,
    read=_refuse(
        "a cross-layer transcoder, whose latents write to many layers",
        "hubsae.read_cross_layer(folder), which makes one object of all its layers; or with circuit-tracer",
    ),
    suffixes=(".safetensors",),
    covers=frozenset({"gemma_scope", "pt"}),
    layout="`W_enc_{N}.safetensors`, `W_dec_{N}.safetensors`; `layer_{N}.safetensors` of Gemma Scope 2",
)
