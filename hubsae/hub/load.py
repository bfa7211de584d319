"""Load SAEs from the Hub or a local folder: resolve once, fetch only what is needed, check it, read it.

A load goes: `config.json` at the revision (one HEAD when cached; the Hub counts it) -> the commit and the manifest ->
the files of one SAE at exactly that commit -> size and sha256 against the manifest -> tensors on the device.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubsae.core.errors import ConfigError, HubSAEError, nearest
from hubsae.core.files import safe_join, sha256_file
from hubsae.core.progress import progress
from hubsae.formats.base import Overrides
from hubsae.formats.names import parse_name
from hubsae.hub.catalog import CACHE_NOTES, FILTERS, Catalog, Entry, ExpectedFile, open_catalog
from hubsae.hub.client import HubClient
from hubsae.hub.errors import IntegrityError, OfflineError

if TYPE_CHECKING:
    import torch

    from hubsae.core.sae import SAE


def load_pretrained(
    repo_or_path: str | os.PathLike[str],
    id: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    features: Sequence[int] | None = None,
    **choices: Any,
) -> SAE:
    """One SAE from a repo (`name/repo`, `name/repo@revision`) or a local folder or file.

    Without an `id`, filters choose: `layer=18, stage="ppo_step116", k=64`. For files that no manifest describes,
    further `choices` go to their reader (`decode_adds_b_pre=`, `topk_relu=`, `k=` ...; see docs/formats.md).

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.save_pretrained(folder)
    ...     load_pretrained(folder).config.k
    2
    """
    _check_choices(choices, dtype, device)
    client = _client(token, endpoint, cache_dir, local_files_only)
    catalog = open_catalog(client, repo_or_path, revision, force=force_download)
    entry = catalog.choose(_joined(subfolder, id), _filters(choices))
    path = fetch(client, catalog, entry, force=force_download)
    return read_entry(entry, path, device=device, dtype=_checked_dtype(dtype), features=features, choices=choices)


def iter_pretrained(
    repo_or_path: str | os.PathLike[str],
    *,
    id: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    features: Sequence[int] | None = None,
    **choices: Any,
) -> Iterator[tuple[str, SAE]]:
    """(id, SAE) for every SAE of one commit that fits the filters; one is in memory at a time."""
    _check_choices(choices, dtype, device)
    client = _client(token, endpoint, cache_dir, local_files_only)
    catalog = open_catalog(client, repo_or_path, revision, force=force_download)
    selected = catalog.select(id, _filters(choices))

    def each() -> Iterator[tuple[str, SAE]]:
        for entry in selected:
            path = fetch(client, catalog, entry, force=force_download)
            yield (
                entry.id,
                read_entry(entry, path, device=device, dtype=_checked_dtype(dtype), features=features, choices=choices),
            )

    return each()


def pull(
    repo: str,
    id: str | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    bar: bool | None = None,
    **filters: Any,
) -> Path:
    """Download the SAEs that fit into the cache, or into a folder `out`; the folder they lie in.

    What is fetched is checked like in a load. A folder `out` is a release of its own: its manifest lists what is there.

    >>> pull("OhhMoo/sae-rl-qwen05b-strict", layer=18, out="layer18/")      # doctest: +SKIP
    PosixPath('layer18')
    """
    client = _client(token, endpoint, cache_dir, False)
    catalog = open_catalog(client, repo, revision, force=force_download)
    selected = catalog.select(id, _filters(filters))
    if catalog.root is not None or catalog.repo_id is None or catalog.sha is None:
        raise HubSAEError(f"{repo} is a local folder already", hint="pull takes a repo on the Hub: name/repo")
    whole = len(selected) == len(catalog.entries)
    files = [file for entry in selected for file in entry.files]
    with (
        client.quiet(),
        progress(f"downloading from {repo}", sum(f.size or 0 for f in files), "bytes", show=bar) as task,
    ):
        for entry in selected:
            fetch(client, catalog, entry, force=force_download, everything=True)
            task.advance(entry.size or 0)
    extra = catalog.manifest.files if catalog.manifest is not None and whole else []
    for file in extra:
        _fetch_file(client, catalog, ExpectedFile(file.path, file.size, file.sha256), force_download)
    snapshot = client.cached_snapshot(catalog.repo_id, catalog.sha)
    if out is None:
        return snapshot
    target = Path(out)
    for file in [*files, *extra]:
        place = safe_join(target, file.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.partial")
        shutil.copyfile(snapshot / file.path, partial)
        os.replace(partial, place)
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
            raise OfflineError(
                f"{file.path} of {catalog.source} is not in the cache ({client.cache_dir}) and the Hub is not asked "
                "(offline)",
                hint=f"once with a network: hubsae pull {catalog.source}; then HF_HUB_OFFLINE=1 works",
            ) from error
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
    if file.size is not None and stat.st_size != file.size:
        return f"expected {file.size} bytes, found {stat.st_size}"
    if file.sha256 is None:
        return ""
    assert catalog.repo_id is not None and catalog.sha is not None
    notes = client.cached_snapshot(catalog.repo_id, catalog.sha).parents[1] / CACHE_NOTES
    note, stamp = notes / f"ok-{file.sha256}", f"{blob.name} {stat.st_size} {stat.st_mtime_ns}"
    try:
        if note.read_text() == stamp:
            return ""
    except OSError:
        pass
    found = sha256_file(blob)
    if found != file.sha256:
        return f"expected sha256 {file.sha256[:16]}..., found {found[:16]}..."
    try:
        notes.mkdir(exist_ok=True)
        note.write_text(stamp)
    except OSError:
        pass  # a read-only cache is hashed each time
    return ""


def _forget(path: Path) -> None:
    """Remove a bad file from the cache: the snapshot's link and the blob behind it."""
    for target in (path.resolve(), path):
        try:
            target.unlink()
        except OSError:
            pass


# -- reading -----------------------------------------------------------------------------------------------------


def read_entry(
    entry: Entry,
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    features: Sequence[int] | None = None,
    choices: dict[str, Any] | None = None,
) -> SAE:
    """Read the files of one SAE: a hubsae folder directly, anything else through its format."""
    if entry.native or ((path / "metadata.json").is_file() and (path / "sae_weights.safetensors").is_file()):
        from hubsae.formats import native

        left = {name: value for name, value in (choices or {}).items() if value is not None and name not in FILTERS}
        if left:
            raise ConfigError(
                f"{entry.id} says everything itself; {', '.join(left)} cannot be chosen",
                hint="such choices are for files that no metadata.json describes",
            )
        return native.read(path, device=device, dtype=dtype, features=features)
    from hubsae import formats

    # a filter that the path already answered has chosen the file; the content says the rest, and knows better
    asked = {n: v for n, v in (choices or {}).items() if v is not None and n not in entry.fields}
    inside = parse_name(path.name)
    known = {n: entry.fields[n] for n in ("layer", "stage") if n in entry.fields and getattr(inside, n) is None}
    return formats.read(path, device=device, dtype=dtype, features=features, **_for_reader(known | asked))


def _for_reader(choices: dict[str, Any]) -> dict[str, Any]:
    renamed = {"hook_point": "hook"}
    dropped = ("d_in", "d_sae")
    return {renamed.get(name, name): value for name, value in choices.items() if name not in dropped}


def _check_choices(choices: dict[str, Any], dtype: torch.dtype | str | None, device: str | torch.device) -> None:
    """Refuse misspelt options, types and devices before anything is asked or downloaded."""
    import torch

    known = [*FILTERS, "format", *Overrides.__dataclass_fields__]
    for name in choices:
        if name not in known:
            raise ConfigError(
                f"there is no option {name!r}",
                hint=f"nearest: {nearest(name, dict.fromkeys(known))}; filters: {', '.join(FILTERS)}",
            )
    _checked_dtype(dtype)
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is no device", hint="for instance: cpu, cuda, cuda:1, mps") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r}: this machine has no CUDA that torch can use", hint='device="cpu"')


def _filters(choices: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if name in FILTERS}


def _joined(subfolder: str | None, id: str | None) -> str | None:
    if subfolder and id:
        return f"{subfolder.strip('/')}/{id}"
    return id or subfolder


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        found = dtype
    else:
        found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if dtype is not None and (not isinstance(found, torch.dtype) or not found.is_floating_point):
        raise ConfigError(
            f"dtype {dtype!r} is not a floating-point type", hint="one of: float32, float64, bfloat16, float16"
        )
    return found


def _client(
    token: str | bool | None,
    endpoint: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> HubClient:
    return HubClient(token, endpoint or "", cache_dir or "", local_files_only)
