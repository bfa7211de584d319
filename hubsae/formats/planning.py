"""What a package of a folder will hold: which files are SAEs, how each is read, and what it will be called.

Nothing is written and no weights are read. What cannot be told from content, names or hubsae.yaml is asked for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.text import natural_key
from hubsae.formats.base import Probe
from hubsae.formats.detection import MAPPED, choose, looks_like, may_hold_weights, readings_of
from hubsae.formats.manifest import Manifest
from hubsae.formats.names import NameInfo, NamePattern, parse_name, parse_path, stem_of
from hubsae.formats.spec import SPEC_NAME, PackageSpec

IMAGE_SUFFIXES = (".png", ".svg", ".jpg")


class PackageWarning(UserWarning):
    """Something was left out of a package, or taken in a way worth knowing."""


@dataclass
class PlannedSAE:
    """One SAE that will be written."""

    source: Path
    format: str
    why: str
    id: str
    info: NameInfo
    """What its name says."""
    choices: dict[str, Any]
    """What is passed to its reader."""
    size: int
    sha256: str | None = None
    """Hash of its weights file, once it was read."""


@dataclass
class PackagePlan:
    """What a package will hold."""

    source: Path
    spec: PackageSpec
    name: str
    saes: list[PlannedSAE]
    results: list[Path] = field(default_factory=list)
    plots: list[Path] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    """Files that are not SAEs, and why they were not taken."""

    @property
    def root(self) -> Path:
        """The folder whose files are looked at."""
        return self.source if self.source.is_dir() else self.source.parent


def plan(
    source: str | os.PathLike[str],
    given: PackageSpec | None = None,
    *,
    spec: PackageSpec | None = None,
    prefix: bool = True,
) -> PackagePlan:
    """Look at a folder and say what a package of it will hold; nothing is written and no weights are read.

    `spec` is the hubsae.yaml, the one beside the files unless another is passed; what is `given` wins over it.
    Ids begin with the name of the folder, or, without `prefix`, are the places of the files in it.
    """
    source = Path(source)
    if not source.exists():
        raise FormatError(source, "a folder of SAE files", "nothing at that path")
    if source.is_dir() and Manifest.lies_in(source):
        raise FormatError(
            source, "a folder of SAE files", "a release", hint="it is packaged already: `hubsae push` publishes it"
        )
    out = PackagePlan(source, PackageSpec(), "", [])
    out.spec = (spec if spec is not None else PackageSpec.beside(out.root)).updated(given or PackageSpec())
    out.name = out.spec.name or (source.resolve().name if source.is_dir() else stem_of(source.name))
    pattern = NamePattern(out.spec.pattern) if out.spec.pattern else None
    if source.is_dir():
        _walk(source, out, pattern)
    else:
        _take(source, out, pattern)
    if not out.saes:
        seen = ", ".join(f"{path.name}: {why}" if path.is_symlink() else path.name for path, why in out.left_out[:5])
        raise FormatError(
            source,
            "SAE files in a known format",
            f"none ({seen})" if seen else "an empty folder" if not any(out.root.iterdir()) else "none",
            hint="`hubsae show FILE` says how a file is read; --format and hubsae.yaml force a reading",
        )
    _name_them(out, prefix)
    return out


def _walk(folder: Path, out: PackagePlan, pattern: NamePattern | None) -> None:
    if _take(folder, out, pattern):
        return
    for item in sorted(folder.iterdir()):
        if item.name.startswith(".") or item.name == SPEC_NAME:
            continue
        if item.is_symlink() and (item.is_dir() or not belongs(item, out.root)):
            where = "to a folder" if item.is_dir() else "that leads out of the folder"
            out.left_out.append((item, f"a link {where}, {item.resolve()}"))
        elif item.is_dir():
            _walk(item, out, pattern)
        elif may_hold_weights(item):
            _take(item, out, pattern)
        elif item.suffix == ".csv":
            out.results.append(item)
        elif item.suffix in IMAGE_SUFFIXES:
            out.plots.append(item)


def belongs(path: Path, root: Path) -> bool:
    """Whether what a path leads to is part of the folder: inside it, or in the blobs of its cached repo."""
    target, base = path.resolve(), root.resolve()
    if target.is_relative_to(base):
        return True
    for folder in (base, *base.parents):
        if folder.parent.name == "snapshots":  # <cache>/models--me--mine/snapshots/<commit>
            repo = folder.parent.parent
            shared = repo.parent / "blobs"  # where newer clients keep large objects, as <cache>/blobs/be/<sha256>
            return target.parent == repo / "blobs" or target.parent.parent == shared
    return False


def _take(path: Path, out: PackagePlan, pattern: NamePattern | None) -> bool:
    """Plan the SAE at a path; False where it is not one."""
    relative = path.relative_to(out.root).as_posix()
    rule = out.spec.rule_for(relative)
    if rule.skip:
        out.left_out.append((path, "skipped by hubsae.yaml"))
        return False
    probe = Probe(path)
    info = parse_path(relative if relative != "." else path.name)
    if pattern is not None:
        matched = pattern.match(relative)
        if matched is None and path.is_file():
            out.left_out.append((path, f"does not follow the pattern {pattern.template}"))
            return False
        info = matched.or_else(info) if matched is not None else info
    readings = readings_of(probe)
    if path.is_file() and path.stat().st_size == 0:
        raise FormatError(
            path, "an SAE file", "an empty file (0 bytes)", hint="copy it again, or skip it in hubsae.yaml"
        )
    choices = {**out.spec.choices, **rule.choices}
    forced = rule.format or (out.spec.format if path.is_file() or readings else None)
    if forced is None and choices.get("map") and path.is_file():
        forced = MAPPED
    if forced is None and not readings:
        if path.is_file():
            _not_an_sae(path, probe, out)
        return False
    chosen = choose(probe, forced)
    if path.is_dir():
        _check_links(path, out.root)
    why = next((r.why for r in readings if r.format == chosen.name), "chosen by the caller")
    info = NameInfo(layer=rule.layer, stage=rule.stage).or_else(info)
    out.saes.append(PlannedSAE(path, chosen.name, why, rule.id or "", info, choices, _size(path)))
    return True


def _check_links(folder: Path, root: Path) -> None:
    """A folder that is one SAE is read as a whole, so none of its files may lie elsewhere."""
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() and not belongs(file, root):
            raise FormatError(
                file,
                "a file inside the folder",
                f"a link to {file.resolve()}",
                hint="copy the file to its place: what lies outside of the folder is never published",
            )


def _not_an_sae(path: Path, probe: Probe, out: PackagePlan) -> None:
    """A file that reads as nothing is left out, unless its name says that it is meant to be an SAE."""
    found = looks_like(probe)
    info = parse_name(path.name)
    if path.name.startswith("sae") or info.architecture is not None:
        raise FormatError(
            path,
            "an SAE in a known format, as its name suggests",
            found,
            hint=f"give format=..., or leave it out with `files: {{'{path.name}': {{skip: true}}}}` in {SPEC_NAME}",
        )
    out.left_out.append((path, f"not an SAE in a known format ({found})"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _name_them(out: PackagePlan, prefix: bool) -> None:
    """Ids: folder, then stage and layer where the name has them, else the file's own name; never twice."""
    for item in out.saes:
        item.id = item.id or _id(out, item, prefix, short=True)
    for id in {i.id for i in out.saes}:
        same = [i for i in out.saes if i.id == id]
        if len(same) > 1:
            for item in same:
                item.id = _id(out, item, prefix, short=False)
    seen: dict[str, Path] = {}
    for item in out.saes:
        if item.id in seen:
            raise ConfigError(
                f"{item.source.name} and {seen[item.id].name} would both be named {item.id!r}",
                hint=f"give one of them an id under files: in {SPEC_NAME}",
            )
        seen[item.id] = item.source
    # layer6 before layer12
    out.saes.sort(key=lambda item: natural_key(item.id))


def _id(out: PackagePlan, item: PlannedSAE, prefix: bool, *, short: bool) -> str:
    if item.source == out.root:
        return _clean(out.name) if prefix else "."
    parts = [_clean(out.name)] if prefix and out.source.is_dir() else []
    relative = item.source.relative_to(out.root)
    parts += [_clean(p) for p in relative.parts[:-1]]
    # only a file named by stage and layer is renamed; folders and other names stay recognisable
    if short and item.source.is_file() and item.info.layer is not None and _is_stage_layer(item):
        parts += [_clean(item.info.stage)] if item.info.stage else []
        parts.append(f"layer{item.info.layer}")
    else:
        parts.append(_clean(stem_of(relative.name) if item.source.is_file() else relative.name))
    return "/".join(parts)


def _is_stage_layer(item: PlannedSAE) -> bool:
    info = item.info
    return info.stage is not None or (info.architecture is None and info.expansion is None and info.k is None)


def _clean(name: str | None) -> str:
    kept = "".join(c if c.isalnum() or c in "-_.+=" else "-" for c in name or "")
    return kept.strip(".-") or "sae"
