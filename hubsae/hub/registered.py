"""SAELens' register of published SAEs, read as data: where each lies, and what its files do not say.

The register is the file `pretrained_saes.yaml` of an installed SAELens; SAELens itself, which takes seconds to import,
is not. What it adds to the files (a norm factor, another normalisation, the Neuronpedia id, how the model was loaded)
is applied as SAELens applies it, and kept in the record.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from hubsae.core.errors import ConfigError, HookError, HubSAEError, NotFoundError, nearest
from hubsae.core.files import read_json
from hubsae.core.hooks import HookPoint
from hubsae.core.sae import SAE
from hubsae.formats import saelens
from hubsae.formats.detection import SUFFIXES
from hubsae.formats.names import parse_path

REGISTER = "pretrained_saes.yaml"
FILE_SUFFIXES = (*SUFFIXES, ".json")
"""What ends like this is a file, not the name of a release."""
HINT = "pip install 'hubsae[saelens]'"
_NAME = re.compile(r"^([\w.-]+):[ \t]*$", re.MULTILINE)
# ids begin with the hook point in many releases; a width or a trainer may follow
_HOOK = re.compile(r"blocks\.\d+\.(?:attn\.)?hook_(?:resid_pre|resid_mid|resid_post|mlp_out|attn_out|z)")


@dataclass(frozen=True)
class Registered:
    """One SAE of the register."""

    release: str
    id: str
    repo_id: str
    path: str
    """Folder or file in the repo."""
    model: str
    layout: str | None
    """SAELens' name of how its files are laid out; None for its own layout."""
    norm_factor: float | None = None
    """What activations were multiplied by in training, where the file says that they were."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Keys that take the place of those in the file's config."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else the register says: l0, variance_explained ..."""

    @property
    def hook(self) -> str | None:
        """The hook point that the id begins with, where it does.

        >>> Registered("r", "blocks.8.hook_resid_pre_768", "me/r", "a", "gpt2-small", None).hook
        'blocks.8.hook_resid_pre'
        """
        match = _HOOK.match(self.id)
        if match is not None:
            with suppress(HookError):
                HookPoint.parse(match[0])
                return match[0]
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of it without its files."""
        layer = HookPoint.parse(self.hook).layer if self.hook else parse_path(self.path).layer
        known: dict[str, Any] = {"base_model": saelens.hub_id(self.model)}
        return known if layer is None else known | {"layer": layer}

    def choices(self, path: Path) -> dict[str, Any]:
        """Choices for the reader of its files, as SAELens would read them: the norm factor, overrides, the model."""
        if self.layout is not None:
            # readers of other layouts find the scale of the activations in the files
            said = {"base_model": saelens.hub_id(self.model), "hook": self.hook}
            return {name: value for name, value in said.items() if value is not None}
        config = path / saelens.CFG_NAME
        own = read_json(config) if config.is_file() else {}
        norm = self.overrides.get("normalize_activations")
        chosen: dict[str, Any] = {}
        if norm == "none" or norm in saelens.TOKEN_NORMS:
            chosen["token_norm"] = saelens.TOKEN_NORMS.get(norm, "none")
        elif norm not in (None, *saelens.EXPECT_FOLDED):
            raise ConfigError(f"{self.release} is registered with normalize_activations {norm!r}, which is not known")
        effective = own.get("normalize_activations") if norm is None else norm
        if effective == "expected_average_only_in" and self.norm_factor is not None:
            chosen["input_scale"] = self.norm_factor
        return chosen

    def record(self, sae: SAE, commit: str | None) -> None:
        """Complete the record of the SAE: its names, its dashboard, how its model was loaded."""
        meta = sae.metadata
        about = {"release": self.release, "id": self.id, "repo": self.repo_id, "path": self.path, "commit": commit}
        if self.norm_factor is not None:
            about["norm_scaling_factor"] = self.norm_factor
        overrides = {name: value for name, value in self.overrides.items() if name != "neuronpedia_id"}
        if overrides:
            about["config_overrides"] = overrides
        meta.provenance.registered = {n: v for n, v in (about | dict(self.more)).items() if v is not None}
        if meta.base_model.id is None:
            meta.base_model.id = saelens.hub_id(self.model)
        if isinstance(texts := overrides.pop("dataset_path", None), str):
            meta.activations.text_dataset = texts
        # the normalisation is in the config by now, under a name that cfg.json gets when it is written
        overrides.pop("normalize_activations", None)
        if neuronpedia := self.overrides.get("neuronpedia_id"):
            overrides["neuronpedia_id"] = neuronpedia
        if overrides:
            kept = dict(meta.saelens or {})
            kept["metadata"] = {**(kept.get("metadata") or {}), **overrides}
            meta.saelens = kept


@dataclass(frozen=True)
class Release:
    """A named set of SAEs in one repo."""

    name: str
    repo_id: str
    model: str
    saes: tuple[Registered, ...]


def register_file() -> Path | None:
    """The register of the SAELens that is installed, which is not imported; None without one."""
    spec = find_spec("sae_lens")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((file for place in places if (file := Path(place) / REGISTER).is_file()), None)


def release(name: str) -> Release:
    """The release of that name, or an error with the nearest ones."""
    file = register_file()
    if file is None:
        raise NotFoundError(
            f"there is no folder or file {name!r}; names of registered releases need SAELens, which is not installed",
            hint=f"{HINT}; a repo on the Hub is owner/name",
        )
    blocks = _blocks(file)
    if name not in blocks:
        raise NotFoundError(
            f"there is no folder, file or registered release {name!r}",
            hint=f"nearest registered: {nearest(name, blocks)}; a repo on the Hub is owner/name",
        )
    return _parse(blocks[name])[name]


def releases() -> list[Release]:
    """Every release of the register, none where SAELens is not installed; seconds, for it has thousands of SAEs."""
    file = register_file()
    return [] if file is None else list(_all(file).values())


def is_name(text: str | os.PathLike[str]) -> bool:
    """Whether it can only be the name of a release: neither a path, nor a file, nor `owner/name`.

    >>> is_name("gpt2-small-res-jb"), is_name("me/saes"), is_name("sae.pt")
    (True, False, False)
    """
    named = isinstance(text, str) and re.fullmatch(r"\w[\w.-]*(@.+)?", text) is not None
    return named and not str(text).endswith(FILE_SUFFIXES)


@cache
def _blocks(file: Path) -> dict[str, str]:
    """The text of each release, which begins at the left margin: one is parsed in a moment, all in seconds."""
    text = file.read_text(encoding="utf-8")
    starts = list(_NAME.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {match[1]: text[match.start() : end] for match, end in zip(starts, ends, strict=True)}


@cache
def _all(file: Path) -> dict[str, Release]:
    return _parse(file.read_text(encoding="utf-8"))


def _parse(text: str) -> dict[str, Release]:
    content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        return {name: _release(name, about) for name, about in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HubSAEError(
            f"the register of the installed SAELens is laid out in a way that is not known ({error!r})",
            hint="pip install -U hubsae; meanwhile give the repo and the path in it",
        ) from error


def _release(name: str, about: dict[str, Any]) -> Release:
    common, model, repo = about.get("config_overrides") or {}, about["model"], about["repo_id"]
    saes = []
    for sae in about["saes"]:
        factor, neuronpedia = sae.get("norm_scaling_factor"), sae.get("neuronpedia")
        own = {"neuronpedia_id": neuronpedia} if neuronpedia else {}
        more = {k: sae[k] for k in ("l0", "variance_explained") if k in sae}
        saes.append(
            Registered(
                name, str(sae["id"]), repo, str(sae["path"]), model, about.get("conversion_func"),
                None if factor is None else float(factor), {**common, **own}, more,
            )
        )  # fmt: skip
    return Release(name, repo, model, tuple(saes))
