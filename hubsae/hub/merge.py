"""What a branch should hold after a push: this release put on top of what is there.

Publishing adds and replaces. SAEs that the repo has and this release does not are kept (and stay in the manifest and
on the card), unless pruning is asked for; files that a replaced SAE no longer has are deleted. Because the manifest
and the card depend on what is there, this runs again whenever another writer was faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from hubsae.core.errors import FormatError, HubSAEError
from hubsae.core.files import sha256_file
from hubsae.core.metadata import Metadata
from hubsae.formats.manifest import MANIFEST_NAME, FileEntry, Manifest, SAEEntry
from hubsae.formats.planning import belongs
from hubsae.formats.release import Release
from hubsae.hub import card as cards
from hubsae.hub.catalog import json_or_none
from hubsae.hub.client import HubClient
from hubsae.hub.contents import Contents, LocalFile, State, files_under

README = "README.md"
MAX_IN_FOLDER = 10_000


@dataclass
class Merge:
    """Builds the contents of a branch for any state of it; remembers what the last build decided."""

    client: HubClient
    repo_id: str
    release: Release
    files: list[LocalFile]
    card: cards.CardOptions = field(default_factory=cards.CardOptions)
    prune: bool = False
    delete: Sequence[str] = ()
    overwrite_config: bool = False
    kept: list[str] = field(default_factory=list)
    """Ids of SAEs of the repo that this release leaves as they are."""
    notes: list[str] = field(default_factory=list)
    records: dict[str, Metadata] = field(default_factory=dict)
    """By folder: the records of this release that were read already."""

    def __call__(self, state: State) -> Contents:
        """The files the branch should hold, and those it should not."""
        self.notes = []
        there = self._manifest_there(state)
        manifest, dropped = self._merged(there)
        ours = {file.path for file in self.files}
        delete = {path for path in dropped if path not in ours}
        delete |= {p for p in state.tree if p not in ours and any(fnmatch(p, pattern) for pattern in self.delete)}
        if README in delete or MANIFEST_NAME in delete:
            raise HubSAEError(f"--delete would remove {README} or {MANIFEST_NAME}, which every release has")
        listed = LocalFile(MANIFEST_NAME, manifest.to_json().encode())
        files = [*self.files, listed, LocalFile(README, self._readme(state, manifest, there))]
        _check_folders(files, set(state.tree) - delete)
        return Contents(files, frozenset(delete))

    def _manifest_there(self, state: State) -> Manifest | None:
        if MANIFEST_NAME not in state.tree:
            return None
        content = json_or_none(self.client.download(self.repo_id, MANIFEST_NAME, revision=state.head))
        if Manifest.is_manifest(content):
            return Manifest.parse(content, f"{self.repo_id}/{MANIFEST_NAME}")
        if self.overwrite_config:
            return None
        raise HubSAEError(
            f"{self.repo_id} has a {MANIFEST_NAME} that is not a release manifest: it is some other kind of repo",
            hint="publish to another repo (--repo-id), or replace that file with --overwrite-config",
        )

    def _merged(self, there: Manifest | None) -> tuple[Manifest, set[str]]:
        """The manifest afterwards, and the files that no SAE needs any more."""
        mine = self.release.manifest
        self.kept = []
        if there is None:
            return mine, set()
        replaced = {entry.id for entry in mine} | {entry.path for entry in mine}
        kept = [e for e in there if not self.prune and e.id not in replaced and e.path not in replaced]
        gone = [e for e in there if e not in kept]
        self.kept = [entry.id for entry in kept]
        dropped = {file.path for entry in gone for file in entry.files}
        my_files = {file.path for file in mine.files}
        shared = [] if self.prune else [file for file in there.files if file.path not in my_files]
        if self.prune:
            dropped |= {file.path for file in there.files}
        still = {file.path for entry in kept for file in entry.files} | {file.path for file in shared}
        merged = mine.model_copy(
            update={
                "saes": _in_order(there, kept, list(mine)),
                "files": [*shared, *mine.files],
                "license": mine.license or there.license,
                "description": mine.description or there.description,
                "datasets": list(dict.fromkeys([*there.datasets, *mine.datasets])) if kept else mine.datasets,
                "name": there.name if kept else mine.name,
                "base_model": mine.base_model if not kept or mine.base_model == there.base_model else None,
                "base_model_revision": mine.base_model_revision
                if not kept or mine.base_model_revision == there.base_model_revision
                else None,
            }
        )
        return merged, dropped - still

    def _readme(self, state: State, manifest: Manifest, there: Manifest | None) -> bytes:
        existing = None
        if README in state.tree:
            existing = self.client.download(self.repo_id, README, revision=state.head).read_text(encoding="utf-8")
        elif (own := self.release.path / README).is_file() and belongs(own, self.release.path):
            existing = own.read_text(encoding="utf-8")
        # those of SAEs that are kept come from the Hub, several at a time: a repo may hold hundreds
        unread = [entry.path for entry in manifest if entry.path not in self.records]
        with ThreadPoolExecutor(8) as pool:
            kept = dict(zip(unread, pool.map(lambda path: self._record(path, state), unread), strict=True))
        known = self.records | kept
        records = [cards.record_of(entry, known[entry.path]) for entry in manifest]
        card = cards.card_of(
            manifest, self.repo_id, records, lambda path: self._local_or_remote(path, state), self.card
        )
        merged = cards.render_card(card, existing, template=self.card.template, force=self.card.force)
        if merged.kept_by_hand:
            blocks = ", ".join(merged.kept_by_hand)
            self.notes.append(f"README.md: edited by hand and left alone: {blocks} (--force-card replaces them)")
        if existing is not None and there is None and README in state.tree:
            self.notes.append("README.md of the repo keeps its own text; the generated parts are added below it")
        return merged.text.encode()

    def _record(self, folder: str, state: State) -> Metadata:
        return Metadata.load(
            self._local_or_remote("metadata.json" if folder == "." else f"{folder}/metadata.json", state)
        )

    def _local_or_remote(self, path: str, state: State) -> Path:
        place = self.release.path / path
        if place.is_file():
            return place
        return self.client.download(self.repo_id, path, revision=state.head)


def files_of(release: Release, *, hashes: bool) -> list[LocalFile]:
    """Every file of a release folder; one that the manifest does not list is added to it, others have to be as listed.

    Without `hashes` the manifest is believed: for a release that was written a moment ago.
    """
    root, manifest = release.path, release.manifest
    known = {file.path: file for file in manifest.all_files}
    files: list[LocalFile] = []
    extra: list[FileEntry] = []
    for file in files_under(root):
        if file.path in (MANIFEST_NAME, README):
            continue
        entry = known.pop(file.path, None)
        if entry is None:
            entry = FileEntry.of(root, file.path)
            extra.append(entry)
        elif file.size != entry.size or (hashes and sha256_file(root / file.path) != entry.sha256):
            raise FormatError(
                root / file.path,
                f"the file that {MANIFEST_NAME} lists ({entry.size} bytes, sha256 {entry.sha256[:12]}...)",
                f"another one ({file.size} bytes)",
                hint="it was changed after packaging; package the release again",
            )
        files.append(LocalFile(file.path, file.source, entry.sha256))
    if known:
        missing = root / next(iter(known))
        raise FormatError(
            missing,
            f"a file, as {MANIFEST_NAME} lists it",
            "a link that leads out of the release" if missing.is_symlink() else "nothing",
            hint="package the release again",
        )
    release.manifest = manifest.model_copy(update={"files": [*manifest.files, *extra]})
    return files


def _in_order(there: Manifest, kept: list[SAEEntry], mine: list[SAEEntry]) -> list[SAEEntry]:
    """Replaced SAEs stay at their place, new ones follow."""
    by_id = {entry.id: entry for entry in [*kept, *mine]}
    old = [by_id.pop(entry.id) for entry in there if entry.id in by_id]
    return old + list(by_id.values())


def _check_folders(files: Sequence[LocalFile], staying: set[str]) -> None:
    counts: dict[str, int] = {}
    for path in staying | {file.path for file in files}:
        folder = path.rpartition("/")[0]
        counts[folder] = counts.get(folder, 0) + 1
    for folder, count in counts.items():
        if count > MAX_IN_FOLDER:
            raise HubSAEError(
                f"the folder {folder or 'at the root'} would hold {count} files; the Hub allows {MAX_IN_FOLDER}",
                hint="package the SAEs into subfolders, e.g. one per stage",
            )
