"""What is no SAE or transcoder of the canonical form: recognised, and refused by name with the tool that loads it."""

from __future__ import annotations

from collections.abc import Callable

from hubsae.core.errors import FormatError
from hubsae.core.sae import SAE
from hubsae.formats.base import Files, Format, Overrides, Probe


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
