"""From what a person has to a release folder that can be checked and uploaded.

A raw folder is packaged into a staging folder; a release folder is taken as it is, and copied (by hard links) only if
the options of the push change something in it. Nothing of the source is ever written to.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hubsae.core.errors import ConfigError, HubSAEError
from hubsae.core.sae import SAE
from hubsae.formats.detection import may_hold_weights
from hubsae.formats.manifest import MANIFEST_NAME, Manifest
from hubsae.formats.package import PackagePlan, load_planned, package
from hubsae.formats.package import plan as plan_package
from hubsae.formats.planning import IMAGE_SUFFIXES, belongs
from hubsae.formats.release import ROOT_ID, Release
from hubsae.formats.spec import PackageSpec
from hubsae.hub.client import HubClient, hf_home, split_repo
from hubsae.hub.contents import files_under
from hubsae.hub.trial import Activations, Calibration, calibrate

T = TypeVar("T")

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+(@\S+)?")
WITH_A_PILE = (*IMAGE_SUFFIXES, ".json", ".yaml", ".csv")


@dataclass
class Extras:
    """What a push adds to the SAEs themselves, beside the words about them."""

    id: str | None = None
    """Name of a single live SAE in its release."""
    also: Iterable[str] = ()
    keep_source: bool = False
    activations: Any = None
    bar: bool | None = None


@dataclass
class Staging:
    """A release folder ready to be checked, and where its SAEs came from."""

    release: Release
    fresh: bool
    """Written by this push just now: the hashes of its manifest were taken from what was written."""
    sources: dict[str, Callable[[], SAE]] = field(default_factory=dict)
    """By id: how to get what the written copy has to equal."""
    read_as: dict[str, str] = field(default_factory=dict)
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def on_the_hub(source: str | os.PathLike[str] | SAE) -> bool:
    """Whether a source is the id of a repo: nothing on this disk has that name, and it reads like one."""
    return isinstance(source, str) and not Path(source).expanduser().exists() and _REPO_ID.fullmatch(source) is not None


def check_source(source: str | os.PathLike[str] | SAE) -> None:
    """Refuse a path that leads to nothing before anybody is asked anything."""
    if isinstance(source, SAE) or on_the_hub(source) or Path(source).expanduser().exists():
        return
    raise HubSAEError(
        f"there is no folder or file {source}",
        hint="push takes a folder of SAE files, a release folder, one file, or OWNER/NAME of a repo on the Hub",
    )


@contextmanager
def staged(
    client: HubClient, source: str | os.PathLike[str] | SAE, name: str, asked: PackageSpec, extras: Extras
) -> Iterator[Staging]:
    """The release folder for a source: itself, that of a run, or a packaged copy that is removed afterwards."""
    with staging_folder() as folder:
        if isinstance(source, SAE):
            staging = _of_one(source, name, asked, extras, folder)
        elif on_the_hub(source):
            pile = fetch_pile(client, str(source))
            asked = PackageSpec(name=name.rpartition("/")[2]).updated(asked)
            staging = _packaged(plan_package(pile, asked, prefix=False), extras, folder)
        elif (found := _release_of(Path(source).expanduser())) is not None:
            staging = _adjusted(found, asked, extras, folder)
        else:
            staging = _packaged(plan_package(Path(source).expanduser(), asked), extras, folder)
        calibrate_all(staging, extras)
        yield staging


def _of_one(sae: SAE, name: str, asked: PackageSpec, extras: Extras, folder: Path) -> Staging:
    id = extras.id or ROOT_ID
    fields = {"base_model": sae.metadata.base_model.id, **asked.manifest_fields()}
    release = Release.create(folder / "release", name=name.rpartition("/")[2], **fields)
    release.add(sae, id, also=extras.also)
    return Staging(release, True, {id: lambda: sae}, {id: sae.metadata.provenance.source_format or "HubSAE"})


def fetch_pile(client: HubClient, source: str) -> Path:
    """The SAE files of a repo, through the shared cache; the snapshot folder that holds them."""
    repo_id, revision = split_repo(source)
    sha = client.head(repo_id, revision)
    tree = client.tree(repo_id, sha)
    wanted = [path for path in tree if path.endswith(WITH_A_PILE) or may_hold_weights(Path(path))]
    if not wanted:
        raise HubSAEError(f"{repo_id} holds no file that could be an SAE", hint="hubsae formats lists what is read")
    client.say(f"fetching {len(wanted)} files of {repo_id}")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: client.download(repo_id, path, revision=sha), wanted))
    return client.cached_snapshot(repo_id, sha)


def _release_of(source: Path) -> Path | None:
    return next((folder for folder in (source, source / "release") if Manifest.lies_in(folder)), None)


def _packaged(todo: PackagePlan, extras: Extras, folder: Path) -> Staging:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        release = package(todo, folder / "release", also=extras.also, bar=extras.bar)
    staging = Staging(
        release,
        True,
        {item.id: (lambda item=item: _quietly(lambda: load_planned(todo, item))) for item in todo.saes},
        {item.id: item.format for item in todo.saes},
        notes=list(dict.fromkeys(str(w.message) for w in caught)),
    )
    if extras.keep_source:
        for item in todo.saes:
            _keep(item.source, todo.root, release.path / "source")
        release.list_others()
    return staging


def _quietly(call: Callable[[], T]) -> T:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def _adjusted(root: Path, asked: PackageSpec, extras: Extras, folder: Path) -> Staging:
    """A packaged release with what the options say about it; the release folder itself is never changed."""
    wrong = asked.model_fields_set - {"license", "base_model", "datasets", "description"}
    if wrong:
        raise ConfigError(
            f"{root} is packaged already; {', '.join(sorted(wrong))} cannot be changed by a push",
            hint="package the source files again with those options",
        )
    release = Release.open(root)
    if not asked.model_fields_set and not extras.also and not (_uncut(release) and extras.activations is not None):
        return Staging(release, False)
    copy = folder / "release"
    for file in files_under(root):
        _link(root / file.path, copy / file.path)
    (copy / MANIFEST_NAME).unlink(missing_ok=True)  # it is written anew
    shutil.copyfile(root / MANIFEST_NAME, copy / MANIFEST_NAME)
    release = Release.open(copy)
    release.manifest = release.manifest.model_copy(update=asked.manifest_fields())
    with release.one_manifest():
        for id in release.ids if asked.base_model or extras.also else []:
            sae = release.load(id)
            sae.metadata.base_model.id = asked.base_model or sae.metadata.base_model.id
            _unlink_all(release.folder(id))
            release.add(sae, id, also=extras.also)
    return Staging(release, False)


def _uncut(release: Release) -> list[str]:
    """Ids of BatchTopK SAEs without an inference threshold."""
    return [
        entry.id
        for entry in release
        if entry.architecture == "batch_topk" and release.metadata(entry).config.threshold is None
    ]


def calibrate_all(staging: Staging, extras: Extras) -> None:
    """Store a threshold in every BatchTopK SAE that has none, if there are activations to find it on."""
    release = staging.release
    uncut = _uncut(release)
    if not uncut:
        return
    if extras.activations is None:
        staging.notes.append(
            f"{len(uncut)} BatchTopK SAE{'s have' if len(uncut) > 1 else ' has'} no inference threshold; what fires "
            "depends on the batch. --activations FILE_OR_DATASET estimates one"
        )
        return
    given, only = Activations(extras.activations), one_place(release.manifest)
    with release.one_manifest():
        for entry in [release.entry(id) for id in uncut]:
            vectors = given.of(release.metadata(entry.id), only_place=only)
            if vectors is None:
                staging.notes.append(f"{entry.id}: no activations for it in {extras.activations}, so no threshold")
                continue
            fixed, calibration = calibrate(_quietly(lambda entry=entry: release.load(entry.id)), vectors)
            _unlink_all(release.folder(entry.id))
            release.add(fixed, entry.id, also=extras.also)
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
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _link(source: Path, target: Path) -> None:
    """A hard link where the disk allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _unlink_all(folder: Path) -> None:
    """Remove an SAE's files before they are written anew: a linked file must not be written through."""
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


def _keep(source: Path, base: Path, target: Path) -> None:
    for path in [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file()):
        if source.is_file() or belongs(path, base):
            _link(path, target / path.relative_to(base))
