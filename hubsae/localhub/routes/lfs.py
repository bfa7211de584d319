"""Git LFS: the batch call, uploads in one piece or in parts, verify. Urls are signed and serve one object."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from ..errors import HubError, bad_request
from ..http import Call, answer
from ..lfs import is_oid
from ..repos import Repo
from ..routing import Router
from .commits import may_contribute

routes = Router()
MEDIA_TYPE = "application/vnd.git-lfs+json"


def _lfs_route(tail: str) -> Any:
    """Routes below `/{repo}.git/info/lfs`, for every kind."""

    def register(handler: Any) -> Any:
        for kind in ("datasets", "spaces", "kernels"):
            routes.add("POST", f"/{kind}/{{repo}}.git/info/lfs{tail}", handler, kind=kind)
        routes.add("POST", f"/{{repo}}.git/info/lfs{tail}", handler, kind="models")
        return handler

    return register


@_lfs_route("/objects/batch")
def batch(call: Call) -> Response:
    """Which objects to send, and where to."""
    repo = call.repo()
    body = call.json()
    operation = body.get("operation")
    transfers = body.get("transfers") or ["basic"]
    objects = body.get("objects")
    if operation not in ("upload", "download") or not isinstance(objects, list) or not isinstance(transfers, list):
        raise bad_request('"operation" must be upload or download, "objects" and "transfers" lists')
    if body.get("hash_algo", "sha256") not in ("sha256", "sha-256"):
        raise bad_request("Only sha256 is supported")
    if operation == "upload":
        may_contribute(call, repo)
    else:
        call.hub.registry.require_content(repo, call.caller)
    answers = []
    multipart = False
    for item in objects:
        oid = item.get("oid") if isinstance(item, dict) else None
        size = item.get("size") if isinstance(item, dict) else None
        if not is_oid(oid) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
            answers.append(
                {"oid": str(oid), "size": 0, "error": {"code": 422, "message": "oid must be a sha256, size a number"}}
            )
            continue
        if operation == "download":
            answers.append(_download(call, repo, str(oid), size))
            continue
        line: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if size > call.hub.settings.max_upload:
            line["error"] = {"code": 413, "message": f"over the limit of {call.hub.settings.max_upload} bytes"}
        elif repo.lfs.size(str(oid)) is None:
            in_parts = size > call.hub.settings.multipart_threshold and "multipart" in transfers
            multipart |= in_parts
            line["actions"] = _upload_actions(call, repo, str(oid), size, in_parts)
        answers.append(line)
    name = "multipart" if multipart else "basic"
    return JSONResponse({"transfer": name, "objects": answers, "hash_algo": "sha256"}, media_type=MEDIA_TYPE)


def _download(call: Call, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    have = repo.lfs.size(oid)
    if have is None:
        return {"oid": oid, "size": size, "error": {"code": 404, "message": "Object does not exist"}}
    word = call.hub.signer.sign({"kind": "get", "repo": repo.meta["uid"], "oid": oid})
    href = f"{call.storage_base}/storage/get/{word}"
    return {"oid": oid, "size": have, "authenticated": True, "actions": {"download": {"href": href}}}


def _upload_actions(call: Call, repo: Repo, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
    claims = {"repo": repo.meta["uid"], "oid": oid, "size": size}
    base = f"{call.storage_base}/storage"
    verify = {"href": f"{call.base}/{repo.url_path}.git/info/lfs/verify"}
    if not in_parts:
        return {"upload": {"href": f"{base}/put/{call.hub.signer.sign({'kind': 'put', **claims})}"}, "verify": verify}
    chunk = max(call.hub.settings.multipart_chunk, -(-size // 10_000))
    upload = secrets.token_hex(16)
    count = -(-size // chunk)
    header: dict[str, Any] = {"chunk_size": str(chunk)}
    for number in range(1, count + 1):
        length = min(chunk, size - (number - 1) * chunk)
        part = {"kind": "part", "upload": upload, "part": number, "size": length, "repo": repo.meta["uid"]}
        header[f"{number:05d}"] = f"{base}/part/{call.hub.signer.sign(part)}"
    done = call.hub.signer.sign({"kind": "complete", "upload": upload, "parts": count, **claims})
    return {"upload": {"href": f"{base}/complete/{done}", "header": header}, "verify": verify}


@_lfs_route("/verify")
def verify(call: Call) -> Response:
    repo = call.repo()
    may_contribute(call, repo)
    body = call.json()
    oid, size = body.get("oid"), body.get("size")
    if not is_oid(oid) or not isinstance(size, int):
        raise HubError(422, '"oid" must be a sha256 and "size" a number')
    have = repo.lfs.size(str(oid))
    if have is None:
        raise HubError(404, f"LFS object {oid} was not uploaded")
    if have != size:
        raise bad_request(f"LFS object {oid} has {have} bytes, not {size}")
    return answer({"message": "ok"})


def _refuse_authorization(call: Call) -> None:
    """S3 refuses a signed url that also carries a token; a client that sends one would fail there."""
    if call.request.headers.get("authorization"):
        raise bad_request("Only one auth mechanism allowed: the url is signed, do not send an Authorization header")


async def _to_disk(call: Call, path: Path, size: int) -> tuple[str, int]:
    """Stream the body into a file, hashing on the way; sha256 and length."""
    digest = hashlib.sha256()
    length = 0

    def put(block: memoryview | bytearray) -> None:
        nonlocal length
        handle.write(block)
        digest.update(block)
        length += len(block)

    with open(path, "wb") as handle:
        await call.drain(size, put)
    return digest.hexdigest(), length


@routes.on("PUT", "/storage/put/{word}", body="stream")
async def put(call: Call) -> Response:
    """An object in one piece."""
    _refuse_authorization(call)
    claims = call.hub.signer.verify(call["word"], "put")
    repo = call.hub.registry.by_uid(claims["repo"])
    with call.hub.disk.temp_file("lfs") as (path, handle):
        digest, length = await _to_disk(call, path, claims["size"])
        await run_in_threadpool(repo.lfs.accept, claims["oid"], claims["size"], path, handle, digest, length)
    return Response(headers={"ETag": f'"{digest}"'})


def _parts_folder(call: Call, upload: str) -> Path:
    return call.hub.disk.tmp / f"parts-{upload}"


@routes.on("PUT", "/storage/part/{word}", body="stream")
async def put_part(call: Call) -> Response:
    """One part; its ETag has to come back in the completion call."""
    _refuse_authorization(call)
    claims = call.hub.signer.verify(call["word"], "part")
    call.hub.registry.by_uid(claims["repo"])
    folder = _parts_folder(call, claims["upload"])
    folder.mkdir(exist_ok=True)
    with call.hub.disk.temp_file("part") as (path, _):
        digest, length = await _to_disk(call, path, claims["size"])
        if length != claims["size"]:
            raise bad_request(f"Part {claims['part']}: expected {claims['size']} bytes, got {length}")
        path.rename(folder / f"{claims['part']:05d}.{digest}")
    return Response(headers={"ETag": f'"{digest}"'})


@routes.on("POST", "/storage/complete/{word}")
def complete(call: Call) -> Response:
    """Put the parts together; the whole has to hash to its name."""
    claims = call.hub.signer.verify(call["word"], "complete")
    repo = call.hub.registry.by_uid(claims["repo"])
    body = call.json()
    parts = body.get("parts")
    if body.get("oid") != claims["oid"] or not isinstance(parts, list) or len(parts) != claims["parts"]:
        raise bad_request(f"The completion must name the object and all of its {claims['parts']} parts")
    if repo.lfs.size(claims["oid"]) is not None:
        return answer({"ok": True})
    folder = _parts_folder(call, claims["upload"])
    names = []
    for number, part in enumerate(parts, 1):
        etag = part.get("etag") if isinstance(part, dict) else None
        etag = etag.strip('"') if isinstance(etag, str) else ""
        path = folder / f"{number:05d}.{etag}"
        if part.get("partNumber") != number if isinstance(part, dict) else True:
            raise bad_request("The parts must be in order")
        if not is_oid(etag) or not path.exists():
            raise bad_request(f"Part {number} was not uploaded")
        names.append(path)
    digest = hashlib.sha256()
    length = 0
    with call.hub.disk.temp_file("lfs") as (path, handle):
        for name in names:
            with open(name, "rb") as part:
                while block := part.read(1 << 20):
                    handle.write(block)
                    digest.update(block)
                    length += len(block)
        repo.lfs.accept(claims["oid"], claims["size"], path, handle, digest.hexdigest(), length)
    shutil.rmtree(folder, ignore_errors=True)
    return answer({"ok": True})
