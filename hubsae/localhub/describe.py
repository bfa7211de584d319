"""How repos, commits and tree entries are described to the clients (the JSON of info, list, tree and commits)."""

from __future__ import annotations

import json
import struct
from typing import Any

from .cards import split_card
from .errors import HubError, bad_request
from .gitstore import Commit, Entry
from .history import last_commits
from .repos import Repo, iso

_EXPANDABLE = frozenset(
    [
        "author",
        "baseModels",
        "cardData",
        "childrenModelCount",
        "citation",
        "config",
        "createdAt",
        "description",
        "disabled",
        "downloads",
        "downloadsAllTime",
        "evalResults",
        "gated",
        "gguf",
        "inference",
        "inferenceProviderMapping",
        "lastModified",
        "library_name",
        "likes",
        "mainSize",
        "mask_token",
        "model-index",
        "models",
        "datasets",
        "paperswithcode_id",
        "pipeline_tag",
        "private",
        "resourceGroup",
        "runtime",
        "safetensors",
        "sdk",
        "securityRepoStatus",
        "sha",
        "siblings",
        "spaces",
        "subdomain",
        "tags",
        "transformersInfo",
        "trendingScore",
        "usedStorage",
        "widgetData",
        "xetEnabled",
        "gitalyUid",
        "region",
        "authorData",
    ]
)


def describe_repo(
    repo: Repo,
    commit: str | None = None,
    *,
    expand: list[str] | None = None,
    blobs: bool = False,
    full: bool = True,
    security: bool = False,
) -> dict[str, Any]:
    """Everything the Hub says about a repo at a commit (default: newest of main), or only the `expand`ed fields."""
    unknown = [e for e in expand or [] if e not in _EXPANDABLE]
    if unknown:
        raise bad_request(f'"expand" must be one of [{", ".join(sorted(_EXPANDABLE))}], not {unknown[0][:80]!r}')
    sha = commit or _head(repo)
    card, text = repo.card(sha) if sha else ({}, "")
    when = repo.git.commit(sha).when if sha else repo.meta["created"]
    info: dict[str, Any] = {
        "_id": repo.meta["uid"],
        "id": repo.id,
        "author": repo.owner,
        "sha": sha,
        "lastModified": iso(when),
        "createdAt": iso(repo.meta["created"]),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": repo.meta.get("downloads", 0),
        "likes": len(repo.meta.get("likes", [])),
        "tags": repo.tags(sha) if sha else [],
    }
    wanted = set(expand or [])
    if repo.kind == "models":
        info["modelId"] = repo.id
        if isinstance(card.get("library_name"), str):
            info["library_name"] = card["library_name"]
        if isinstance(card.get("pipeline_tag"), str):
            info["pipeline_tag"] = card["pipeline_tag"]
    if repo.kind == "spaces":
        info["sdk"] = repo.meta.get("sdk") or card.get("sdk")
        info["subdomain"] = repo.id.replace("/", "-").replace("_", "-").lower()
        info["runtime"] = {"stage": "NO_APP_FILE", "hardware": {"current": None, "requested": None}, "storage": None}
    if full or wanted:
        info["cardData"] = card
        info["siblings"] = _siblings(repo, sha, blobs) if sha else []
    if repo.kind == "datasets" and (full or wanted):
        info["description"] = " ".join(split_card(text)[1].split())[:200]
    if full or "usedStorage" in wanted:
        info["usedStorage"] = used_storage(repo, sha)
    if repo.kind == "models" and (full or wanted & {"config", "transformersInfo", "safetensors"}) and sha:
        info.update(_model_extras(repo, sha))
    if (full and "model-index" in card) or "model-index" in wanted:
        info["model-index"] = card.get("model-index")
    if security:
        info["securityRepoStatus"] = {"scansDone": False, "filesWithIssues": []}
    if expand:
        defaults: dict[str, Any] = {
            "downloadsAllTime": info["downloads"],
            "trendingScore": 0,
            "resourceGroup": None,
            "baseModels": None,
            "childrenModelCount": 0,
            "spaces": [],
            "models": [],
            "datasets": [],
            "inferenceProviderMapping": [],
            "evalResults": [],
            "securityRepoStatus": {"scansDone": False, "filesWithIssues": []},
            "mainSize": info.get("usedStorage", used_storage(repo, sha)),
            "xetEnabled": True,
        }
        kept = {"_id", "id", *(("modelId",) if repo.kind == "models" and "modelId" in wanted else ())}
        return {k: v for k, v in {**defaults, **info}.items() if k in kept or k in wanted}
    return info


def _head(repo: Repo) -> str | None:
    try:
        return repo.head()
    except HubError:
        return None


def _siblings(repo: Repo, sha: str, blobs: bool) -> list[dict[str, Any]]:
    found = []
    for path, entry in sorted(repo.git.files(repo.git.commit(sha).tree).items()):
        item: dict[str, Any] = {"rfilename": path}
        if blobs:
            blob = repo.blob_info(entry)
            item |= {"blobId": entry.sha, "size": blob.size}
            if blob.lfs:
                item["lfs"] = {"sha256": blob.lfs.oid, "size": blob.lfs.size, "pointerSize": blob.pointer_size}
        found.append(item)
    return found


def used_storage(repo: Repo, sha: str | None) -> int:
    """Bytes of the files at a commit."""
    if sha is None:
        return 0
    return sum(repo.blob_info(entry).size for entry in repo.git.files(repo.git.commit(sha).tree).values())


def _model_extras(repo: Repo, sha: str) -> dict[str, Any]:
    """`config` (the few keys the Hub keeps), `transformersInfo` and `safetensors` parameter counts."""
    extras: dict[str, Any] = {}
    try:
        config = json.loads(repo.text(sha, "config.json") or "null")
    except ValueError:
        config = None
    if isinstance(config, dict):
        extras["config"] = {k: config[k] for k in ("architectures", "model_type", "quantization_config") if k in config}
        if isinstance(config.get("architectures"), list) and config["architectures"]:
            extras["transformersInfo"] = {"auto_model": "AutoModel", "custom_class": None}
    entry = repo.git.lookup(repo.git.commit(sha).tree, "model.safetensors")
    counts = safetensors_parameters(repo, entry) if entry and not entry.is_tree else None
    if counts:
        extras["safetensors"] = {"parameters": counts, "total": sum(counts.values())}
    return extras


def read_blob(repo: Repo, entry: Entry, start: int, end: int) -> bytes:
    """Bytes of a file, LFS or not."""
    info = repo.blob_info(entry)
    if info.lfs is None:
        return repo.git.blob(entry.sha)[start:end]
    return b"".join(repo.lfs.read(info.lfs.oid, start, min(end, info.size)))


def safetensors_parameters(repo: Repo, entry: Entry) -> dict[str, int] | None:
    """Parameters per dtype, from the header of a safetensors file; None where it has none."""
    head = read_blob(repo, entry, 0, 8)
    if len(head) < 8 or (size := struct.unpack("<Q", head)[0]) > 25_000_000:
        return None
    try:
        header = json.loads(read_blob(repo, entry, 8, 8 + size))
        counts: dict[str, int] = {}
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            number = 1
            for length in tensor["shape"]:
                number *= int(length)
            counts[str(tensor["dtype"])] = counts.get(str(tensor["dtype"]), 0) + number
        return counts
    except (ValueError, TypeError, KeyError, AttributeError, HubError):
        return None


def describe_entry(repo: Repo, path: str, entry: Entry) -> dict[str, Any]:
    """One line of a tree listing."""
    if entry.is_tree:
        return {"type": "directory", "oid": entry.sha, "size": 0, "path": path}
    info = repo.blob_info(entry)
    item: dict[str, Any] = {"type": "file", "oid": entry.sha, "size": info.size, "path": path}
    if info.lfs:
        item["lfs"] = {"oid": info.lfs.oid, "size": info.lfs.size, "pointerSize": info.pointer_size}
        if (name := repo.lfs.xet_hash(info.lfs.oid)) is not None:
            item["xetHash"] = name
    return item


def add_expanded(repo: Repo, sha: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tree lines with their last commit and the scan status (nothing is scanned here, and it says so)."""
    newest = last_commits(repo.git, sha, [item["path"] for item in items])
    for item in items:
        if (commit := newest.get(item["path"])) is not None:
            item["lastCommit"] = {"id": commit.sha, "title": commit.title, "date": iso(commit.when)}
        if item["type"] == "file":
            item["securityFileStatus"] = {
                "status": "unscanned",
                "avScan": {"status": "unscanned", "virusFound": False, "virusNames": None},
                "pickleImportScan": None,
                "jFrogScan": {"status": "unscanned"},
                "protectAiScan": {"status": "unscanned"},
            }
    return items


def describe_commit(commit: Commit, formatted: bool = False) -> dict[str, Any]:
    """One line of a commit list."""
    item: dict[str, Any] = {
        "id": commit.sha,
        "title": commit.title,
        "message": commit.body,
        "authors": [{"user": commit.author, "avatar": ""}],
        "date": iso(commit.when),
    }
    if formatted:
        import html

        item["formatted"] = {"title": html.escape(commit.title), "message": html.escape(commit.body)}
    return item
