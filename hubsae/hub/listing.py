"""What a repo, folder or file holds: a table of its SAEs, or a description; of repos only headers are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubsae.core.errors import HubSAEError
from hubsae.core.files import read_json, safe_join
from hubsae.core.metadata import Metadata
from hubsae.core.options import named_options
from hubsae.core.text import check_name
from hubsae.formats import describe as formats_describe
from hubsae.formats.describe import Description, TensorInfo, fill_record, release_facts
from hubsae.formats.manifest import Manifest
from hubsae.formats.select import chosen_by
from hubsae.formats.table import SAETable
from hubsae.formats.tensors import safetensors_header
from hubsae.hub import registered
from hubsae.hub.catalog import Catalog, Entry, open_catalog
from hubsae.hub.client import HubClient
from hubsae.hub.errors import RepoNotFoundError

__all__ = ["Description", "SAETable", "describe", "list_saes"]

_REPO = re.compile(r"[\w.-]+(/[\w.+=-]+)+(@[\w./-]+)?")
_SAE_FILES = ("sae_weights.safetensors", "cfg.json", "metadata.json")


@named_options
def list_saes(
    repo_or_path: str | os.PathLike[str],
    id: str | None = None,
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
    local_files_only: bool = False,
) -> SAETable:
    """Every SAE of a repo or folder that fits, as a list of dicts that prints as a table; no weights are read.

    Printed, it has the columns by which one chooses, metrics in the scope that each SAE is for; a row has everything,
    `text(all=True)` prints it and `to_pandas()` makes a DataFrame of it.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.save_pretrained(folder)
    ...     [row["id"] for row in list_saes(folder)]
    ['.']

    Args:
        repo_or_path: `owner/name`, `owner/name@revision`, a folder, a file, or a name that SAELens registers.
        id: Only SAEs in this folder of it.
        layer, stage, k, architecture, d_in, d_sae, hook_point, base_model, base_model_revision: Only SAEs that fit; of
            most, several values choose several.
        revision: Branch, tag, commit or `refs/pr/N`.
        token: Access token; False sends none, None the one that is logged in.
        endpoint: Address of the Hub, in place of HF_ENDPOINT.
        cache_dir: Cache folder, in place of the usual one.
        local_files_only: Ask no Hub; use what is cached.
    """
    filters = chosen_by(locals())
    client = HubClient(token, endpoint or "", cache_dir or "", local_files_only)
    catalog = open_catalog(client, repo_or_path, revision)
    return SAETable(entry.row() for entry in catalog.select(id, filters))


def describe(
    path_or_repo: str | os.PathLike[str],
    id: str | None = None,
    *,
    format: str | None = None,
    choices: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Description:
    """What is at a path or repo, as `hubsae show` prints it: an SAE, a release, a pile of files, activations.

    A repo may carry the id too: `name/repo/saes_k64/layer6`, and a revision: `name/repo@v1`. `format` and `choices`
    are for the reader of a local file that no metadata.json describes.
    """
    here = Path(path_or_repo).expanduser()
    text = os.fspath(path_or_repo)
    named = registered.is_name(text)
    if here.exists() or text.startswith((".", "/")) or not (named or _REPO.fullmatch(text)):
        if here.is_dir() and _is_activations(here):
            from hubsae.activations.manifest import describe as describe_activations

            return Description(str(here), "activations", activations=describe_activations(here))
        return formats_describe.describe(here, format, **(choices or {}))
    client = HubClient(token, endpoint or "", cache_dir or "")
    repo, id, revision = _split_inside(text, id, revision)
    try:
        catalog = open_catalog(client, repo, revision)
    except RepoNotFoundError:
        found = _dataset(repo, revision, token)
        if found is None:
            raise
        return found
    return _remote(client, catalog, id)


def _dataset(repo: str, revision: str | None, token: str | bool | None) -> Description | None:
    """What an activation dataset of that name holds, or None if there is none."""
    from hubsae.hub.activations import describe as describe_activations

    try:
        return Description(repo, "activations", activations=describe_activations(repo, revision=revision, token=token))
    except HubSAEError:
        return None


def _is_activations(folder: Path) -> bool:
    """Parquet shards, and no SAE or release beside them (whose index of features is Parquet too)."""
    if Manifest.lies_in(folder) or any((folder / name).exists() for name in _SAE_FILES):
        return False
    return next(folder.rglob("*.parquet"), None) is not None


def _split_inside(repo: str, id: str | None, revision: str | None) -> tuple[str, str | None, str | None]:
    name, at, rest = repo.partition("@")
    # a revision may hold slashes (refs/pr/1), an id after it cannot be told apart: it is its own argument then
    parts = name.split("/")
    if len(parts) > 2:
        name, inside = "/".join(parts[:2]), "/".join(parts[2:])
        id = inside if id is None else f"{inside}/{id}"
    return name, id, rest if at else revision


def _remote(client: HubClient, catalog: Catalog, id: str | None) -> Description:
    chosen = catalog.select(id)
    found = Description(catalog.source, "release" if catalog.manifest is not None else "folder of SAEs")
    found.facts = {"commit": catalog.sha} if catalog.sha else {}
    if catalog.manifest is not None:
        found.facts |= release_facts(catalog.manifest)
    else:
        found.notes.append("no release manifest: listed by file names; weights are read when an SAE is loaded")
    if len(chosen) > 1:
        found.saes = SAETable(entry.row() for entry in chosen)
        return found
    found.kind = "sae"
    found.path = f"{catalog.source}/{chosen[0].id}" if chosen[0].id != "." else catalog.source
    _one(found, client, catalog, chosen[0])
    return found


def _one(found: Description, client: HubClient, catalog: Catalog, entry: Entry) -> None:
    found.files = [{"path": f.path, "bytes": f.size, "sha256": f.sha256} for f in entry.files]
    if not entry.native:
        found.facts |= {name.replace("_", " "): value for name, value in entry.facts.items()}
    for file in entry.files:
        name = file.path.rpartition("/")[2]
        if name.endswith(".safetensors"):
            header = _header(client, catalog, file.path)
            found.tensors += [TensorInfo(f"{name}: {n}", shape, dtype) for n, (dtype, shape) in header.items()]
        elif entry.native and name == "metadata.json":
            assert catalog.repo_id is not None
            place = client.download(catalog.repo_id, file.path, revision=catalog.sha)
            record = Metadata.from_dict(read_json(place), where=f"{catalog.source}/{file.path}")
            fill_record(found, record, record.config)


def _header(client: HubClient, catalog: Catalog, path: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes of a safetensors file: of the cached one, or from the first bytes of the remote one."""
    place = safe_join(client.cached_snapshot(str(catalog.repo_id), str(catalog.sha)), check_name(path, "a path"))
    if place.is_file():
        return safetensors_header(place)
    return client.safetensors_header(str(catalog.repo_id), path, revision=str(catalog.sha))
