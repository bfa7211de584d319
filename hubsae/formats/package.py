"""From a folder of SAE files to a release folder: plan what is there, then write one SAE at a time.

Everything that cannot be known from the files and their names (base model, hook point, k) is asked for before
anything is written. The release appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import sha256_file
from hubsae.core.sae import HubSAE
from hubsae.formats.base import Overrides, Probe, hook_record
from hubsae.formats.manifest import MANIFEST_NAME, Manifest
from hubsae.formats.names import NameInfo, NamePattern, parse_name, parse_path, stem_of
from hubsae.formats.release import PLOTS, RESULTS, Release
from hubsae.formats.spec import SPEC_NAME, PackageSpec
from hubsae.version import __version__

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".npz")
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


def weight_files(folder: Path, most: int | None = None) -> list[Path]:
    """Files below a folder that may hold weights."""
    out: list[Path] = []
    for file in sorted(folder.rglob("*")):
        if file.suffix in WEIGHT_SUFFIXES and file.is_file() and not _hidden(file, folder):
            out.append(file)
            if most is not None and len(out) >= most:
                break
    return out


def plan(source: str | os.PathLike[str], spec: PackageSpec | None = None, **given: Any) -> PackagePlan:
    """Look at a folder and say what a package of it will hold; nothing is written and no weights are read.

    `given` are the fields of hubsae.yaml (base_model, hook, pattern, format, choices ...) and win over it.
    """
    source = Path(source)
    if not source.exists():
        raise FormatError(source, "a folder of SAE files", "nothing at that path")
    root = source if source.is_dir() else source.parent
    if Manifest.is_manifest(Probe(root).json(MANIFEST_NAME)) and source.is_dir():
        raise FormatError(
            source, "a folder of SAE files", "a release", hint="it is packaged already: `hubsae push` publishes it"
        )
    spec = (spec if spec is not None else PackageSpec.beside(root)).updated(**given)
    pattern = NamePattern(spec.pattern) if spec.pattern else None
    label = spec.name or source.resolve().name if source.is_dir() else spec.name or stem_of(source.name)
    out = PackagePlan(source, spec, label, [])
    if source.is_dir():
        _walk(source, source, out, pattern)
    elif (planned := _one(source, root, out, pattern)) is not None:
        out.saes.append(planned)
    if not out.saes:
        seen = ", ".join(path.name for path, _ in out.left_out[:5])
        raise FormatError(
            source,
            "SAE files in a known format",
            f"none ({seen})" if seen else "an empty folder" if not any(root.iterdir()) else "none",
            hint="`hubsae show FILE` says how a file is read; --format and hubsae.yaml force a reading",
        )
    _name_them(out)
    return out


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _walk(folder: Path, root: Path, out: PackagePlan, pattern: NamePattern | None) -> None:
    if (planned := _one(folder, root, out, pattern)) is not None:
        out.saes.append(planned)
        return
    for item in sorted(folder.iterdir()):
        if item.name.startswith(".") or item.name == SPEC_NAME or (item.is_symlink() and not _inside(item, root)):
            continue
        if item.is_dir():
            _walk(item, root, out, pattern)
        elif item.suffix in WEIGHT_SUFFIXES:
            if (planned := _one(item, root, out, pattern)) is not None:
                out.saes.append(planned)
        elif item.suffix == ".csv":
            out.results.append(item)
        elif item.suffix in IMAGE_SUFFIXES:
            out.plots.append(item)


def _inside(link: Path, root: Path) -> bool:
    """Links may point into the folder, or to files of the Hub cache; never to a folder elsewhere."""
    target = link.resolve()
    return target.is_relative_to(root.resolve()) or target.is_file()


def _one(path: Path, root: Path, out: PackagePlan, pattern: NamePattern | None) -> PlannedSAE | None:
    """The SAE at a path, None where it is not one."""
    from hubsae.formats.registry import _choose, _detect

    relative = path.relative_to(root).as_posix() if path != root else "."
    rule = out.spec.rule_for(relative)
    if rule.skip:
        out.left_out.append((path, "skipped by hubsae.yaml"))
        return None
    probe = Probe(path)
    info = parse_path(relative if relative != "." else path.name)
    if pattern is not None:
        matched = pattern.match(relative)
        if matched is None and path.is_file():
            out.left_out.append((path, f"does not follow the pattern {pattern.template}"))
            return None
        info = matched.or_else(info) if matched is not None else info
    readings = _detect(probe)
    if path.is_file() and path.stat().st_size == 0:
        raise FormatError(
            path, "an SAE file", "an empty file (0 bytes)", hint="copy it again, or skip it in hubsae.yaml"
        )
    forced = rule.format or (out.spec.format if path.is_file() or readings else None)
    if forced is None and not readings:
        if path.is_file():
            _not_an_sae(path, probe, out)
        return None
    chosen = _choose(probe, forced)
    why = next((r.why for r in readings if r.format == chosen.name), "chosen by the caller")
    choices = {**out.spec.choices, **rule.choices}
    return PlannedSAE(path, chosen.name, why, rule.id or "", _with(info, rule), choices, _size(path))


def _with(info: NameInfo, rule: Any) -> NameInfo:
    return NameInfo(layer=rule.layer, stage=rule.stage).or_else(info)


def _not_an_sae(path: Path, probe: Probe, out: PackagePlan) -> None:
    """A file that reads as nothing is left out, unless its name says that it is meant to be an SAE."""
    from hubsae.formats.registry import _looks_like

    found = _looks_like(probe)
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


def _name_them(out: PackagePlan) -> None:
    """Ids: folder, then stage and layer where the name has them, else the file's own name; never twice."""
    for item in out.saes:
        item.id = item.id or _id(out, item, short=True)
    for id in {i.id for i in out.saes}:
        same = [i for i in out.saes if i.id == id]
        if len(same) > 1:
            for item in same:
                item.id = _id(out, item, short=False)
    seen: dict[str, Path] = {}
    for item in out.saes:
        if item.id in seen:
            raise ConfigError(
                f"{item.source.name} and {seen[item.id].name} would both be named {item.id!r}",
                hint=f"give one of them an id under files: in {SPEC_NAME}",
            )
        seen[item.id] = item.source
    # layer6 before layer12
    out.saes.sort(
        key=lambda item: [(not p.isdigit(), int(p) if p.isdigit() else p) for p in re.split(r"(\d+)", item.id)]
    )


def _id(out: PackagePlan, item: PlannedSAE, *, short: bool) -> str:
    root = out.source if out.source.is_dir() else out.source.parent
    if item.source == root:
        return _clean(out.name)
    parts = [_clean(out.name)] if out.source.is_dir() else []
    relative = item.source.relative_to(root)
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


# ---- writing ----------------------------------------------------------------------------------------------


def package(
    source: str | os.PathLike[str] | PackagePlan,
    out: str | os.PathLike[str],
    *,
    spec: PackageSpec | None = None,
    also: Iterable[str] = (),
    overwrite: bool = False,
    progress: Callable[[PlannedSAE, int, int], None] | None = None,
    **given: Any,
) -> Release:
    """Turn a folder of SAE files (or a single one) into a release folder, streaming one SAE at a time.

    `given` are the fields of hubsae.yaml: `name, base_model, base_model_revision, hook, license, datasets,
    pattern, format, choices, training, activations`. A README, results and plots of a release that is
    overwritten are kept.

    >>> import tempfile
    >>> from hubsae.core.config import SAEConfig
    >>> from hubsae.formats import write
    >>> with tempfile.TemporaryDirectory() as d:
    ...     sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    ...     _ = write(sae, f"{d}/saes/layer6.pt", "pt")
    ...     package(f"{d}/saes", f"{d}/release", base_model="Qwen/Qwen3-8B", hook="layers.{layer}").ids
    ['saes/layer6']
    """
    todo = source if isinstance(source, PackagePlan) else plan(source, spec, **given)
    target = Path(out)
    _check_target(todo, target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.packaging"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        fields = todo.spec.manifest_fields()
        release = Release.create(scratch, name=todo.name, **fields)
        widths: dict[int, Path] = {}
        for number, item in enumerate(todo.saes):
            if progress is not None:
                progress(item, number, len(todo.saes))
            sae = load_planned(todo, item)
            _check_width(widths, sae, item, todo)
            release.add(sae, item.id, also=also)
            del sae
        if progress is not None:
            progress(todo.saes[-1], len(todo.saes), len(todo.saes))
        _copy_into(todo.results, scratch / RESULTS)
        _copy_into(todo.plots, scratch / PLOTS)
        if release.manifest.base_model is None:
            models = {e.base_model for e in release}
            release.manifest.base_model = models.pop() if len(models) == 1 else None
        if target.exists():
            _keep_extras(target, scratch)
        release.refresh()
        _replace_folder(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    for path, why in todo.left_out:
        warnings.warn(f"left out {path.name}: {why}", PackageWarning, stacklevel=2)
    return Release.open(target)


def load_planned(todo: PackagePlan, item: PlannedSAE) -> HubSAE:
    """Read one planned SAE with everything its name, hubsae.yaml and the caller say about it."""
    from hubsae.formats.registry import FORMATS

    choices = dict(item.choices)
    for name in ("layer", "stage"):
        value = getattr(item.info, name)
        if value is not None and item.format != "native":
            choices.setdefault(name, value)
    if item.format not in ("native",) and todo.spec.pattern:
        for name in ("k", "architecture"):
            if (value := getattr(item.info, name)) is not None:
                choices.setdefault(name, value)
    reader = FORMATS[item.format].read
    assert reader is not None
    sae = reader(Probe(item.source), Overrides.of(choices))
    _complete(todo, item, sae)
    return sae


def _complete(todo: PackagePlan, item: PlannedSAE, sae: HubSAE) -> None:
    """Fill in the record: base model, hook point, provenance; what is still unknown is asked for."""
    spec, record = todo.spec, sae.metadata
    rule = spec.rule_for(_relative(todo, item))
    if spec.base_model is not None:
        record.base_model.id = spec.base_model
    if spec.base_model_revision is not None:
        record.base_model.revision = spec.base_model_revision
    hook = rule.hook or spec.hook
    if hook is not None:
        layer = record.hook.layer if record.hook.layer is not None else item.info.layer
        if "{layer}" in hook and layer is None:
            raise ConfigError(
                f"{item.source}: hook {hook!r} needs the layer, which its name does not say", hint=_ask(item)
            )
        named = hook.replace("{layer}", str(layer))
        named = (
            f"{layer}.{named}"
            if layer is not None and named in ("resid_post", "resid_pre", "mlp_out", "attn_out")
            else named
        )
        for key, value in hook_record(named, layer).items():
            setattr(record.hook, key, value)
    missing = [what for what, value in (
        ("the base model", record.base_model.id),
        ("the hook point", record.hook.module_path or record.hook.transformer_lens),
    ) if value is None]  # fmt: skip
    if missing:
        raise ConfigError(
            f"{item.source}: {' and '.join(missing)} cannot be known from the file or its name", hint=_ask(item)
        )
    for section, values in (("training", spec.training), ("activations", spec.activations), ("hook", spec.hook_record)):
        for key, value in values.items():
            setattr(getattr(record, section), key, value)
    source = _weights_of(item)
    record.provenance.source_file = _relative(todo, item)
    if source is not None:
        record.provenance.source_sha256 = sha256_file(source)
    record.provenance.source_format = record.provenance.source_format or item.format
    record.provenance.converter = f"hubsae {__version__}"


def _ask(item: PlannedSAE) -> str:
    return (
        "give base_model='org/model' and hook='model.layers.{layer}' (command line: --base-model, --hook), or write "
        f"both into {SPEC_NAME} beside the files"
    )


def _relative(todo: PackagePlan, item: PlannedSAE) -> str:
    root = todo.source if todo.source.is_dir() else todo.source.parent
    return item.source.relative_to(root).as_posix() if item.source != root else item.source.resolve().name


def _weights_of(item: PlannedSAE) -> Path | None:
    """The weights file whose hash says where an SAE came from."""
    if item.source.is_file():
        return item.source
    files = weight_files(item.source)
    return max(files, key=lambda p: p.stat().st_size) if files else None


def _check_width(widths: dict[int, Path], sae: HubSAE, item: PlannedSAE, todo: PackagePlan) -> None:
    widths.setdefault(sae.d_in, item.source)
    if len(widths) > 1 and not todo.spec.mixed_widths:
        (first, a), (second, b) = list(widths.items())[:2]
        raise FormatError(
            b,
            f"d_in {first} as in {a.name}: one release is of one base model",
            f"d_in {second}",
            hint="package them apart, or say `mixed_widths: true` (--mixed-widths) if the model really has both",
        )


def _check_target(todo: PackagePlan, target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FormatError(target, "a folder to write the release into", "a file")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise FormatError(
                target, "an empty or new folder", "one with files in it", hint="use overwrite=True (--overwrite)"
            )
        if not (target / MANIFEST_NAME).is_file():
            raise FormatError(
                target, "a release to overwrite", "a folder of something else", hint="choose another folder"
            )
    inside = target.resolve()
    source = todo.source.resolve()
    if source.is_dir() and (inside == source or inside.is_relative_to(source)):
        raise ConfigError(
            f"{target} lies inside {todo.source}, the folder that is packaged", hint="choose another --out"
        )
    if source.is_relative_to(inside):
        raise ConfigError(f"{target} holds {todo.source}, the folder that is packaged", hint="choose another --out")


def _copy_into(files: Sequence[Path], folder: Path) -> None:
    for file in files:
        folder.mkdir(exist_ok=True)
        name = file.name if not (folder / file.name).exists() else f"{file.parent.name}-{file.name}"
        shutil.copyfile(file, folder / name)


def _keep_extras(old: Path, new: Path) -> None:
    """A card that was edited, results and plots survive; SAE folders are the new ones."""
    for name in ("README.md", ".gitattributes"):
        if (old / name).is_file():
            shutil.copyfile(old / name, new / name)
    for name in (RESULTS, PLOTS):
        for file in (old / name).glob("*"):
            if file.is_file() and not (new / name / file.name).exists():
                (new / name).mkdir(exist_ok=True)
                shutil.copyfile(file, new / name / file.name)


def _replace_folder(new: Path, target: Path) -> None:
    if not target.exists():
        os.replace(new, target)
        return
    old = target.parent / f".{target.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
