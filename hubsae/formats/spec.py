"""hubsae.yaml: what a person knows about a folder of SAE files and the files do not say.

base_model: Qwen/Qwen2.5-0.5B-Instruct
hook: model.layers.{layer}
license: apache-2.0
files:
  "*_layer23.pt": {choices: {k: 256}}
  "scratch.pt": {skip: true}
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.metadata import describe_validation
from hubsae.formats.base import Overrides
from hubsae.formats.tensors import read_small_yaml

SPEC_NAME = "hubsae.yaml"
MAX_BYTES = 1 << 20


def _known_choices(value: dict[str, Any]) -> dict[str, Any]:
    try:
        Overrides.of(value)
    except ConfigError as error:
        raise ValueError(f"{error.message}; {error.hint}") from error
    return value


Choices = Annotated[dict[str, Any], AfterValidator(_known_choices)]


class FileRule(BaseModel):
    """What holds for the files a pattern names."""

    model_config = ConfigDict(extra="forbid")

    skip: bool = False
    id: str | None = None
    format: str | None = None
    layer: int | None = None
    stage: str | None = None
    hook: str | None = None
    choices: Choices = Field(default_factory=dict)


class PackageSpec(BaseModel):
    """The content of hubsae.yaml; flags and arguments of the same names win over it.

    >>> PackageSpec(base_model="Qwen/Qwen3-8B").updated(PackageSpec(hook="layers.{layer}")).hook
    'layers.{layer}'
    """

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    hook: str | None = Field(default=None, description="Hook point; {layer} stands for the layer of each file.")
    license: str | None = None
    datasets: list[str] = Field(default_factory=list)
    description: str | None = None
    pattern: str | None = Field(default=None, description="Naming scheme, such as {stage}_L{layer}_k{k}.pt.")
    format: str | None = None
    choices: Choices = Field(default_factory=dict, description="Choices for every reader, such as k.")
    training: dict[str, Any] = Field(default_factory=dict)
    activations: dict[str, Any] = Field(default_factory=dict)
    hook_record: dict[str, Any] = Field(default_factory=dict, description="context_size, prepend_bos.")
    mixed_widths: bool = Field(default=False, description="Allow SAEs of different d_in in one release.")
    files: dict[str, FileRule] = Field(default_factory=dict, description="Rules by file pattern.")

    @field_validator("datasets", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @staticmethod
    def of(given: Mapping[str, Any], **more: Any) -> PackageSpec:
        """What a caller was given (its `locals()`) under the names of the fields; `more` wins, None means not given."""
        named = {name: value for name, value in given.items() if name in PackageSpec.model_fields} | more
        return _checked({name: value for name, value in named.items() if value is not None})

    def updated(self, given: PackageSpec) -> PackageSpec:
        """The same with what is given in place of what this one says; mappings are merged."""
        merged = dict(self)
        for name in given.model_fields_set:
            value = getattr(given, name)
            merged[name] = {**merged[name], **value} if isinstance(value, dict) else value
        return PackageSpec(**merged)

    def rule_for(self, path: str) -> FileRule:
        """All rules whose pattern fits a path or its name, later ones winning."""
        merged: dict[str, Any] = {}
        for pattern, rule in self.files.items():
            if fnmatchcase(path, pattern) or fnmatchcase(path.rpartition("/")[2], pattern):
                new = rule.model_dump(exclude_unset=True)
                if "choices" in new:
                    new["choices"] = {**merged.get("choices", {}), **new["choices"]}
                merged |= new
        return FileRule(**merged)

    def manifest_fields(self) -> dict[str, Any]:
        """What of it belongs into the manifest."""
        names = ("base_model", "base_model_revision", "license", "datasets", "description")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @staticmethod
    def beside(folder: Path) -> PackageSpec:
        """hubsae.yaml of a folder, or an empty one."""
        file = folder / SPEC_NAME
        return PackageSpec.read(file) if file.is_file() else PackageSpec()

    @staticmethod
    def read(file: str | Path) -> PackageSpec:
        """Read a hubsae.yaml."""
        file = Path(file)
        empty = file.is_file() and not file.stat().st_size
        data = {} if empty else read_small_yaml(file, MAX_BYTES) or {}
        if not isinstance(data, dict):
            raise FormatError(file, "a mapping", type(data).__name__)
        return _checked(data, f"{file}: ")


def _checked(data: dict[str, Any], where: str = "") -> PackageSpec:
    try:
        return PackageSpec.model_validate(data)
    except ValidationError as error:
        fields = ", ".join(PackageSpec.model_fields)
        raise ConfigError(f"{where}{describe_validation(error)}", hint=f"fields: {fields}") from error
