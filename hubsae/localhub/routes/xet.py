"""Xet over HTTP: tokens for a repo, and the store's own calls (xorbs, shards, reconstructions, byte ranges of xorbs).

Calls the clients also try and that are answered 404 on purpose (they fall back): `v2/*`, `v1/chunks/*` (global
deduplication) and `v1/xorb-grants/*`.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from ..commitops import base_branch
from ..errors import HubError, bad_request
from ..http import Call, answer, byte_range, content_answer
from ..repos import Repo
from ..routing import Router
from ..xet.cas import is_xet_hash
from ..xet.formats import FileRecord, read_shard
from .commits import may_contribute

routes = Router()


def _need_xet(call: Call) -> None:
    if not call.hub.xet:
        raise HubError(404, "This hub has no Xet storage; set HF_HUB_DISABLE_XET=1 to upload by LFS")


def _token(call: Call, repo: Repo, scope: str) -> Response:
    word = call.hub.signer.sign({"kind": "xet", "scope": scope, "repo": repo.meta["uid"]})
    expires = int(time.time()) + call.hub.settings.url_seconds
    # the folder's id in the url: hf_xet keeps a shard cache per CAS url and must not take a new hub for an old one
    url = f"{call.base}/xet/{call.hub.data_id}"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": word, "X-Xet-Token-Expiration": str(expires)}
    return answer({"casUrl": url, "exp": expires, "accessToken": word}, headers=headers)


@routes.on("GET", "/api/{kind}/{repo}/xet-write-token/{revision}")
def write_token(call: Call) -> Response:
    _need_xet(call)
    repo = call.repo()
    may_contribute(call, repo)
    revision = call["revision"]
    if not call.flag("create_pr") and not revision.startswith("refs/pr/"):
        call.hub.registry.require_write(repo, call.caller)
    if revision != "None":  # what the client sends where no revision was given
        _ = base_branch(repo, revision) if call.flag("create_pr") else repo.git.resolve(revision)
    return _token(call, repo, "write")


@routes.on("GET", "/api/{kind}/{repo}/xet-read-token/{revision}")
def read_token(call: Call) -> Response:
    _need_xet(call)
    repo = call.repo()
    call.hub.registry.require_content(repo, call.caller)
    repo.git.resolve(call["revision"])
    return _token(call, repo, "read")


def _scoped(call: Call, scope: str) -> Repo:
    """The repo of the Xet token, if it is for this hub and this use."""
    given = call.request.headers.get("authorization", "").partition(" ")[2].strip()
    if not given:
        raise HubError(401, "A Xet token is needed")
    try:
        claims = call.hub.signer.verify(given, "xet")
    except HubError as why:
        raise HubError(401, why.message) from None
    if call["data"] != call.hub.data_id:
        raise HubError(404, "This Xet storage is gone")
    if scope == "write" and claims["scope"] != "write":
        raise HubError(403, "This Xet token can only read")
    return call.hub.registry.by_uid(claims["repo"])


def _hash(call: Call) -> str:
    if not is_xet_hash(call["hash"]):
        raise bad_request("Not a Xet hash")
    return call["hash"]


@routes.on("POST", "/xet/{data}/v1/xorbs/{prefix}/{hash}", body="stream")
async def upload_xorb(call: Call) -> Response:
    _scoped(call, "write")
    name = _hash(call)
    with call.hub.disk.temp_file("xorb") as (path, handle):
        await call.drain(call.hub.settings.max_xorb, handle.write)
        handle.flush()
        inserted = await run_in_threadpool(call.hub.cas.add_xorb, name, path)
    return answer({"was_inserted": inserted})


@routes.on("POST", "/xet/{data}/v1/shards", body="stream")
@routes.on("POST", "/xet/{data}/shards", body="stream")
async def upload_shard(call: Call) -> Response:
    repo = _scoped(call, "write")
    async for _ in call.load_body(call.hub.settings.max_shard):
        pass
    return await run_in_threadpool(_register, call, repo)


def _register(call: Call, repo: Repo) -> Response:
    def keep(record: FileRecord) -> bool:
        file = call.hub.cas.add_file(record)
        known = repo.lfs.xet_hash(file.sha256) == file.hash
        if not known:
            repo.lfs.link_xet(file)
        return not known

    records = [record for record in read_shard(bytes(call.body)) if record.terms]
    with ThreadPoolExecutor(4) as threads:  # each file is read and hashed as a whole
        new = int(any(list(threads.map(keep, records))))
    return answer({"result": new})


@routes.on("GET", "/xet/{data}/v1/reconstructions/{hash}")
@routes.on("GET", "/xet/{data}/reconstructions/{hash}")
def reconstruction(call: Call) -> Response:
    """How to rebuild a file: terms, and signed urls for the byte ranges of the xorbs that hold them."""
    repo = _scoped(call, "read")
    file = call.hub.cas.file(_hash(call))
    if file is None or repo.lfs.xet_hash(file.sha256) != file.hash:
        raise HubError(404, "File not found")
    start, end = byte_range(call.request, file.size) or (0, file.size)
    terms, skip, pieces = call.hub.cas.plan(file, start, end)
    fetch: dict[str, list[dict[str, Any]]] = {}
    for piece in pieces:
        # the range is part of what is signed: a xorb may hold chunks of other files than this one
        claims = {"kind": "xorb", "hash": piece.xorb, "first": piece.first_byte, "last": piece.last_byte}
        fetch.setdefault(piece.xorb, []).append(
            {
                "range": {"start": piece.start, "end": piece.end},
                "url": f"{call.storage_base}/storage/xorb/{call.hub.signer.sign(claims)}",
                "url_range": {"start": piece.first_byte, "end": piece.last_byte},
            }
        )
    lines = [{"hash": t.xorb, "unpacked_length": t.length, "range": {"start": t.start, "end": t.end}} for t in terms]
    return answer({"offset_into_first_range": skip, "terms": lines, "fetch_info": fetch})


@routes.on("GET", "/storage/xorb/{word}")
def xorb(call: Call) -> Response:
    """Bytes of a xorb, inside the signed range only."""
    claims = call.hub.signer.verify(call["word"], "xorb")
    path = call.hub.cas.xorb_path(claims["hash"])
    size = path.stat().st_size
    wanted = byte_range(call.request, size)
    if wanted is None or wanted[0] < claims["first"] or wanted[1] > claims["last"] + 1:
        raise HubError(403, "This url is for another byte range")
    headers = {"Content-Type": "application/octet-stream", "ETag": f'"{claims["hash"]}"'}
    return content_answer(call.request, size, path, headers)
