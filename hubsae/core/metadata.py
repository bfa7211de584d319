"""The full record of one SAE, as it stands in metadata.json.

Everything a card states comes from here. What is not known is absent, never guessed. Keys that a newer
version wrote are kept and warned about once; a required key that is missing is named.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hubsae.core.config import SAEConfig
from hubsae.core.errors import MetadataError
from hubsae.core.files import read_json, write_json_atomic
from hubsae.core.scopes import excluding
from hubsae.core.settings import problems

FORMAT_VERSION = 1
FILE_NAME = "metadata.json"


class Section(BaseModel):
    """A part of the record; unknown keys are kept, so that a newer file survives a load and save."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)


class BaseModelInfo(Section):
    """The language model, and which state of it."""

    id: str | None = Field(default=None, description="Model id on the Hub, such as Qwen/Qwen2.5-0.5B-Instruct.")
    revision: str | None = Field(default=None, description="Commit the activations were taken from.")
    stage: str | None = Field(default=None, description="Name of the checkpoint, such as ppo_step116.")
    step: int | None = Field(default=None, description="Training step of the checkpoint.")
    adapter: str | None = Field(default=None, description="Adapter (repo or folder) applied to the base model.")
    merge_dtype: str | None = Field(default=None, description="Type in which the adapter was merged.")
    dtype: str | None = Field(default=None, description="Type the model ran in while harvesting.")


class HookInfo(Section):
    """Where in the model the SAE reads."""

    layer: int | None = Field(default=None, description="0-based block.")
    kind: str = Field(
        default="resid_post",
        description="A place (resid_post, resid_pre, resid_mid, mlp_in, mlp_norm, mlp_out, attn_z, attn_out, embed), "
        "a module of the block with its side (mlp.down_proj.input), or other.",
    )
    module_path: str | None = Field(default=None, description="Module to hook, such as model.layers.18.")
    transformer_lens: str | None = Field(default=None, description="Such as blocks.18.hook_resid_post.")
    final_norm: Literal["before", "after"] | None = Field(
        default="before", description="Which side of the model's final norm the activations are on."
    )
    context_size: int | None = Field(default=None, description="Longest sequence the model saw while harvesting.")
    prepend_bos: bool | None = Field(default=None, description="Whether a BOS token was put in front.")


class NormalizerInfo(Section):
    """Input normalisation in training. Statistics themselves lie in normalizer.safetensors."""

    kind: Literal["none", "mean_std", "scalar", "layer_norm", "unit_norm", "constant_norm"] = "none"
    folded: bool = Field(default=False, description="True where the weights already contain it.")
    file: str | None = Field(default=None, description="File with mean and std, where kept.")
    note: str | None = None


class DecoderFlags(Section):
    """How the source's tensors were read; the canonical tensors no longer depend on it."""

    decode_adds_b_pre: bool | None = Field(default=None, description="Whether the source adds its pre-bias back.")
    encoder_orientation: str | None = Field(default=None, description="Layout of the source's encoder matrix.")
    decoder_orientation: str | None = Field(default=None, description="Layout of the source's decoder matrix.")
    overridden: list[str] = Field(default_factory=list, description="Choices a person made against the reader.")


class WarmStart(Section):
    """The SAE this one's training started from."""

    id: str | None = None
    sha256: str | None = Field(default=None, description="sha256 of the parent's weights file.")


class TrainingInfo(Section):
    """How the SAE was trained."""

    tokens: int | None = None
    steps: int | None = None
    epochs: float | None = None
    optimizer: str | None = None
    lr: float | None = None
    lr_schedule: str | None = None
    batch_size: int | None = None
    seed: int | None = None
    loss: str | None = None
    aux_loss: str | None = None
    dead_rule: str | None = None
    resampling: str | None = None
    warm_start: WarmStart | None = None
    split: str | None = None
    selection: str | None = Field(default=None, description="How the published checkpoint was chosen.")
    exclude: list[str] = Field(
        default_factory=list, description="Groups of tokens left out in training: position_0, special, massive, ..."
    )
    massive_above: float | None = Field(default=None, description="Norm above which a token counts as massive.")


class ActivationInfo(Section):
    """The activations it was trained on."""

    id: str | None = Field(default=None, description="Dataset id on the Hub.")
    revision: str | None = None
    config: str | None = None
    mode: str | None = Field(default=None, description="prompt, prompt+response, text, ...")
    text_dataset: str | None = Field(default=None, description="Dataset the texts came from.")
    tokens: int | None = None


class Metric(Section):
    """One number, with what is needed to compare it with another."""

    name: str = Field(description="Name of the metric, as defined in the docs.")
    value: float
    definition: str | None = Field(default=None, description="The formula, in one line.")
    n_tokens: int | None = Field(default=None, description="Tokens it was computed on.")
    scope: str | None = Field(default=None, description="Which tokens: all, not position_0, prompt, ...")
    interval: tuple[float, float] | None = Field(default=None, description="Confidence interval.")
    interval_kind: str | None = Field(default=None, description="Such as: 95 % bootstrap over prompts.")
    source: str | None = Field(default=None, description="hubsae, or whoever published the number.")

    @field_validator("value")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("a metric must be finite; leave it out where it is not defined")
        return value


class Provenance(Section):
    """Where the file came from and what made it."""

    source_file: str | None = None
    source_sha256: str | None = None
    source_format: str | None = None
    converter: str | None = Field(default=None, description="Program and version that wrote this folder.")
    versions: dict[str, str] = Field(default_factory=dict)
    command: str | None = None
    created: str | None = Field(default=None, description="ISO 8601 time, UTC.")
    weights_sha256: str | None = None
    registered: dict[str, Any] | None = Field(
        default=None, description="What SAELens' register said of it, where it was loaded by its name there."
    )


class Metadata(Section):
    """Everything known about one SAE.

    >>> m = Metadata(config=SAEConfig(architecture="topk", d_in=8, d_sae=32, k=4))
    >>> Metadata.from_dict(m.to_dict()) == m
    True
    """

    hubsae_format: int = Field(default=FORMAT_VERSION, ge=1, description="Version of this schema.")
    id: str | None = Field(default=None, description="Id of the SAE inside its release: its folder path.")
    config: SAEConfig
    base_model: BaseModelInfo = Field(default_factory=BaseModelInfo)
    hook: HookInfo = Field(default_factory=HookInfo)
    hook_out: HookInfo | None = Field(default=None, description="Transcoders: where what they predict lies.")
    normalizer: NormalizerInfo = Field(default_factory=NormalizerInfo)
    decoder: DecoderFlags = Field(default_factory=DecoderFlags)
    training: TrainingInfo = Field(default_factory=TrainingInfo)
    activations: ActivationInfo = Field(default_factory=ActivationInfo)
    metrics: list[Metric] = Field(default_factory=list)
    saelens: dict[str, Any] | None = Field(
        default=None,
        description="What a SAELens config says beyond this record (cfg, metadata); written back.",
    )
    provenance: Provenance = Field(default_factory=Provenance)

    @property
    def own_scope(self) -> str:
        """The tokens this SAE is for, as a scope: what its training left out is left out; `all` where that is nothing.

        >>> m = Metadata(config=SAEConfig(architecture="topk", d_in=8, d_sae=32, k=4))
        >>> m.training.exclude = ["position_0"]
        >>> m.own_scope
        'not position_0'
        """
        return excluding(self.training.exclude).name

    @property
    def own_metrics(self) -> list[Metric]:
        """The metrics of the tokens this SAE is for: the headline. One that names no scope counts as of all tokens."""
        own = self.own_scope
        return [m for m in self.metrics if (m.scope or "all") == own]

    def metric(self, name: str, scope: str | None = None) -> float | None:
        """The value of a metric, or None where it is not recorded."""
        for metric in self.metrics:
            if metric.name == name and scope in (None, metric.scope):
                return metric.value
        return None

    def set_metrics(self, metrics: list[Metric]) -> None:
        """Add metrics; one with the same name and scope takes the place of the old one."""
        fresh = {(m.name, m.scope) for m in metrics}
        self.metrics = [m for m in self.metrics if (m.name, m.scope) not in fresh] + list(metrics)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, without what is not known."""
        return self.model_dump(mode="json", exclude_none=True)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write metadata.json into a folder, whole or not at all."""
        return write_json_atomic(Path(folder) / FILE_NAME, self.to_dict())

    @classmethod
    def from_dict(cls, data: Any, *, where: str | os.PathLike[str] = FILE_NAME) -> Metadata:
        """Check and read; `where` is named in errors."""
        if not isinstance(data, dict):
            raise MetadataError(f"{where}: expected an object, found {type(data).__name__}")
        known = {key: value for key, value in data.items() if value is not None}  # null and absent mean the same
        try:
            return cls.model_validate(_tolerant(known, where))
        except ValidationError as error:
            raise MetadataError(f"{where}: {describe_validation(error)}") from error

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Metadata:
        """Read metadata.json of a folder (or the file itself)."""
        path = Path(folder)
        path = path / FILE_NAME if path.is_dir() else path
        return cls.from_dict(read_json(path), where=path)


def _tolerant(data: dict[str, Any], where: str | os.PathLike[str]) -> dict[str, Any]:
    version = data.get("hubsae_format")
    if not isinstance(version, int) or version <= FORMAT_VERSION:
        return data
    warnings.warn(
        f"{where} was written in metadata format {version}; this hubsae knows {FORMAT_VERSION}. "
        "Unknown keys are kept unread: pip install -U hubsae to read them.",
        stacklevel=4,
    )
    config = data.get("config")
    if isinstance(config, dict):
        # SAEConfig refuses unknown keys because each may change the numbers; say which one it is
        unknown = sorted(set(config) - set(SAEConfig.model_fields))
        if unknown:
            raise MetadataError(
                f"{where}: config has {', '.join(unknown)}, which this version does not know and which may change "
                "what the SAE computes",
                hint="pip install -U hubsae",
            )
    return data


def describe_validation(error: ValidationError) -> str:
    """A pydantic error as one line."""
    return "; ".join(problems(error))


def json_schema() -> dict[str, Any]:
    """The JSON schema of metadata.json, as published in the docs."""
    schema = Metadata.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "hubsae metadata.json"
    return schema
