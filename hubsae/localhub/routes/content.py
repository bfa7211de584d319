"""Files: `resolve` and `raw`, with the headers every download depends on, and the storage origin behind redirects."""

from __future__ import annotations

import mimetypes
from typing import Any

from starlette.responses import Response

from ..describe import safetensors_parameters
from ..errors import HubError, entry_not_found
from ..gitstore import Entry
from ..http import Call, content_answer, header_value, quote_path
from ..repos import BlobInfo, Repo
from ..routing import Router

routes = Router()

# requests for these count as a download of a model, as on the Hub (GET and HEAD)
QUERY_FILES = {"config.json", "config.yaml", "hyperparams.yaml", "params.json", "meta.yaml"}

SITE, SITE_DATA = "index.html", "reverse-index"
SITE_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src {}; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def find_file(call: Call) -> tuple[Repo, str, str, Entry, BlobInfo]:
    """The file that the url names: repo, commit, path, its entry in the tree and what is known of the blob."""
    repo = call.repo()
    sha = repo.git.resolve(call["revision"])
    call.hub.registry.require_content(repo, call.caller)
    path = call["path"].strip("/")
    entry = repo.git.lookup(repo.git.commit(sha).tree, path) if path else None
    if entry is None or entry.is_tree:
        raise entry_not_found(path, sha)
    return repo, sha, path, entry, repo.blob_info(entry)


def _count(call: Call, repo: Repo, path: str) -> None:
    if (repo.kind == "models" and path in QUERY_FILES) or (repo.kind == "datasets" and call.request.method == "GET"):
        repo.count_download()


def _content_type(path: str) -> str:
    guessed = mimetypes.guess_type(path)[0] or "application/octet-stream"
    # nothing from a repo may run as a page of this origin
    if guessed in ("text/html", "application/xhtml+xml", "image/svg+xml", "text/xml", "application/xml"):
        return "text/plain; charset=utf-8"
    if guessed.startswith("text/"):
        return f"{guessed}; charset=utf-8"
    return guessed


def _headers(path: str) -> dict[str, str]:
    name = path.rsplit("/", 1)[-1]
    ascii_name = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in name)
    return {
        "Content-Type": _content_type(path),
        "Content-Disposition": f"inline; filename*=UTF-8''{quote_path(name)}; filename=\"{ascii_name}\";",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }


@routes.on_repo("GET", "/resolve/{revision}/{path...}")
def resolve(call: Call) -> Response:
    """A file at a revision. LFS content may be a redirect (CDN switch) and may carry a Xet hash (Xet switch)."""
    repo, sha, path, entry, info = find_file(call)
    _count(call, repo, path)
    headers = {"X-Repo-Commit": sha, **_headers(path), "Access-Control-Expose-Headers": "*"}
    if info.lfs is None:
        return _blob(call, repo, entry, headers)
    oid = info.lfs.oid
    if repo.lfs.size(oid) is None:
        raise HubError(
            404, f"The content of {path} was deleted from this repository", code="EntryNotFound", headers=headers
        )
    etag = f'"{oid}"'
    headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(info.size)}
    if call.hub.xet and (name := repo.lfs.xet_hash(oid)) is not None:
        refresh = f"{call.base}/api/{repo.kind}/{quote_path(repo.id)}/xet-read-token/{sha}"
        rebuild = f"{call.base}/xet/{call.hub.data_id}/v1/reconstructions/{name}"
        headers["X-Xet-Hash"] = name
        headers["X-Xet-Refresh-Route"] = refresh
        headers["Link"] = f'<{refresh}>; rel="xet-auth", <{rebuild}>; rel="xet-reconstruction-info"'
    if call.hub.cdn_port:
        word = call.hub.signer.sign({"kind": "get", "repo": repo.meta["uid"], "oid": oid, "name": path})
        headers["Location"] = f"{call.storage_base}/storage/get/{word}"
        headers["ETag"] = f'"{entry.sha}"'
        headers.pop("Content-Type")
        headers.pop("Content-Disposition")
        return Response(status_code=302, headers=headers)
    headers["ETag"] = etag
    return content_answer(call.request, info.size, repo.lfs.source(oid), headers)


@routes.on_repo("GET", "/raw/{revision}/{path...}")
def raw(call: Call) -> Response:
    """The blob itself: for LFS files the pointer."""
    repo, sha, path, entry, _ = find_file(call)
    headers = {"X-Repo-Commit": sha, **_headers(path), "Content-Type": "text/plain; charset=utf-8"}
    return _blob(call, repo, entry, headers)


def _blob(call: Call, repo: Repo, entry: Entry, headers: dict[str, str]) -> Response:
    """A file as git has it."""
    data = repo.git.blob(entry.sha)
    headers = {**headers, "ETag": f'"{entry.sha}"'}
    return content_answer(call.request, len(data), lambda start, end: iter((data[start:end],)), headers)


@routes.on("GET", "/storage/get/{word}")
def storage(call: Call) -> Response:
    """One LFS object by a signed url: what the CDN is on the Hub."""
    claims = call.hub.signer.verify(call["word"], "get")
    repo = call.hub.registry.by_uid(claims["repo"])
    oid = claims["oid"]
    size = repo.lfs.size(oid)
    if size is None:
        raise HubError(404, "This object was deleted")
    headers = {"ETag": f'"{oid}"', **_headers(str(claims.get("name") or "object"))}
    return content_answer(call.request, size, repo.lfs.source(oid), headers)


def has_site(repo: Repo) -> bool:
    """Whether the repo carries feature pages."""
    sha = repo.git.ref("refs/heads/main")
    tree = repo.git.commit(sha).tree if sha else None
    return tree is not None and all(repo.git.lookup(tree, path) is not None for path in (SITE, SITE_DATA))


@routes.on_repo("GET", "/features")
def features(call: Call) -> Response:
    """The feature pages of a repo, at an address of their own that only those who may read the repo can get.

    The page holds code from a repo. The sandbox gives it an origin that is nobody's: it reaches what lies under its own
    signed address, without the reader's password, and nothing else. A `#...` of the link survives the redirect.
    """
    repo = call.repo()
    call.hub.registry.require_content(repo, call.caller)
    if not has_site(repo):
        raise entry_not_found(SITE, repo.head())
    word = call.hub.signer.sign({"kind": "site", "repo": repo.meta["uid"]})
    place = f"{call.base}/storage/site/{word}/{quote_path(repo.id)}/resolve/{repo.head()}/{SITE}"
    return Response(status_code=303, headers={"Location": place, "Cache-Control": "no-store"})


@routes.on("GET", "/storage/site/{word}/{repo}/resolve/{revision}/{path...}")
def site(call: Call) -> Response:
    """A file of the feature pages by a signed url."""
    repo = call.hub.registry.by_uid(call.hub.signer.verify(call["word"], "site")["repo"])
    sha, path = repo.git.resolve(call["revision"]), call["path"]
    entry = repo.git.lookup(repo.git.commit(sha).tree, path)
    if entry is None or entry.is_tree or not (path == SITE or path.startswith(f"{SITE_DATA}/")):
        raise entry_not_found(path, sha)
    info = repo.blob_info(entry)
    headers = {**_headers(path), "Access-Control-Allow-Origin": "*", "Referrer-Policy": "no-referrer"}
    if path == SITE:
        headers["Content-Type"] = "text/html; charset=utf-8"
        headers["Content-Security-Policy"] = SITE_POLICY.format(call.base)
    if info.lfs is None:
        return _blob(call, repo, entry, headers)
    headers["ETag"] = f'"{info.lfs.oid}"'
    return content_answer(call.request, info.size, repo.lfs.source(info.lfs.oid), headers)


@routes.on("GET", "/api/resolve-cache/{kind}/{repo}/{revision}/{path...}")
def resolve_cache(call: Call) -> Response:
    return resolve(call)


@routes.on("GET", "/api/{kind}/{repo}/safetensors-metadata/{path...}")
def safetensors_metadata(call: Call) -> Any:
    """Header facts of a safetensors file, without downloading it."""
    call.params["revision"] = call.query.get("revision", "main")
    repo, _, path, entry, _ = find_file(call)
    counts = safetensors_parameters(repo, entry)
    if counts is None:
        raise HubError(400, header_value(f"{path} is not a safetensors file"))
    return {"parameters": counts, "total": sum(counts.values())}
