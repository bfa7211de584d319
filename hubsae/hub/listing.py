"""Tables and descriptions of what a repo holds, from its manifest and file headers; no weights are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hubsae.core.files import safe_join, safetensors_header
from hubsae.core.text import format_bytes
from hubsae.hub.catalog import Catalog, Entry, checked_filters, open_catalog
from hubsae.hub.client import HubClient


class SAETable(list[dict[str, Any]]):
    """A list of rows (dicts) that prints as a table, in a terminal and in a notebook.

    >>> print(SAETable([{"id": "layer6", "layer": 6, "k": 64, "bytes": 51_416_064}]))
    id      layer   k     size
    layer6      6  64  51.4 MB
    """

    columns_first = ("id", "layer", "stage", "architecture", "d_in", "d_sae", "k", "hook_point")

    def columns(self) -> list[str]:
        """Columns in which any row says something."""
        names = dict.fromkeys(key for row in self for key in row)
        return [name for name in names if any(row.get(name) is not None for row in self)]

    def __str__(self) -> str:
        names = self.columns()
        table = [[("size" if n == "bytes" else n) for n in names]]
        table += [[_text(row.get(name), name) for name in names] for row in self]
        widths = [max(len(line[i]) for line in table) for i in range(len(names))]
        right = [any(isinstance(row.get(n), int | float) for row in self) for n in names]
        lines = (
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
            for line in table
        )
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        from html import escape

        names = self.columns()
        head = "".join(f"<th>{escape('size' if n == 'bytes' else n)}</th>" for n in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(_text(row.get(n), n))}</td>" for n in names) + "</tr>" for row in self
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def list_saes(
    repo_or_path: str | os.PathLike[str],
    id: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **filters: Any,
) -> SAETable:
    """Every SAE of a repo or folder that fits: id, layer, stage, architecture, d_sae, k, metrics, size.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.save_pretrained(folder)
    ...     [row["id"] for row in list_saes(folder)]
    ['.']
    """
    client = HubClient(token, endpoint or "", cache_dir or "", local_files_only)
    catalog = open_catalog(client, repo_or_path, revision)
    return SAETable(entry.row() for entry in catalog.select(id, checked_filters(filters)))


class Description(dict[str, Any]):
    """What `describe` found: plain data, and `lines()` for people."""

    def lines(self) -> list[str]:
        """As text."""
        at = f"@{self['revision']}" if self["revision"] else ""
        commit = f", commit {self['commit'][:10]}" if self["commit"] else ""
        release = self["release"] or {}
        lines = [f"{self['repo']}{at}: {len(self['saes'])} SAE{'s' if len(self['saes']) != 1 else ''}{commit}"]
        lines += [f"  {k.replace('_', ' ')}: {_said(v)}" for k, v in release.items() if k in _RELEASE_FACTS and v]
        if not release:
            lines.append("  no release manifest: listed by file names; weights are read when an SAE is loaded")
        if "sae" not in self:
            return [*lines, "", *str(SAETable(self["saes"])).splitlines()]
        sae = self["sae"]
        lines += [f"  {name}: {_said(sae[name])}" for name in sae if name not in _NOT_FACTS and sae[name] is not None]
        record = sae.get("metadata.json") or {}
        for section in ("base_model", "hook", "normalizer", "training", "activations", "provenance"):
            known = {k: v for k, v in record.get(section, {}).items() if v not in (None, "", {}, [])}
            if known:
                lines.append(
                    f"  {section.replace('_', ' ')}: " + ", ".join(f"{k} {_said(v)}" for k, v in known.items())
                )
        for file, tensors in sae.get("tensors", {}).items():
            shapes = ", ".join(f"{n} {t['shape']} {t['dtype']}" for n, t in tensors.items())
            lines.append(f"  {file.rpartition('/')[2]}: {shapes}")
        return lines


_RELEASE_FACTS = ("name", "base_model", "base_model_revision", "license", "datasets", "description")
_NOT_FACTS = ("files", "tensors", "metadata.json", "cfg.json", "model.metadata.json")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k} {_said(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_said(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe(
    repo: str,
    id: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **filters: Any,
) -> Description:
    """What is at a repo, or at one SAE of it: names, shapes, metrics, record. Reads headers, never weights.

    `repo` may carry the id too: `name/repo/saes_k64/layer6`, and a revision: `name/repo@v1`.
    """
    client = HubClient(token, endpoint or "", cache_dir or "")
    repo, id, revision = _split_inside(repo, id, revision)
    catalog = open_catalog(client, repo, revision)
    chosen = catalog.select(id, checked_filters(filters))
    overview = Description(
        repo=catalog.repo_id or str(catalog.root),
        revision=catalog.revision,
        commit=catalog.sha,
        release=None if catalog.manifest is None else _release(catalog),
        saes=[entry.row() for entry in chosen],
    )
    if len(chosen) == 1:
        overview["sae"] = _one(client, catalog, chosen[0])
    return overview


def _split_inside(repo: str, id: str | None, revision: str | None) -> tuple[str, str | None, str | None]:
    if Path(repo).expanduser().exists() or repo.startswith((".", "/", "~")):
        return repo, id, revision
    name, at, rest = repo.partition("@")
    # a revision may hold slashes (refs/pr/1), an id after it cannot be told apart: it is its own argument then
    parts = name.split("/")
    if len(parts) > 2:
        name, inside = "/".join(parts[:2]), "/".join(parts[2:])
        id = inside if id is None else f"{inside}/{id}"
    return name, id, rest if at else revision


def _release(catalog: Catalog) -> dict[str, Any]:
    assert catalog.manifest is not None
    return catalog.manifest.model_dump(exclude={"saes", "files"}, exclude_none=True)


def _one(client: HubClient, catalog: Catalog, entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {
        **entry.row(),
        "files": [{"path": f.path, "bytes": f.size, "sha256": f.sha256} for f in entry.files],
    }
    for file in entry.files:
        if file.path.endswith(".safetensors"):
            found.setdefault("tensors", {})[file.path] = _header(client, catalog, file.path)
        elif file.path.rpartition("/")[2] in ("metadata.json", "cfg.json", "model.metadata.json"):
            found[file.path.rpartition("/")[2]] = _small_json(client, catalog, file.path)
    return found


def _small_json(client: HubClient, catalog: Catalog, path: str) -> Any:
    if catalog.root is not None:
        place = safe_join(catalog.root, path)
    else:
        place = client.download(str(catalog.repo_id), path, revision=catalog.sha)
    return json.loads(Path(place).read_text(encoding="utf-8"))


def _header(client: HubClient, catalog: Catalog, path: str) -> dict[str, dict[str, Any]]:
    """Names, types and shapes of a safetensors file: of the one here, or from the first bytes of the remote one."""
    if catalog.root is not None:
        place = safe_join(catalog.root, path)
    else:
        place = client.cached_snapshot(str(catalog.repo_id), str(catalog.sha)) / path
        if not place.is_file():
            return client.safetensors_header(str(catalog.repo_id), path, revision=str(catalog.sha))
    tensors = safetensors_header(place).tensors
    return {name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in tensors.items()}


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if column == "bytes":
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
