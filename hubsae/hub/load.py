"""Load SAEs from the Hub or a local folder: resolve once, fetch only what is needed, check it, read it.

A load goes: `config.json` at the revision (one HEAD when cached; the Hub counts it) -> the commit and the manifest ->
the files of one SAE at exactly that commit -> size and sha256 against the manifest -> tensors on the device.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hubsae.core.errors import ConfigError, HubSAEError, NotFoundError
from hubsae.core.files import atomic_path, safe_join, sha256_file
from hubsae.core.options import named_options, pass_on
from hubsae.core.progress import progress
from hubsae.core.sae import SAE
from hubsae.formats import native
from hubsae.formats.names import parse_name
from hubsae.formats.registry import read
from hubsae.formats.select import FILTERS, chosen_by
from hubsae.hub.catalog import CACHE_NOTES, Catalog, Entry, ExpectedFile, open_catalog
from hubsae.hub.client import HubClient
from hubsae.hub.errors import IntegrityError, OfflineError
from hubsae.hub.explain import not_cached


@dataclass(frozen=True)
class Where:
    """Which Hub is asked, as whom, at what revision, and what may be cached."""

    revision: str | None = None
    token: str | bool | None = None
    endpoint: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False

    def client(self) -> HubClient:
        """The connection."""
        return HubClient(self.token, self.endpoint or "", self.cache_dir or "", self.local_files_only)

    def catalog(self, client: HubClient, repo_or_path: str | os.PathLike[str]) -> Catalog:
        """What there is."""
        return open_catalog(client, repo_or_path, self.revision, force=self.force_download)


@dataclass(frozen=True)
class Reading:
    """How files become an SAE."""

    device: str | torch.device = "cpu"
    dtype: torch.dtype | str | None = None
    features: Sequence[int] | None = None
    format: str | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)
    """For the readers of files that no manifest describes, by the names of `formats.Overrides` and `FILTERS`."""

    def checked(self) -> Reading:
        """With the type it means; a wrong type or device is refused before anything is asked or downloaded."""
        dtype = _checked_dtype(self.dtype)
        try:
            wanted = torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"{self.device!r} is no device", hint="for instance: cpu, cuda, cuda:1, mps") from error
        if wanted.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"device {str(wanted)!r}: this machine has no CUDA that torch can use", hint='device="cpu"'
            )
        return replace(self, dtype=dtype, choices={n: v for n, v in self.choices.items() if v is not None})


CHOICES = (
    "topk_relu", "threshold", "decode_adds_b_pre", "apply_b_dec_to_input", "transposed", "token_norm", "input_scale",
    "hook", "hook_out", "map",
)  # fmt: skip
"""Choices for readers that are no filters too."""


def what_is_asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Filters, place and reading for `load_each`, from what a public function was given (its `locals()`)."""
    return {
        "filters": chosen_by(given),
        "where": pass_on(Where, given),
        "reading": pass_on(Reading, given, choices={name: given[name] for name in CHOICES}),
    }


def load_each(
    repo_or_path: str | os.PathLike[str],
    id: str | None = None,
    *,
    filters: Mapping[str, Any] | None = None,
    where: Where = Where(),
    reading: Reading = Reading(),
    one: bool = False,
) -> Iterator[tuple[str, SAE]]:
    """(id, SAE) for every SAE of one commit that fits, or for the only one that may; one is in memory at a time.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.save_pretrained(folder)
    ...     [(name, sae.config.k) for name, sae in load_each(folder)]
    [('.', 2)]
    """
    reading = reading.checked()
    client = where.client()
    catalog = where.catalog(client, repo_or_path)
    chosen = [catalog.choose(id, filters)] if one else catalog.select(id, filters)

    def each() -> Iterator[tuple[str, SAE]]:
        for entry in chosen:
            path = fetch(client, catalog, entry, force=where.force_download)
            sae = read_entry(entry, path, reading, filters or {})
            if entry.registered is not None:
                entry.registered.record(sae, catalog.sha)
            yield entry.id, sae

    return each()


@named_options
def pull(
    repo: str,
    id: str | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    layer: int | Sequence[int] | None = None,
    stage: str | Sequence[str] | None = None,
    k: int | Sequence[int] | None = None,
    architecture: str | Sequence[str] | None = None,
    d_in: int | None = None,
    d_sae: int | Sequence[int] | None = None,
    hook_point: str | Sequence[str] | None = None,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    bar: bool | None = None,
) -> Path:
    """Download the SAEs that fit into the cache, or into a folder; returns the folder they lie in.

    What is fetched is checked like in a load. A folder `out` is a release of its own: its manifest lists what is there.

    >>> pull("OhhMoo/sae-rl-qwen05b-strict", layer=18, out="layer18/")      # doctest: +SKIP
    PosixPath('layer18')

    Args:
        repo: `owner/name`, `owner/name@revision`, or the name of a release that SAELens registers.
        id: One SAE, or a folder of them; all where it is left out.
        out: Folder to copy them into; the Hub's cache without it.
        layer, stage, k, architecture, d_in, d_sae, hook_point, base_model, base_model_revision: Only SAEs that fit; of
            most, several values choose several.
        revision: Branch, tag, commit or `refs/pr/N`.
        token: Access token; False sends none, None the one that is logged in.
        endpoint: Address of the Hub, in place of HF_ENDPOINT.
        cache_dir: Cache folder, in place of the usual one.
        force_download: Fetch again what is cached.
        bar: Show progress; by default where somebody watches.
    """
    filters, where = chosen_by(locals()), pass_on(Where, locals())
    client = where.client()
    catalog = where.catalog(client, repo)
    selected = catalog.select(id, filters)
    if catalog.root is not None or catalog.repo_id is None or catalog.sha is None:
        raise HubSAEError(f"{repo} is a local folder already", hint="pull takes a repo on the Hub: name/repo")
    whole = len(selected) == len(catalog.entries)
    files = [file for entry in selected for file in entry.files]
    with (
        client.quiet(),
        progress(f"downloading from {repo}", sum(f.size for f in files), "bytes", show=bar) as task,
    ):
        for entry in selected:
            fetch(client, catalog, entry, force=force_download, everything=True)
            task.advance(entry.size)
    extra = catalog.manifest.files if catalog.manifest is not None and whole else []
    for file in extra:
        _fetch_file(client, catalog, ExpectedFile(file.path, file.size, file.sha256), force_download)
    snapshot = client.cached_snapshot(catalog.repo_id, catalog.sha)
    if out is None:
        return snapshot
    target = Path(out)
    for file in [*files, *extra]:
        with atomic_path(safe_join(target, file.path)) as partial:
            shutil.copyfile(snapshot / file.path, partial)
    if catalog.manifest is not None:
        ids = {entry.id for entry in selected}
        part = catalog.manifest.model_copy(
            update={"saes": [e for e in catalog.manifest if e.id in ids], "files": list(extra)}
        )
        part.write(target)
    return target


# -- fetching ----------------------------------------------------------------------------------------------------


def fetch(client: HubClient, catalog: Catalog, entry: Entry, *, force: bool = False, everything: bool = False) -> Path:
    """Have the files of an SAE here that a load reads (or everything), checked; the path its reader wants."""
    files = entry.files if everything else entry.needed
    if catalog.root is not None:
        for file in files:
            if entry.native:
                _expect_local(catalog.root, file)
        return catalog.root if entry.path == "." else safe_join(catalog.root, entry.path)
    folder: Path | None = None
    for file in files:
        folder = _fetch_file(client, catalog, file, force)
    if folder is None and entry.registered is not None:
        raise NotFoundError(
            f"{entry.id} is registered at {entry.path} of {catalog.repo_id}, where no SAE that hubsae reads lies",
            hint=f"what is there: hubsae ls {catalog.repo_id}",
        )
    if folder is None:
        raise IntegrityError(f"{catalog.source} lists no files for {entry.id}")
    return folder if entry.path == "." else safe_join(folder, entry.path)


def _expect_local(root: Path, file: ExpectedFile) -> None:
    path = safe_join(root, file.path)
    found = path.stat().st_size if path.is_file() else None
    if found != file.size:
        there = "no file" if found is None else f"{found} bytes"
        raise IntegrityError(
            f"{path}: expected {file.size} bytes as config.json says, found {there}",
            hint="the folder was changed after it was packaged; package it again",
        )


def _fetch_file(client: HubClient, catalog: Catalog, file: ExpectedFile, force: bool) -> Path:
    """One file at the catalog's commit, in the cache and as it should be; the snapshot folder."""
    assert catalog.repo_id is not None and catalog.sha is not None
    safe_join("repo", file.path)
    problem = ""
    for attempt in (1, 2):
        try:
            path = client.download(
                catalog.repo_id, file.path, revision=catalog.sha, force=(force and attempt == 1) or attempt == 2
            )
        except OfflineError as error:
            raise not_cached(client, catalog.source, file.path) from error
        problem = _problem(client, catalog, path, file)
        if not problem:
            return client.cached_snapshot(catalog.repo_id, catalog.sha)
        _forget(path)
        if client.offline:
            break
        if attempt == 1:
            client.say(f"{file.path}: {problem}; downloading it again")
    raise IntegrityError(
        f"{file.path} of {catalog.source}: {problem}",
        hint="the copy was removed from the cache; "
        + (
            "go online once to fetch it again"
            if client.offline
            else "the file on the Hub itself differs from its manifest"
        ),
    )


def _problem(client: HubClient, catalog: Catalog, path: Path, file: ExpectedFile) -> str:
    """What is wrong with a downloaded file, or "". A file that was hashed once is not hashed again."""
    blob = path.resolve()
    stat = blob.stat()
    if stat.st_size != file.size:
        return f"expected {file.size} bytes, found {stat.st_size}"
    if file.sha256 is None:
        return ""
    assert catalog.repo_id is not None and catalog.sha is not None
    notes = client.cached_snapshot(catalog.repo_id, catalog.sha).parents[1] / CACHE_NOTES
    note, stamp = notes / f"ok-{file.sha256}", f"{blob.name} {stat.st_size} {stat.st_mtime_ns}"
    with suppress(OSError):
        if note.read_text() == stamp:
            return ""
    found = sha256_file(blob)
    if found != file.sha256:
        return f"expected sha256 {file.sha256[:16]}..., found {found[:16]}..."
    with suppress(OSError):  # a read-only cache is hashed each time
        notes.mkdir(exist_ok=True)
        note.write_text(stamp)
    return ""


def _forget(path: Path) -> None:
    """Remove a bad file from the cache: the snapshot's link and the blob behind it."""
    for target in (path.resolve(), path):
        with suppress(OSError):
            target.unlink()


# -- reading -----------------------------------------------------------------------------------------------------


def read_entry(entry: Entry, path: Path, reading: Reading, filters: Mapping[str, Any]) -> SAE:
    """Read the files of one SAE: a hubsae folder directly, anything else through its format."""
    how = {"device": reading.device, "dtype": reading.dtype, "features": reading.features}
    if entry.native or ((path / "metadata.json").is_file() and (path / "sae_weights.safetensors").is_file()):
        if left := [*reading.choices, *(["format"] if reading.format not in (None, "native") else [])]:
            raise ConfigError(
                f"{entry.id} says everything itself; {', '.join(left)} cannot be chosen",
                hint="such choices are for files that no metadata.json describes",
            )
        return native.read(path, **how)
    # a filter that the path already answered has chosen the file; the content says the rest, and knows better
    asked = {n: v for n, v in filters.items() if v is not None and n not in entry.facts and n in _FOR_READER}
    inside = parse_name(path.name)
    known = {n: entry.facts[n] for n in ("layer", "stage") if n in entry.facts and getattr(inside, n) is None}
    choices = {_FOR_READER[n]: v for n, v in {**known, **asked}.items()}
    registered = {} if entry.registered is None else entry.registered.choices(path)
    return read(path, reading.format, **how, **{**registered, **choices, **reading.choices})


# filters that tell a reader something where the file's name does not answer them
_FOR_READER = {name: name for name in FILTERS if name not in ("d_in", "d_sae")} | {"hook_point": "hook"}


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"dtype {dtype!r} is not a floating-point type", hint="one of: float32, float64, bfloat16, float16"
        )
    return found
