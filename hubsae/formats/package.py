"""From a plan to a release folder: one SAE at a time is read, completed, checked and written.

What cannot be known from the files, their names or hubsae.yaml is asked for; the release appears under its name
only when all of it is written.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import sha256_file
from hubsae.core.hooks import KINDS, hook_record
from hubsae.core.progress import progress
from hubsae.core.sae import SAE
from hubsae.formats.base import Overrides, Probe, reading
from hubsae.formats.detection import FORMATS, weight_files
from hubsae.formats.manifest import MANIFEST_NAME
from hubsae.formats.planning import PackagePlan, PackageWarning, PlannedSAE, plan
from hubsae.formats.release import PLOTS, RESULTS, Release
from hubsae.formats.spec import SPEC_NAME, PackageSpec
from hubsae.version import __version__

__all__ = ["PackagePlan", "PackageWarning", "PlannedSAE", "load_planned", "package", "plan", "weight_files"]


ASK = (
    "give base_model='org/model' and hook='model.layers.{layer}' (command line: --base-model, --hook), or write "
    f"both into {SPEC_NAME} beside the files"
)


def package(
    source: str | os.PathLike[str] | PackagePlan,
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    hook: str | None = None,
    license: str | None = None,
    datasets: str | Sequence[str] | None = None,
    description: str | None = None,
    pattern: str | None = None,
    format: str | None = None,
    choices: Mapping[str, Any] | None = None,
    mixed_widths: bool | None = None,
    training: Mapping[str, Any] | None = None,
    activations: Mapping[str, Any] | None = None,
    hook_record: Mapping[str, Any] | None = None,
    spec: PackageSpec | None = None,
    also: Iterable[str] = (),
    overwrite: bool = False,
    bar: bool | None = None,
) -> Release:
    """Turn a folder of SAE files (or a single one) into a release folder `out`, streaming one SAE at a time.

    What is given wins over the `hubsae.yaml` beside the files:
        source: the folder, a single file, or a plan made before.
        name: of the release; the folder's unless given.
        base_model, base_model_revision: id of the language model, and its commit.
        hook: where the SAEs read, such as `model.layers.{layer}`.
        license, datasets, description: of the release.
        pattern: naming scheme of the files, such as `{stage}_L{layer}_k{k}.pt`.
        format: read every file as this format.
        choices: for the readers, against what they would decide, such as `{"topk_relu": True}`.
        mixed_widths: allow SAEs of different input width.
        training, activations, hook_record: what the record of each SAE says about these, by field.
        spec: a hubsae.yaml from elsewhere, in place of the one beside the files.
        also: further formats beside each SAE: sparsify, onnx, pt, raw.
        overwrite: replace a release at `out`; its README, results and plots are kept.
        bar: show progress; by default where somebody watches.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> from hubsae.formats import write
    >>> with tempfile.TemporaryDirectory() as d:
    ...     sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    ...     _ = write(sae, f"{d}/saes/layer6.pt", "pt")
    ...     package(f"{d}/saes", f"{d}/release", base_model="Qwen/Qwen3-8B", hook="layers.{layer}").ids
    ['saes/layer6']
    """
    todo = source if isinstance(source, PackagePlan) else plan(source, PackageSpec.of(locals()), spec=spec)
    target = Path(out)
    _check_target(todo, target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.packaging"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        release = Release.create(scratch, name=todo.name, **todo.spec.manifest_fields())
        widths: dict[int, Path] = {}
        with release.one_manifest(), progress("packaging", len(todo.saes), "SAEs", show=bar) as task:
            for item in todo.saes:
                sae = load_planned(todo, item)
                _check_width(widths, sae, item, todo)
                release.add(sae, item.id, also=also)
                del sae
                task.advance()
            _copy_into(todo.results, scratch / RESULTS)
            _copy_into(todo.plots, scratch / PLOTS)
            if release.manifest.base_model is None:
                models = {e.base_model for e in release}
                release.manifest.base_model = models.pop() if len(models) == 1 else None
            if target.exists():
                _keep_extras(target, scratch)
            release.list_others()
        _replace_folder(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    for path, why in todo.left_out:
        warnings.warn(f"left out {path.name}: {why}", PackageWarning, stacklevel=2)
    return Release.open(target)


def load_planned(todo: PackagePlan, item: PlannedSAE) -> SAE:
    """Read one planned SAE with everything its name, hubsae.yaml and the caller say about it."""
    choices = dict(item.choices)
    if item.format != "native":
        said = ("layer", "stage", "k", "architecture") if todo.spec.pattern else ("layer", "stage")
        choices = {name: value for name, value in item.info.known().items() if name in said} | choices
    reader = FORMATS[item.format].read
    assert reader is not None
    wanted = Overrides.of(choices)
    with reading(item.source):
        sae = reader(Probe(item.source), wanted)
    _complete(todo, item, sae)
    return sae


def _complete(todo: PackagePlan, item: PlannedSAE, sae: SAE) -> None:
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
            raise ConfigError(f"{item.source}: hook {hook!r} needs the layer, which its name does not say", hint=ASK)
        named = hook.replace("{layer}", str(layer))
        named = f"{layer}.{named}" if layer is not None and named in KINDS else named
        for key, value in hook_record(named, layer, record.base_model.id).items():
            setattr(record.hook, key, value)
    elif record.hook.module_path is None and record.hook.transformer_lens is not None:
        # which module it is may depend on the family, which is known by now
        known = hook_record(record.hook.transformer_lens, record.hook.layer, record.base_model.id)
        record.hook.module_path = known.get("module_path")
    missing = [what for what, value in (
        ("the base model", record.base_model.id),
        ("the hook point", record.hook.module_path or record.hook.transformer_lens),
    ) if value is None]  # fmt: skip
    if missing:
        raise ConfigError(f"{item.source}: {' and '.join(missing)} cannot be known from the file or its name", hint=ASK)
    for section, values in (("training", spec.training), ("activations", spec.activations), ("hook", spec.hook_record)):
        for key, value in values.items():
            setattr(getattr(record, section), key, value)
    source = _weights_of(item)
    record.provenance.source_file = _relative(todo, item)
    if source is not None:
        item.sha256 = item.sha256 or sha256_file(source)
        record.provenance.source_sha256 = item.sha256
    record.provenance.source_format = record.provenance.source_format or item.format
    record.provenance.converter = f"hubsae {__version__}"


def _relative(todo: PackagePlan, item: PlannedSAE) -> str:
    inside = item.source.relative_to(todo.root).as_posix()
    return inside if inside != "." else item.source.resolve().name


def _weights_of(item: PlannedSAE) -> Path | None:
    """The weights file whose hash says where an SAE came from."""
    if item.source.is_file():
        return item.source
    files = weight_files(item.source)
    return max(files, key=lambda p: p.stat().st_size) if files else None


def _check_width(widths: dict[int, Path], sae: SAE, item: PlannedSAE, todo: PackagePlan) -> None:
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
