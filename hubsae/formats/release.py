"""A release on disk: a folder with a manifest, one folder per SAE, results and plots. What a push uploads."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from hubsae.core.errors import FormatError
from hubsae.core.files import atomic_path, safe_join, sha256_file, write_csv_atomic
from hubsae.core.fingerprint import FILE_NAME as FINGERPRINT_NAME
from hubsae.core.fingerprint import Fingerprint
from hubsae.core.hooks import HookPoint
from hubsae.core.intervene import recorded
from hubsae.core.metadata import FILE_NAME as METADATA_NAME
from hubsae.core.metadata import Metadata
from hubsae.core.sae import SAE
from hubsae.formats import native
from hubsae.formats.manifest import MANIFEST_NAME, FileEntry, Manifest, SAEEntry
from hubsae.formats.registry import write_also
from hubsae.formats.select import Filters, pick, select

RESULTS, PLOTS = "results", "plots"
# Files at the root that are no part of the record: the card is rendered from it, the others belong to git.
NOT_LISTED = (MANIFEST_NAME, "README.md", ".gitattributes")
ROOT_ID = "."
# What may lie beside an SAE at the root of a release with one SAE.
BESIDE = (
    "sae.safetensors", "model.onnx", "model.onnx.data", "model.pt", "model.safetensors", "model.metadata.json",
)  # fmt: skip
ROOT_FILES = (*native.SAE_FILES, *BESIDE)


class Release:
    """A release folder, opened.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as d:
    ...     release = Release.create(d, name="demo", base_model="Qwen/Qwen2.5-0.5B-Instruct")
    ...     _ = release.add(sae, "saes/layer6")
    ...     Release.open(d).load("saes/layer6").d_sae
    8
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._held = 0

    # ---- opening --------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Release:
        """Open a release folder by its manifest."""
        path = Path(folder)
        if not (path / MANIFEST_NAME).is_file():
            raise FormatError(
                path,
                f"a release folder (with {MANIFEST_NAME})",
                "a folder without it" if path.is_dir() else "no such folder",
                hint=f"make one with: hubsae package {path} --out release/",
            )
        return cls(path, Manifest.read(path))

    @classmethod
    def create(cls, folder: str | os.PathLike[str], *, name: str, **fields: Any) -> Release:
        """Start an empty release; `fields` are those of the manifest (base_model, license, datasets ...)."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST_NAME).exists():
            raise FormatError(path, "a folder without a release", "one with a manifest", hint="Release.open opens it")
        release = cls(path, Manifest(name=name, saes=[], **fields))
        release.manifest.write(path)
        return release

    # ---- what is in it ----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[SAEEntry]:
        return iter(self.manifest.saes)

    def __len__(self) -> int:
        return len(self.manifest.saes)

    @property
    def name(self) -> str:
        """Name of the release."""
        return self.manifest.name

    @property
    def ids(self) -> list[str]:
        """Ids of the SAEs, in order."""
        return [entry.id for entry in self]

    def entry(self, id: str | None = None, **filters: Unpack[Filters]) -> SAEEntry:
        """The one SAE with this id, or the one that fits `layer=`, `stage=`, `k=` ... (`select.FILTERS`)."""
        return pick(self.manifest.saes, id, filters, where=str(self.path))

    def select(self, id: str | None = None, **filters: Unpack[Filters]) -> list[SAEEntry]:
        """Every SAE that fits; an error that says what there is where none does."""
        return select(self.manifest.saes, id, filters, where=str(self.path))

    def folder(self, id: str | SAEEntry) -> Path:
        """Folder of an SAE, by its id or its entry."""
        return safe_join(self.path, (self.entry(id) if isinstance(id, str) else id).path)

    def metadata(self, id: str | SAEEntry) -> Metadata:
        """The full record of an SAE, by its id or its entry."""
        return Metadata.load(self.folder(id))

    def load(
        self,
        id: str | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        features: Sequence[int] | None = None,
        verify: bool = False,
        **filters: Unpack[Filters],
    ) -> SAE:
        """Load one SAE. Sizes are always compared with the manifest, hashes with `verify=True`."""
        entry = self.entry(id, **filters)
        check_files(self.path, entry.files, hashes=verify)
        return native.read(safe_join(self.path, entry.path), device=device, dtype=dtype, features=features)

    @property
    def results(self) -> list[Path]:
        """CSV files of numbers the card shows."""
        return sorted((self.path / RESULTS).glob("*.csv"))

    @property
    def plots(self) -> list[Path]:
        """Images the card shows."""
        return sorted(p for p in (self.path / PLOTS).glob("*") if p.suffix in (".png", ".svg", ".jpg"))

    # ---- changing it ------------------------------------------------------------------------------------

    @contextmanager
    def one_manifest(self) -> Iterator[Release]:
        """Write the manifest once, at the end, however much is added meanwhile."""
        self._held += 1
        try:
            yield self
        finally:
            self._held -= 1
            self._save()

    def _save(self) -> None:
        if not self._held:
            self.manifest.write(self.path)

    def add(self, sae: SAE, id: str, *, also: Iterable[str] = ()) -> SAEEntry:
        """Write an SAE into the release (in place of one with this id) and list it in the manifest.

        `also` names further formats to write beside it: sparsify, onnx, pt, raw, bundle.
        """
        folder = safe_join(self.path, id)
        metadata = sae.metadata.model_copy(update={"id": id, "config": sae.config})
        stored = SAE.build(
            sae.config, sae.tensors(), metadata=metadata, normalizer=sae.normalizer, sparsity=sae.sparsity
        )
        stored.fingerprint = sae.fingerprint
        _remove_beside(folder)
        native.write(stored, folder)
        write_also(stored, folder, also)
        entry = describe_sae(self.path, id, id, Metadata.load(folder))
        there = id in self.ids
        self.manifest.saes = [entry if e.id == id else e for e in self] if there else [*self, entry]
        self._save()
        return entry

    def add_fingerprints(self, model: nn.Module, tokenizer: Any, *, stage: str | None = None) -> list[str]:
        """Keep beside each SAE of a stage (or of none) what `model` has at its hook point; the ids of those SAEs.

        `sae.check(model, tokenizer)` compares with it.
        """
        chosen = [entry.id for entry in self if self.metadata(entry.id).base_model.stage == stage]
        taken: dict[HookPoint, Fingerprint] = {}
        with self.one_manifest():
            for id in chosen:
                metadata = self.metadata(id)
                hook = recorded(metadata.hook)
                taken[hook] = taken.get(hook) or Fingerprint.take(model, tokenizer, hook)
                native.write_fingerprint(self.folder(id), taken[hook])
                self._listed_anew(self.entry(id), metadata, FINGERPRINT_NAME)
        return chosen

    def record(self, id: str, metadata: Metadata) -> SAEEntry:
        """Write the record of one SAE anew; its weights and the other SAEs are neither read nor hashed."""
        metadata.save(self.folder(id))
        return self._listed_anew(self.entry(id), metadata, METADATA_NAME)

    def _listed_anew(self, old: SAEEntry, metadata: Metadata, written: str) -> SAEEntry:
        """The manifest's entry of an SAE of which one file was `written`; the others are not read."""
        unchanged = {file.path: file for file in old.files if not file.path.endswith(written)}
        entry = describe_sae(self.path, old.id, old.path, metadata, keep=old, known=unchanged)
        self.manifest.saes = [entry if e.id == old.id else e for e in self]
        self._save()
        return entry

    def add_results(self, name: str, rows: Sequence[dict[str, Any]]) -> Path:
        """Write a table of results as CSV."""
        file = safe_join(self.path, RESULTS, name if name.endswith(".csv") else f"{name}.csv")
        write_csv_atomic(file, rows)
        self._list(file)
        return file

    def add_plot(self, name: str, image: bytes | str | os.PathLike[str]) -> Path:
        """Put an image (its bytes, or a file) among the plots."""
        file = safe_join(self.path, PLOTS, name)
        with atomic_path(file) as temporary:
            if isinstance(image, bytes):
                temporary.write_bytes(image)
            else:
                shutil.copyfile(image, temporary)
        self._list(file)
        return file

    def _list(self, file: Path) -> None:
        entry = FileEntry.of(self.path, file.relative_to(self.path).as_posix())
        self.manifest.files = sorted(
            [f for f in self.manifest.files if f.path != entry.path] + [entry], key=lambda f: f.path
        )
        self._save()

    def refresh(self) -> Release:
        """Describe the folder anew after files in it changed (records, hashes, results, plots)."""
        self.manifest.saes = [
            describe_sae(self.path, e.id, e.path, Metadata.load(safe_join(self.path, e.path)), keep=e) for e in self
        ]
        self.list_others()
        return self

    def list_others(self) -> None:
        """List anew the files that belong to no SAE; those of SAEs are not read."""
        owned = {f.path for e in self for f in e.files}
        others = (p.relative_to(self.path).as_posix() for p in sorted(self.path.rglob("*")) if p.is_file())
        self.manifest.files = [
            FileEntry.of(self.path, p) for p in others if p not in owned and p not in NOT_LISTED and not _hidden(p)
        ]
        self._save()

    def verify(self) -> None:
        """Compare every file with its size and sha256 in the manifest; the first difference is an error."""
        check_files(self.path, self.manifest.all_files, hashes=True)


def _remove_beside(folder: Path) -> None:
    """Other formats beside an SAE that is written anew would be those of the old one."""
    for name in BESIDE:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "raw", ignore_errors=True)


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def describe_sae(
    root: Path,
    id: str,
    path: str,
    metadata: Metadata,
    keep: SAEEntry | None = None,
    known: Mapping[str, FileEntry] | None = None,
) -> SAEEntry:
    """The manifest entry of an SAE folder, from its record and its files; those that are `known` are not read."""
    folder = safe_join(root, path)
    if path == ROOT_ID:
        names = [p for name in ROOT_FILES if (p := folder / name).is_file()]
        names += sorted(p for p in (folder / "raw").rglob("*") if p.is_file())
    else:
        names = sorted(p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder).as_posix()))
    paths = [p.relative_to(root).as_posix() for p in names]
    known = known or {}
    extra = dict(keep.model_extra or {}) if keep is not None else {}
    files = [known.get(p) or FileEntry.of(root, p) for p in paths]
    return SAEEntry(id=id, path=path, files=files, **SAEEntry.known_from(metadata), **extra)


def check_files(root: Path, files: Iterable[FileEntry], *, hashes: bool) -> None:
    """Compare files on disk with their manifest entries (whose paths were checked when they were read)."""
    for entry in files:
        file = os.path.join(root, entry.path)
        try:
            found = os.stat(file)
        except OSError:
            raise FormatError(
                file, f"a file of {entry.size} bytes", "no such file", hint="the release is incomplete"
            ) from None
        if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size:
            raise FormatError(
                file,
                f"{entry.size} bytes as the manifest says",
                f"{found.st_size}",
                hint="download it again; after a change of your own run release.refresh()",
            )
        if hashes and (digest := sha256_file(file)) != entry.sha256:
            raise FormatError(
                file,
                f"sha256 {entry.sha256[:16]}... as the manifest says",
                f"{digest[:16]}...",
                hint="the file is damaged; download it again. After a change of your own run release.refresh()",
            )
