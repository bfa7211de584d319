"""What a repo or a local folder holds, looked up once: its commit, its SAEs, their files.

With a manifest (`config.json` of a release) one request tells everything, and it is the request that the Hub counts
as a download. Without one the repo's file list is grouped into SAEs by name: a listing costs one request, weights cost
gigabytes. What a file really is, the readers in `formats` decide from its content once it is here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from hubsae.core.errors import HubSAEError, NotFoundError
from hubsae.core.files import write_json_atomic
from hubsae.core.metadata import FILE_NAME as METADATA_NAME
from hubsae.core.metadata import Metadata
from hubsae.core.text import natural_key, printable
from hubsae.formats import native
from hubsae.formats.detection import BESIDE, FOLDERS, SUFFIXES
from hubsae.formats.manifest import MANIFEST_NAME, Manifest, SAEEntry
from hubsae.formats.names import parse_path, stem_of
from hubsae.formats.select import FILTERS, pick, select, short_id
from hubsae.hub import registered
from hubsae.hub.client import HubClient, RemoteFile, split_repo
from hubsae.hub.errors import RepoNotFoundError
from hubsae.hub.registered import Registered
from hubsae.hub.retry import status_of

CACHE_NOTES = ".hubsae"
READ_FILES = frozenset(native.SAE_FILES) - {native.CFG_NAME}
_NEVER = ("optimizer", "scheduler", "training_args", "activations", "rng_state", "tokenizer", "sparsity", "normalizer")
# files that the language model itself consists of, in case a repo holds both
_MODEL = ("model-0", "pytorch_model", "adapter_model", "consolidated")


@dataclass(frozen=True)
class ExpectedFile:
    """A file of an SAE and what is known of it before it is here."""

    path: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Entry:
    """One SAE of a catalog."""

    id: str
    path: str
    files: tuple[ExpectedFile, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known without opening it: layer, stage, k ...; absent is unknown."""
    metrics: dict[str, float] = field(default_factory=dict)
    scope: str | None = None
    """The tokens it is for, where that is not all of them."""
    native: bool = False
    """Listed by a manifest, hence a hubsae folder."""
    registered: Registered | None = None
    """What SAELens' register says of it, where it was asked for by the name it has there."""

    @property
    def certain(self) -> bool:
        """A manifest knows everything; a file's name does not."""
        return self.native

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)

    @property
    def needed(self) -> tuple[ExpectedFile, ...]:
        """The files a load reads: not the other formats that may lie beside them."""
        if not self.native:
            return self.files
        names = {name if self.path == "." else f"{self.path}/{name}" for name in READ_FILES}
        return tuple(file for file in self.files if file.path in names)

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        keep = ("layer", "stage", "architecture", "d_in", "d_sae", "k", "hook_point")
        known = {"id": self.id} | {name: self.facts.get(name) for name in keep}
        return known | {"scope": self.scope} | self.metrics | {"bytes": self.size}


@dataclass
class Catalog:
    """The SAEs of a repo at one commit, or of a local folder."""

    source: str
    """As the person wrote it, for messages."""
    entries: list[Entry]
    manifest: Manifest | None = None
    root: Path | None = None
    """For local folders."""
    repo_id: str | None = None
    sha: str | None = None
    revision: str | None = None

    def choose(self, id: str | None = None, filters: Mapping[str, Any] | None = None) -> Entry:
        """The one SAE that is meant, or an error that lists what could be."""
        return pick(self.entries, id, filters, where=self.source)

    def select(self, id: str | None = None, filters: Mapping[str, Any] | None = None) -> list[Entry]:
        """Every SAE that fits; an error with the nearest choices if there is none."""
        return select(self.entries, id, filters, where=self.source)


# -- opening -----------------------------------------------------------------------------------------------------


def open_catalog(
    client: HubClient, repo_or_path: str | os.PathLike[str], revision: str | None = None, *, force: bool = False
) -> Catalog:
    """Look up a local folder or file, a repo at a revision, or a release by its name in SAELens' register."""
    text = os.fspath(repo_or_path)
    local = Path(text).expanduser()
    if local.exists():
        return local_catalog(local)
    looks_local = isinstance(repo_or_path, os.PathLike) or text.startswith((".", "/", "~")) or text.count("/") > 1
    looks_local = looks_local or ("/" not in text and text.endswith(registered.FILE_SUFFIXES))
    if looks_local:
        hint = None
        if text.count("/") > 1 and not text.startswith((".", "/", "~")):
            repo, rest = "/".join(text.split("/")[:2]), "/".join(text.split("/")[2:])
            hint = f"an SAE inside a repo is its own argument: from_pretrained({repo!r}, {rest!r})"
        raise NotFoundError(f"there is no folder or file {text}", hint=hint)
    repo_id, revision = split_repo(text, revision)
    if registered.is_name(text):
        return registered_catalog(client, repo_id, revision, force=force)
    return remote_catalog(client, repo_id, revision, force=force)


def local_catalog(path: Path) -> Catalog:
    """A release folder, an SAE folder, one file, or a folder of many."""
    if path.is_file():
        return Catalog(str(path), [_local_entry(path.parent, path.name, [path.name])], root=path.parent)
    content = json_or_none(path / MANIFEST_NAME)
    if Manifest.is_manifest(content):
        manifest = Manifest.parse(content, path / MANIFEST_NAME)
        return Catalog(str(path), [_native(entry) for entry in manifest], manifest, root=path)
    paths = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    return Catalog(str(path), [_local_entry(path, *unit) for unit in units(paths).items()], root=path)


def _local_entry(root: Path, place: str, files: Iterable[str]) -> Entry:
    """An SAE on disk that no manifest lists; its record says more than its name."""
    entry = _by_name(place, [ExpectedFile(file, (root / file).stat().st_size) for file in files])
    record = root / place / METADATA_NAME
    if isinstance(content := json_or_none(record), dict) and "hubsae_format" in content:
        said = SAEEntry.known_from(Metadata.from_dict(content, where=record))
        facts = entry.facts | {name: said[name] for name in FILTERS if said[name] is not None}
        return replace(entry, facts=facts, metrics=said["metrics"], scope=said["scope"])
    return entry


def _by_name(place: str, files: Iterable[ExpectedFile]) -> Entry:
    """An SAE of which only the name is known."""
    known = {name: value for name, value in parse_path(place).known().items() if name in FILTERS}
    return Entry(place, place, tuple(files), known)


def remote_catalog(client: HubClient, repo_id: str, revision: str | None = None, *, force: bool = False) -> Catalog:
    """A repo at one commit: one HEAD if its manifest is cached, one listing more if it has none."""
    source = f"{repo_id}@{revision}" if revision else repo_id
    sha, path = _manifest_file(client, repo_id, revision, force)
    if path is not None:
        content = json_or_none(path)
        if Manifest.is_manifest(content):
            manifest = Manifest.parse(content, f"{source}/{MANIFEST_NAME}")
            return Catalog(source, [_native(entry) for entry in manifest], manifest, None, repo_id, sha, revision)
    tree = _listing(client, repo_id, sha)
    entries = [
        _by_name(place, [ExpectedFile(file, tree[file].size, tree[file].sha256) for file in files])
        for place, files in units(tree).items()
    ]
    return Catalog(source, entries, None, None, repo_id, sha, revision)


def registered_catalog(client: HubClient, name: str, revision: str | None = None, *, force: bool = False) -> Catalog:
    """A release of SAELens' register: its SAEs under the ids they have there, in the repo that holds them."""
    release = registered.release(name)
    found = remote_catalog(client, release.repo_id, revision, force=force)
    entries = []
    for sae in release.saes:
        wanted = sae.path.strip("/") or "."
        exact = [e for e in found.entries if wanted in (e.id, e.path, short_id(e.id))]
        inside = [e for e in found.entries if e.path.startswith(f"{wanted}/")]
        if len(there := exact or inside) == 1:
            entry = there[0]
            facts = sae.facts | entry.facts
        else:  # listed all the same: a load says what is the matter
            entry, facts = Entry(sae.id, wanted, ()), sae.facts
        entries.append(replace(entry, id=sae.id, facts=facts, registered=sae))
    source = f"{name}@{revision}" if revision else name
    return replace(found, source=source, entries=entries, manifest=None)


def _manifest_file(client: HubClient, repo_id: str, revision: str | None, force: bool) -> tuple[str, Path | None]:
    """The commit, and the cached `config.json` at it (None where the repo has none)."""
    try:
        path = client.download(repo_id, MANIFEST_NAME, revision=revision, force=force)
        return path.parent.name, path
    except HubSAEError as error:
        cause = error.__cause__
        answer = getattr(cause, "response", None)
        sha = answer.headers.get("X-Repo-Commit") if answer is not None else None
        no_such_file = isinstance(error, NotFoundError) and status_of(cause) == 404 if cause else False
        if no_such_file and sha and not isinstance(error, RepoNotFoundError):
            return sha, None
        if client.offline:
            # not cached because there is none, or because nobody asked: the listing tells
            sha = client.resolve(repo_id, revision)
            if _listing_file(client, repo_id, sha).is_file():
                return sha, None
        raise


def _listing_file(client: HubClient, repo_id: str, sha: str) -> Path:
    return client.cached_snapshot(repo_id, sha).parents[1] / CACHE_NOTES / f"tree-{sha}.json"


def _listing(client: HubClient, repo_id: str, sha: str) -> dict[str, RemoteFile]:
    """The files of a commit, kept in the cache: a commit does not change."""
    file = _listing_file(client, repo_id, sha)
    if isinstance(kept := json_or_none(file), list):
        return {item["path"]: RemoteFile(**item) for item in kept}
    tree = client.tree(repo_id, sha)
    with suppress(OSError):  # a cache that cannot be written costs a request next time
        write_json_atomic(file, [vars(item) for item in tree.values()])
    return tree


def json_or_none(path: Path) -> Any:
    """What a JSON file holds; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: bad text or JSON, integers of ten thousand digits
        return None


def _native(entry: SAEEntry) -> Entry:
    files = tuple(ExpectedFile(file.path, file.size, file.sha256) for file in entry.files)
    return Entry(entry.id, entry.path, files, entry.facts, dict(entry.metrics), entry.scope, native=True)


# -- SAEs by the names of their files ----------------------------------------------------------------------------


def units(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """A repo's paths as SAEs: by what a reader is pointed at, a folder ("." is the root) or a file, the files of each.

    >>> list(units(["saes/sae_base_layer6.pt", "README.md", "L6/cfg.json", "L6/sae_weights.safetensors"]))
    ['L6', 'saes/sae_base_layer6.pt']
    """
    everything = {path for path in paths if printable(path) == path}  # others are no names: nothing is read from them
    folders = {"."} | {str(parent) for path in everything for parent in PurePosixPath(path).parents}
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for folder in sorted(folders):
        for needed, optional in FOLDERS:
            inside = [_join(folder, name) for name in needed]
            if not everything.issuperset(inside):
                continue
            inside += [path for name in optional if (path := _join(folder, name)) in everything]
            found[folder] = tuple(inside)
            # other weights beside them (model.pt, model.onnx, raw tensors) are the same SAE again
            taken.update(path for path in everything if str(PurePosixPath(path).parent) == folder)
            taken.update(inside)
            break
    for path in sorted(everything - taken):
        file = PurePosixPath(path).name.lower()
        if file.endswith(SUFFIXES) and not file.startswith(_NEVER) and not file.startswith(_MODEL):
            found[path] = (path, *_beside(path, everything))
    return dict(sorted(found.items(), key=lambda unit: natural_key(unit[0])))


def _join(folder: str, name: str) -> str:
    return normpath(f"{folder}/{name}")


def _beside(path: str, everything: set[str]) -> list[str]:
    """Files that say more about a single-file SAE, from its folder or the one above."""
    folder, stem = str(PurePosixPath(path).parent), stem_of(PurePosixPath(path).name)
    return sorted(everything & {_join(folder, pattern.format(stem=stem)) for pattern in BESIDE})
