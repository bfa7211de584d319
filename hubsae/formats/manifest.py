"""The release manifest: the `config.json` at the root of a release, which lists every SAE and every file.

It is the first file a loader asks for (and the request the Hub counts as a download), so it holds what is
needed to choose an SAE without opening its folder: shape, selection rule, hook point, base model, headline
metrics, and size and sha256 of each file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hubsae.core.errors import FormatError, MetadataError
from hubsae.core.files import json_text, safe_join, sha256_file, write_text_atomic
from hubsae.core.metadata import Metadata, describe_validation
from hubsae.core.text import printable
from hubsae.formats.select import FILTERS
from hubsae.formats.tensors import read_small_json
from hubsae.version import __version__

MANIFEST_NAME = "config.json"
FORMAT_VERSION = 1
KIND = "hubsae-release"


class ManifestWarning(UserWarning):
    """A manifest holds something this version does not know; it is kept as it is."""


# Ordinary relative paths, told by one match: a manifest of hundreds of SAEs is checked in no time.
_ORDINARY = re.compile(r"(?!.*\.\.)[\w+=@,.-]+(?:/[\w+=@,.-]+)*")


def _checked_path(value: str) -> str:
    if _ORDINARY.fullmatch(value):
        return value
    if printable(value) != value:
        raise ValueError(f"control or invisible characters in {printable(value, 80)}; ids and paths are plain text")
    if not value:
        raise ValueError('a path must not be empty; "." is the root of the release')
    try:
        safe_join("release", value)
    except FormatError as error:
        raise ValueError(str(error)) from error
    return value


PathInside = Annotated[str, AfterValidator(_checked_path)]


class _Part(BaseModel):
    # keys a newer version added are kept and written back; `Manifest.read` warns about them once
    model_config = ConfigDict(extra="allow")


class FileEntry(_Part):
    """One file of a release.

    >>> FileEntry(path="results/eval.csv", size=12, sha256="0" * 64).path
    'results/eval.csv'
    """

    path: PathInside = Field(description="Path from the root of the release, with forward slashes.")
    size: int = Field(ge=0, description="Bytes.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Hash of the bytes, in hex.")

    @staticmethod
    def of(root: str | PathLike[str], path: str) -> FileEntry:
        """Describe the file at `root/path` by reading it."""
        file = safe_join(root, path)
        return FileEntry(path=path, size=file.stat().st_size, sha256=sha256_file(file))


class SAEEntry(_Part):
    """One SAE of a release: what a person chooses by, and its files."""

    id: PathInside = Field(description="Name by which this SAE is asked for; the path of its folder unless given.")
    path: PathInside = Field(description='Its folder, from the root of the release; "." when it lies at the root.')
    layer: int | None = Field(default=None, ge=0, description="Index of the block, from 0.")
    stage: str | None = Field(default=None, description="Checkpoint of the base model, such as ppo_step116.")
    architecture: str = Field(description="Selection rule: relu, topk, batch_topk, jumprelu or gated.")
    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=1)
    k: int | None = Field(default=None, ge=1)
    hook_point: str | None = Field(default=None, description="Module path, such as model.layers.18.")
    base_model: str | None = None
    base_model_revision: str | None = None
    scope: str | None = Field(default=None, description="The tokens it is for, where that is not all of them.")
    metrics: dict[str, float] = Field(
        default_factory=dict, description="Metrics by name; those of a scope that is not all tokens as name@scope."
    )
    files: list[FileEntry] = Field(default_factory=list)

    @staticmethod
    def known_from(record: Metadata) -> dict[str, Any]:
        """What an SAE's record says of it, by the fields of an entry."""
        config, base, hook = record.config, record.base_model, record.hook
        return {
            "layer": hook.layer,
            "stage": base.stage,
            "architecture": config.architecture,
            "d_in": config.d_in,
            "d_sae": config.d_sae,
            "k": config.k,
            "hook_point": hook.module_path or hook.transformer_lens,
            "base_model": base.id,
            "base_model_revision": base.revision,
            "scope": None if record.own_scope == "all" else record.own_scope,
            "metrics": {m.name if m.scope in (None, "all") else f"{m.name}@{m.scope}": m.value for m in record.metrics},
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What it can be chosen by."""
        return {name: value for name in FILTERS if (value := getattr(self, name)) is not None}

    @property
    def certain(self) -> bool:
        """The manifest knows: what it leaves out is not so."""
        return True

    def row(self) -> dict[str, Any]:
        """The entry as one row of a table, without its files; metrics become columns."""
        keep = ("id", "layer", "stage", "architecture", "d_in", "d_sae", "k", "hook_point", "scope")
        size = {"bytes": sum(file.size for file in self.files)}
        return {name: getattr(self, name) for name in keep} | dict(self.metrics) | size


class Manifest(_Part):
    """Everything a release says about itself at its root.

    >>> m = Manifest(name="demo", saes=[SAEEntry(id="a", path="a", architecture="topk", d_in=4, d_sae=8, k=2)])
    >>> [entry.id for entry in m]
    ['a']
    """

    format_version: int = Field(default=FORMAT_VERSION, ge=1)
    kind: Literal["hubsae-release"] = KIND
    library_name: str = "hubsae"
    library_version: str = __version__
    name: str
    base_model: str | None = None
    base_model_revision: str | None = None
    license: str | None = None
    datasets: list[str] = Field(default_factory=list, description="Hub ids of the datasets that were used.")
    description: str | None = None
    limitations: list[str] | None = Field(default=None, description="What its card says of its limits.")
    card: str | None = Field(default=None, description="Template of its card; by default what it holds decides.")
    saes: list[SAEEntry]
    files: list[FileEntry] = Field(default_factory=list, description="Files that belong to no single SAE.")

    def __iter__(self) -> Iterator[SAEEntry]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return iter(self.saes)

    def __len__(self) -> int:
        return len(self.saes)

    @property
    def all_files(self) -> list[FileEntry]:
        """Every file of the release but the manifest itself."""
        return [file for entry in self.saes for file in entry.files] + list(self.files)

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json_text(self.model_dump(mode="json", exclude_none=True))

    def write(self, root: str | PathLike[str]) -> Path:
        """Write `config.json` into `root`, whole or not at all."""
        return write_text_atomic(Path(root) / MANIFEST_NAME, self.to_json())

    @staticmethod
    def is_manifest(value: Any) -> bool:
        """Whether parsed JSON is meant to be a release manifest."""
        return isinstance(value, dict) and value.get("kind") == KIND

    @staticmethod
    def lies_in(folder: Path) -> bool:
        """Whether a folder is a release."""
        file = folder / MANIFEST_NAME
        return file.is_file() and Manifest.is_manifest(read_small_json(file))

    @staticmethod
    def read(path: str | PathLike[str]) -> Manifest:
        """Read a manifest, from its file or from the folder it lies in."""
        file = Path(path)
        file = file / MANIFEST_NAME if file.is_dir() else file
        return Manifest.parse(read_small_json(file), file)

    @staticmethod
    def parse(value: Any, path: str | PathLike[str] = MANIFEST_NAME) -> Manifest:
        """Check parsed JSON; `path` is only named in errors."""
        if not Manifest.is_manifest(value):
            found = f"kind {value.get('kind')!r}" if isinstance(value, dict) else type(value).__name__
            raise FormatError(
                path,
                f'a release manifest (JSON with "kind": "{KIND}")',
                found,
                hint="`hubsae show PATH` tells what this is; `hubsae package` makes a release",
            )
        try:
            manifest = Manifest.model_validate(value)
        except ValidationError as error:
            raise MetadataError(
                f"{path}: {describe_validation(error)}",
                hint="the manifest is incomplete or damaged; write it again with `hubsae package`",
            ) from error
        manifest._check_unique(path)
        unknown = sorted(unknown_keys(manifest))
        if unknown or manifest.format_version > FORMAT_VERSION:
            newer = f"format version {manifest.format_version}, this hubsae knows {FORMAT_VERSION}"
            warnings.warn(
                f"{path}: {newer if manifest.format_version > FORMAT_VERSION else 'unknown keys'}"
                + (f"; kept as they are: {', '.join(unknown)}" if unknown else ""),
                ManifestWarning,
                stacklevel=2,
            )
        return manifest

    def _check_unique(self, path: str | PathLike[str]) -> None:
        for what, values in (("id", [e.id for e in self.saes]), ("path", [e.path for e in self.saes])):
            twice = {value for value in values if values.count(value) > 1} if len(set(values)) < len(values) else set()
            if twice:
                raise MetadataError(f"{path}: the {what} {sorted(twice)[0]!r} is used by more than one SAE")


def unknown_keys(part: BaseModel, prefix: str = "") -> set[str]:
    """Keys of a parsed model that this version has no field for, with dots between levels."""
    found = {f"{prefix}{name}" for name in part.model_extra or {}}
    for name in type(part).model_fields:
        value = getattr(part, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                found |= unknown_keys(item, f"{prefix}{name}.")
    return found


def manifest_schema() -> dict[str, Any]:
    """JSON schema of the manifest."""
    return Manifest.model_json_schema()
