"""The client library's exceptions, said so that the reader knows what to do next.

Finding the nearest valid names costs further requests; they are made only once something has failed, and never
replace the first error by one of their own.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hubsae.core.errors import HubRequestError, HubSAEError, NotFoundError, nearest
from hubsae.core.text import format_bytes, printable
from hubsae.hub.errors import (
    AccessError,
    CacheError,
    DiskFullError,
    OfflineError,
    RepoNotFoundError,
    RevisionNotFoundError,
)
from hubsae.hub.retry import BAD_ADDRESS, LOST, describe, kinds, status_of, without_password

T = TypeVar("T")


class Asker(Protocol):
    """What an explanation needs of a client: where it asks, and further questions."""

    cache_dir: Any

    @property
    def address(self) -> str: ...
    @property
    def api(self) -> Any: ...
    @property
    def offline(self) -> bool: ...
    def page(self, repo_id: str | None, repo_type: str = "model", revision: str | None = None) -> str: ...


@contextmanager
def explained(
    client: Asker,
    repo_id: str | None = None,
    *,
    revision: str | None = None,
    path: str | None = None,
    repo_type: str = "model",
    writing: bool = False,
) -> Iterator[None]:
    """Let typed, readable errors out of the block instead of the client library's own."""
    try:
        yield
    except HubSAEError:
        raise
    except Exception as error:
        typed = explain(client, error, repo_id, revision, path, repo_type, writing)
        if typed is None:
            raise
        raise typed from error


def explain(
    client: Asker,
    error: BaseException,
    repo_id: str | None,
    revision: str | None = None,
    path: str | None = None,
    repo_type: str = "model",
    writing: bool = False,
) -> HubSAEError | None:
    """The typed error for `error`, or None if it is not about the Hub."""
    from huggingface_hub import errors as hf

    where = f"{repo_id}@{revision}" if revision else str(repo_id)
    # forced downloads and the LFS uploader wrap what happened
    if type(error) in (ValueError, RuntimeError) and isinstance(error.__cause__, Exception):
        return explain(client, error.__cause__, repo_id, revision, path, repo_type, writing)
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error):
        return _disk_full(client, error)
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return _no_permission(client, error)
    if "JSONDecodeError" in kinds(error):
        return _no_hub(client)
    if isinstance(error, UnicodeDecodeError):
        return CacheError(
            f"the cache of {repo_id} is damaged: a file in {client.cache_dir} that names a commit holds something else",
            hint=f"remove its `refs` folder, or all of it: hf cache rm {repo_type}/{repo_id}",
        )
    if isinstance(error, ValueError) and "proxy" in str(error).lower():
        return HubRequestError(f"the proxy cannot be used: {describe(error)}", hint=_proxy_hint() or None)
    if isinstance(error, hf.HFValidationError):
        return RepoNotFoundError(
            f"{repo_id!r} is neither a folder here nor a repo id",
            hint="repo ids look like 'name/repo' (letters, digits, '-', '_', '.'); add '@revision' for a revision",
        )
    if isinstance(error, hf.GatedRepoError):
        return AccessError(
            f"{repo_id} is gated: its owners grant access on request",
            hint=f"ask for access at {client.page(repo_id, repo_type)}, then log in with `hf auth login`",
        )
    if isinstance(error, hf.RevisionNotFoundError):
        return _revision_not_found(client, repo_id, revision, repo_type)
    if isinstance(error, hf.RepositoryNotFoundError):
        return _repo_not_found(client, repo_id, repo_type)
    if kinds(error) & _NOT_CACHED:
        cause = error.__cause__
        if isinstance(cause, hf.FileMetadataError) and not client.offline:
            return _no_hub(client)
        if isinstance(cause, Exception) and not isinstance(cause, hf.OfflineModeIsEnabled) and not client.offline:
            return explain(client, cause, repo_id, revision, path, repo_type, writing)
        return not_cached(client, where, path)
    if isinstance(error, hf.EntryNotFoundError):
        return NotFoundError(f"{where} has no file {path!r}", hint=f"list its SAEs with: hubsae ls {where}")
    status = status_of(error)
    if status == 401:
        return AccessError(
            f"{client.address} does not accept the token (401)",
            hint="log in again with `hf auth login`, or set HF_TOKEN; `hf auth whoami` shows who you are",
        )
    if status == 403:
        hint = "`hf auth whoami` shows who you are; a token for publishing needs the 'write' role"
        if writing:
            hint += f". Anyone who can read {repo_id} can propose the change instead: add --pr"
        return AccessError(f"this token may not {'write to' if writing else 'read'} {where} (403)", hint=hint)
    if status == 429:
        return HubRequestError(
            f"{client.address} still limits the rate of requests after several tries (429)",
            hint="nothing was published; run the same command again in a few minutes, it goes on where it stopped"
            if writing
            else "try again in a few minutes; a token (`hf auth login`) has a higher limit than no token",
        )
    if status is not None:
        return HubRequestError(
            f"{client.address} answered {status} for {where}: {_server_message(error)}",
            hint="run the same command again; it goes on where it stopped" if status >= 500 else None,
        )
    if kinds(error) & BAD_ADDRESS:
        return HubRequestError(
            f"{client.address!r} is not the address of a Hub",
            hint="HF_ENDPOINT needs the scheme, e.g. HF_ENDPOINT=https://huggingface.co or http://127.0.0.1:8000",
        )
    if kinds(error) & LOST:
        return HubRequestError(
            f"cannot reach {client.address} ({describe(error)})",
            hint=_proxy_hint()
            + "check the network and HF_ENDPOINT; without a network, cached SAEs load with HF_HUB_OFFLINE=1",
        )
    return None


def guess(client: Asker, ask: Callable[[], T], otherwise: T) -> T:
    """Ask the Hub for something that would only improve an error message; whatever fails, go without."""
    if client.offline:
        return otherwise
    try:
        return ask()
    except Exception:
        return otherwise


def _repo_not_found(client: Asker, repo_id: str | None, repo_type: str) -> HubSAEError:
    if repo_id is None:
        return AccessError(f"{client.address} asks for a token", hint="log in with `hf auth login`")
    if repo_type == "model" and guess(client, lambda: client.api.dataset_info(repo_id) is not None, False):
        return RepoNotFoundError(
            f"{repo_id} is a dataset on {client.address}, not a repo of SAEs",
            hint=f"activations are read with: ActivationDataset.open({repo_id!r})",
        )
    namespace, _, name = repo_id.rpartition("/")
    names = guess(
        client,
        lambda: [m.id for m in client.api.list_models(author=namespace or None, limit=200)],
        [],
    )
    hints = []
    if names and (near := nearest(repo_id, names, most=5)):
        hints.append(f"{namespace or 'the Hub'} has: {near}")
    elif found := guess(client, lambda: [m.id for m in client.api.list_models(search=name, limit=5)], []):
        hints.append(f"similar names: {', '.join(found)}")
    who = guess(client, lambda: client.api.whoami()["name"], None)
    hints.append(
        f"if it is private, you are logged in as {who!r} and need access to it"
        if who
        else "if it is private, log in with `hf auth login` or set HF_TOKEN"
    )
    return RepoNotFoundError(f"there is no repo {repo_id} on {client.address}", hint="; ".join(hints))


def _revision_not_found(client: Asker, repo_id: str | None, revision: str | None, repo_type: str) -> HubSAEError:
    def ask() -> list[str]:
        refs = client.api.list_repo_refs(str(repo_id), repo_type=repo_type, include_pull_requests=True)
        pulls = [ref.ref for ref in refs.pull_requests or []]
        return [ref.name for ref in refs.branches] + [ref.name for ref in refs.tags] + pulls

    names = guess(client, ask, [])
    hint = f"revisions there: {nearest(str(revision), names, most=8)}" if names else None
    return RevisionNotFoundError(f"{repo_id} has no revision {revision!r}", hint=hint)


def not_cached(client: Asker, where: str, path: str | None = None) -> OfflineError:
    """The error for a repo, or a file of it, that is needed while no Hub may be asked."""
    missing = f"{path} of {where}" if path else where
    return OfflineError(
        f"{missing} is not in the cache ({client.cache_dir}) and the Hub is not asked (offline)",
        hint=f"once with a network: hubsae pull {where}; then HF_HUB_OFFLINE=1 works",
    )


_NOT_CACHED = frozenset({"OfflineModeIsEnabled", "LocalEntryNotFoundError", "RevisionResolutionError"})
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def _proxy_hint() -> str:
    """Which proxy requests go through, where one is set."""
    for name in _PROXIES:
        if value := os.environ.get(name):
            return f"requests go through the proxy {without_password(value)} ({name}): is it right, and does it run? "
    return ""


def _no_hub(client: Asker) -> HubSAEError:
    return HubRequestError(
        f"{client.address} answers, but not as a Hub does",
        hint=f"a login page of this network, or a proxy in between? open {client.address} in a browser; "
        "is HF_ENDPOINT right? without a network, cached SAEs load with HF_HUB_OFFLINE=1",
    )


def _no_permission(client: Asker, error: OSError) -> HubSAEError:
    place = Path(str(error.filename or client.cache_dir))
    if not place.is_relative_to(Path(client.cache_dir)):
        return CacheError(f"{place}: {error.strerror}", hint="whose file is it? this user cannot read or write it")
    return CacheError(
        f"the cache cannot be written: {place}: {error.strerror}",
        hint="set HF_HOME (or cache_dir=) to a folder of yours; what is cached already loads with HF_HUB_OFFLINE=1",
    )


def _disk_full(client: Asker, error: BaseException) -> HubSAEError:
    folder = getattr(error, "filename", None) or client.cache_dir
    room = ""
    with suppress(OSError):
        room = f" ({format_bytes(shutil.disk_usage(client.cache_dir).free)} free in {client.cache_dir})"
    return DiskFullError(
        f"the disk is full: {folder}{room}; the unfinished file was removed",
        "free some room (`hf cache ls`, `hf cache rm`), or move the cache: HF_HOME=/a/bigger/disk",
    )


def _server_message(error: BaseException) -> str:
    message = getattr(error, "server_message", None)
    text = without_password(str(message or error)).strip()
    return printable(" ".join(text.split()), 300)
