"""From what a person has to a release folder that can be checked and uploaded.

A raw folder is packaged into a staging folder; a release folder is taken as it is, and copied (by hard links) only if
the options of the push change something in it. Nothing of the source is ever written to.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hubsae.core.errors import ConfigError, HubSAEError
from hubsae.core.files import read_json
from hubsae.formats.manifest import MANIFEST_NAME, Manifest
from hubsae.formats.package import PackagePlan, load_planned, package
from hubsae.formats.package import plan as plan_package
from hubsae.formats.release import Release as PackagedRelease
from hubsae.hub.client import HubClient, hf_home
from hubsae.hub.plan import PushOptions, datasets_of
from hubsae.hub.probes import Activations, Calibration, calibrate

if TYPE_CHECKING:
    from hubsae.core.sae import SAE

T = TypeVar("T")


@dataclass
class Staging:
    """A release folder ready to be checked, and where its SAEs came from."""

    root: Path
    sources: dict[str, Callable[[], SAE]] = field(default_factory=dict)
    """By id: how to get what the written copy has to equal."""
    read_as: dict[str, str] = field(default_factory=dict)
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@contextmanager
def staged(client: HubClient, source: Path, told: PushOptions) -> Iterator[Staging]:
    """The release folder for a source: itself, that of a run, or a packaged copy that is removed afterwards."""
    source = source.expanduser()
    if not source.exists():
        raise HubSAEError(
            f"there is no folder or file {source}",
            hint="push takes a folder of SAE files, a release folder or one file",
        )
    release = _release_of(source)
    if release is not None:
        wrong = [n for n in ("hook", "pattern", "format", "choices", "base_model_revision") if getattr(told, n)]
        if wrong:
            raise ConfigError(
                f"{release} is packaged already; {', '.join(wrong)} cannot be changed by a push",
                hint="package the source files again with those options",
            )
        with staging_folder() as folder:
            yield _adjusted(Staging(release), told, folder)
        return
    with staging_folder() as folder:
        yield _packaged(client, source, told, folder)


def _release_of(source: Path) -> Path | None:
    for folder in (source, source / "release"):
        manifest = folder / MANIFEST_NAME
        if manifest.is_file() and Manifest.is_manifest(read_json(manifest)):
            return folder
    return None


def _packaged(client: HubClient, source: Path, told: PushOptions, folder: Path) -> Staging:
    spec = {
        "base_model": told.base_model,
        "base_model_revision": told.base_model_revision,
        "hook": told.hook,
        "license": told.license,
        "datasets": datasets_of(told) or None,
        "description": told.description,
        "pattern": told.pattern,
        "format": told.format,
        "choices": told.choices,
        "mixed_widths": told.mixed_widths,
    }
    todo = plan_package(source, **{name: value for name, value in spec.items() if value is not None})
    with warnings.catch_warnings(record=True) as heard, progress_line(client, todo) as report:
        warnings.simplefilter("always")
        package(todo, folder / "release", also=told.also, progress=report)
    staging = Staging(
        folder / "release",
        {item.id: (lambda item=item: _quietly(lambda: load_planned(todo, item))) for item in todo.saes},
        {item.id: item.format for item in todo.saes},
        notes=list(dict.fromkeys(str(w.message) for w in heard)),
    )
    if told.keep_source:
        for item in todo.saes:
            _keep(item.source, source if source.is_dir() else source.parent, staging.root / "source")
    calibrate_all(staging, told)
    return staging


@contextmanager
def progress_line(client: HubClient, todo: PackagePlan) -> Iterator[Callable[[Any, int, int], None]]:
    """Tell that packaging goes on, a line per tenth of the SAEs."""
    step = max(1, len(todo.saes) // 10)

    def report(item: Any, number: int, total: int) -> None:
        if total > 8 and number % step == 0 and number < total:
            client.say(f"packaging {number + 1} of {total}: {item.id}")

    yield report


def _quietly(call: Callable[[], T]) -> T:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def _adjusted(staging: Staging, told: PushOptions, folder: Path) -> Staging:
    """A packaged release with what the options say about it; the release folder itself is never changed."""
    manifest = Manifest.read(staging.root)
    uncut = [e.id for e in manifest if e.architecture == "batch_topk"]
    changes = told.license or told.base_model or datasets_of(told) or told.description or told.also
    if not changes and not (uncut and told.activations is not None):
        return staging
    copy = folder / "release"
    shutil.copytree(staging.root, copy, copy_function=_link, ignore=shutil.ignore_patterns(MANIFEST_NAME, ".*"))
    shutil.copyfile(staging.root / MANIFEST_NAME, copy / MANIFEST_NAME)
    release = PackagedRelease.open(copy)
    updates = {"license": told.license, "description": told.description, "datasets": datasets_of(told) or None}
    release.manifest = release.manifest.model_copy(update={k: v for k, v in updates.items() if v is not None})
    if told.base_model or told.also:
        for id in release.ids:
            sae = release.load(id)
            sae.metadata.base_model.id = told.base_model or sae.metadata.base_model.id
            _unlink_all(copy / release.entry(id).path)
            release.add(sae, id, also=told.also)
        release.manifest.base_model = told.base_model or release.manifest.base_model
    release.manifest.write(copy)
    moved = Staging(copy, staging.sources, staging.read_as, notes=staging.notes)
    calibrate_all(moved, told)
    return moved


def calibrate_all(staging: Staging, told: PushOptions) -> None:
    """Store a threshold in every BatchTopK SAE that has none, if there are activations to find it on."""
    release = PackagedRelease.open(staging.root)
    uncut = [e for e in release if e.architecture == "batch_topk" and release.metadata(e.id).config.threshold is None]
    if not uncut:
        return
    if told.activations is None:
        staging.notes.append(
            f"{len(uncut)} BatchTopK SAE{'s have' if len(uncut) > 1 else ' has'} no inference threshold; what fires "
            "depends on the batch. --activations FILE_OR_DATASET estimates one"
        )
        return
    given, only = Activations(told.activations), one_place(release.manifest)
    for entry in uncut:
        vectors = given.of(entry.layer, entry.stage, only_place=only)
        if vectors is None:
            staging.notes.append(f"{entry.id}: no activations for it in {told.activations}, so no threshold")
            continue
        fixed, calibration = calibrate(_quietly(lambda entry=entry: release.load(entry.id)), vectors)
        _unlink_all(release.folder(entry.id))
        release.add(fixed, entry.id, also=told.also)
        staging.sources[entry.id] = lambda fixed=fixed: fixed
        staging.calibrations[entry.id] = calibration


def one_place(manifest: Manifest) -> bool:
    """Whether all SAEs are of one layer and stage, so that one set of activations fits them."""
    return len({(entry.layer, entry.stage) for entry in manifest}) <= 1


# -- staging folders ---------------------------------------------------------------------------------------------


@contextmanager
def staging_folder() -> Iterator[Path]:
    """A folder beside the Hub cache (a disk with room for models), removed afterwards; those of dead pushes too."""
    parent = hf_home() / "hubsae" / "staging"
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.iterdir():
        owner = old.name.partition("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _link(source: str, target: str) -> str:
    """A hard link where the disk allows it, else a copy."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _unlink_all(folder: Path) -> None:
    """Remove an SAE's files before they are written anew: a linked file must not be written through."""
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


def _keep(source: Path, base: Path, target: Path) -> None:
    for path in [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(base)
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(str(path), str(place))
