"""The one room that holds a connection to a Hub: who we are, where it is, and the few requests hubsae makes.

Everything above (push, load, cards, datasets) speaks to the Hub through `HubClient`, so that each request carries
the library's name and version, each failure is retried where that helps, and each error says what to do next.
The endpoint is passed with every call: `HF_ENDPOINT` is read by the client library once, at its import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hubsae.core.errors import HubSAEError
from hubsae.core.text import printable
from hubsae.hub.errors import AccessError, OfflineError
from hubsae.hub.explain import explained, not_cached
from hubsae.hub.retry import RetryPolicy, retrying, without_password
from hubsae.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

LIBRARY = "hubsae"
_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repo as its tree lists it."""

    path: str
    size: int
    git_oid: str
    sha256: str | None
    """Only for files kept as large objects (LFS, Xet)."""


def split_repo(repo: str, revision: str | None = None) -> tuple[str, str | None]:
    """`name/repo@revision` as (repo id, revision).

    >>> split_repo("me/my-sae@v1.0")
    ('me/my-sae', 'v1.0')
    >>> split_repo("me/my-sae", "refs/pr/3")
    ('me/my-sae', 'refs/pr/3')
    """
    repo_id, at, inline = repo.partition("@")
    if at and revision and inline != revision:
        raise HubSAEError(
            f"two revisions: {repo!r} names {inline!r}, and revision={revision!r} is given",
            hint="give one of them",
        )
    return repo_id, (inline if at and inline else revision)


def hf_home() -> Path:
    """The client library's folder, as the environment says now (it reads it once, at import)."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_HOME") or constants.HF_HOME).expanduser()


def _cache_folder() -> str:
    from huggingface_hub import constants

    if named := os.environ.get("HF_HUB_CACHE"):
        return named
    return str(hf_home() / "hub") if os.environ.get("HF_HOME") else constants.HF_HUB_CACHE


@dataclass
class HubClient:
    """A Hub, a token and a cache.

    >>> HubClient(endpoint="http://127.0.0.1:9").page("me/sae")
    'http://127.0.0.1:9/me/sae'
    """

    token: str | bool | None = None
    endpoint: str = ""
    cache_dir: str | os.PathLike[str] = ""
    local_files_only: bool = False
    policy: RetryPolicy = field(default_factory=lambda: RetryPolicy.from_environment())
    notify: Callable[[str], None] | None = None
    """Gets one line for whatever a person who waits would like to know."""
    xet: bool = True
    """Whether Xet storage is tried for uploads; off once it did not answer this client."""

    def __post_init__(self) -> None:
        from huggingface_hub import constants

        # set after the import of huggingface_hub (notebooks, tests), the environment still counts
        asked = self.endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self.endpoint = asked.rstrip("/")
        self.cache_dir = Path(self.cache_dir or _cache_folder()).expanduser()

    @cached_property
    def api(self) -> HfApi:
        """The client library's API object for this Hub."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token, library_name=LIBRARY, library_version=__version__)

    @property
    def offline(self) -> bool:
        """Whether only the cache may be used."""
        from huggingface_hub import constants

        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        return self.local_files_only or offline or bool(constants.HF_HUB_OFFLINE)

    @property
    def address(self) -> str:
        """The endpoint as it is shown to people: without a password in it."""
        return without_password(self.endpoint)

    def page(self, repo_id: str | None, repo_type: str = "model", revision: str | None = None) -> str:
        """The web address of a repo."""
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        return f"{self.address}/{prefix}{repo_id}" + (f"/tree/{revision}" if revision else "")

    def say(self, line: str) -> None:
        """Tell whoever listens."""
        if self.notify is not None:
            self.notify(printable(line))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """The client library's own progress bars are off meanwhile: two live displays garble each other."""
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        were_disabled = are_progress_bars_disabled()
        disable_progress_bars()
        try:
            yield
        finally:
            if not were_disabled:
                enable_progress_bars()

    def retry(self, call: Callable[[], T], what: str) -> T:
        """Run one request, again after transient failures."""
        return retrying(call, policy=self.policy, what=what, notify=self.say)

    def ask(
        self,
        what: str,
        call: Callable[[], T],
        repo_id: str | None = None,
        *,
        revision: str | None = None,
        path: str | None = None,
        repo_type: str = "model",
        writing: bool = False,
    ) -> T:
        """Make one request, again after transient failures; what fails for good says what to do next."""
        with explained(self, repo_id, revision=revision, path=path, repo_type=repo_type, writing=writing):
            return self.retry(call, what)

    # -- asking ------------------------------------------------------------------------------------------------

    def whoami(self) -> str:
        """The name behind the token."""
        return self._whoami()["name"]

    def _whoami(self) -> dict[str, Any]:
        from huggingface_hub.errors import LocalTokenNotFoundError

        try:
            return self.ask("asking who you are", self.api.whoami)
        except LocalTokenNotFoundError:
            raise AccessError(
                f"no token for {self.address}", hint="log in with `hf auth login`, or set HF_TOKEN"
            ) from None

    def namespaces(self) -> list[str]:
        """The name behind the token, and the organisations it belongs to."""
        me = self._whoami()
        return [me["name"], *(org["name"] for org in me.get("orgs", []))]

    def info(self, repo_id: str, revision: str | None = None, *, repo_type: str = "model") -> Any:
        """What the Hub says about a repo: its present id (after a rename), whether it is private, its commit."""
        return self.ask(
            f"looking up {repo_id}",
            lambda: self.api.repo_info(repo_id, repo_type=repo_type, revision=revision),
            repo_id, revision=revision, repo_type=repo_type,
        )  # fmt: skip

    def find(self, repo_id: str) -> Any:
        """Like `info`, or None where there is no such repo."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        def look() -> Any:
            try:
                return self.api.repo_info(repo_id)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        return self.ask(f"looking up {repo_id}", look, repo_id)

    def head(self, repo_id: str, revision: str | None = None, *, repo_type: str = "model") -> str:
        """The commit that a branch, tag or pull request points at."""
        return str(self.info(repo_id, revision, repo_type=repo_type).sha)

    def resolve(self, repo_id: str, revision: str | None = None, *, repo_type: str = "model") -> str:
        """Like `head`, and from the cache when the Hub cannot be asked."""
        if revision is not None and _SHA.fullmatch(revision):
            return revision
        if not hasattr(self.api, "resolve_revision"):  # huggingface_hub before 2
            return self._resolve_by_hand(repo_id, revision, repo_type)
        cache = {"cache_dir": str(self.cache_dir), "local_files_only": self.local_files_only}
        found = self.ask(
            f"looking up {repo_id}",
            lambda: self.api.resolve_revision(repo_id, repo_type=repo_type, revision=revision, **cache),
            repo_id, revision=revision, repo_type=repo_type,
        )  # fmt: skip
        return found.resolved  # as a string it would be the name that was asked for

    def _resolve_by_hand(self, repo_id: str, revision: str | None, repo_type: str) -> str:
        if not self.offline:
            return self.head(repo_id, revision, repo_type=repo_type)
        kept = self.cached_snapshot(repo_id, "any", repo_type=repo_type).parents[1] / "refs" / (revision or "main")
        with explained(self, repo_id, revision=revision, repo_type=repo_type):
            sha = kept.read_text(encoding="utf-8").strip() if kept.is_file() else ""
        if not _SHA.fullmatch(sha):
            raise not_cached(self, repo_id)
        return sha

    def tree(self, repo_id: str, revision: str | None = None, *, repo_type: str = "model") -> dict[str, RemoteFile]:
        """Every file of a revision by its path."""
        from huggingface_hub.hf_api import RepoFile

        def look() -> dict[str, RemoteFile]:
            entries = self.api.list_repo_tree(repo_id, repo_type=repo_type, revision=revision, recursive=True)
            return {
                e.path: RemoteFile(e.path, e.size, e.blob_id, e.lfs.sha256 if e.lfs else None)
                for e in entries
                if isinstance(e, RepoFile)
            }

        return self.ask(f"listing {repo_id}", look, repo_id, revision=revision, repo_type=repo_type)

    # -- fetching ----------------------------------------------------------------------------------------------

    def download(
        self,
        repo_id: str,
        path: str,
        *,
        revision: str | None = None,
        repo_type: str = "model",
        force: bool = False,
    ) -> Path:
        """One file, through the shared cache; its path in the snapshot folder."""
        from huggingface_hub import hf_hub_download

        if force and self.offline:
            raise OfflineError(f"force_download of {path} needs the Hub, which is not asked (offline)")
        found = self.ask(
            f"fetching {path}",
            lambda: hf_hub_download(
                repo_id,
                path,
                repo_type=repo_type,
                revision=revision,
                cache_dir=str(self.cache_dir),
                endpoint=self.endpoint,
                token=self.token,
                local_files_only=self.offline,
                force_download=force,
                library_name=LIBRARY,
                library_version=__version__,
            ),
            repo_id, revision=revision, path=path, repo_type=repo_type,
        )  # fmt: skip
        return Path(found)

    def cached_snapshot(self, repo_id: str, sha: str, *, repo_type: str = "model") -> Path:
        """The folder where the cache keeps this commit's files (it need not exist)."""
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=repo_id, repo_type=repo_type)
        return Path(self.cache_dir) / folder / "snapshots" / sha

    def safetensors_header(
        self, repo_id: str, path: str, *, revision: str | None = None
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each tensor of a remote file, from its first bytes."""
        found = self.ask(
            f"reading {path}",
            lambda: self.api.parse_safetensors_file_metadata(repo_id, path, revision=revision),
            repo_id, revision=revision, path=path,
        )  # fmt: skip
        return {name: (info.dtype, tuple(info.shape)) for name, info in found.tensors.items()}

    # -- changing ----------------------------------------------------------------------------------------------

    def ensure_repo(self, repo_id: str, *, repo_type: str = "model", **how: Any) -> str:
        """Create the repo (private, with which SDK: `how`) unless it is there; its full id (with the namespace)."""
        return self.ask(
            f"creating {repo_id}",
            lambda: self.api.create_repo(repo_id, repo_type=repo_type, exist_ok=True, **how).repo_id,
            repo_id, repo_type=repo_type, writing=True,
        )  # fmt: skip

    def ensure_branch(self, repo_id: str, branch: str, *, repo_type: str = "model") -> None:
        """Create the branch from main unless it is there."""
        self.ask(
            f"creating branch {branch}",
            lambda: self.api.create_branch(repo_id, branch=branch, repo_type=repo_type, exist_ok=True),
            repo_id, revision=branch, repo_type=repo_type, writing=True,
        )  # fmt: skip

    def ensure_tag(self, repo_id: str, tag: str, sha: str) -> bool:
        """Tag `sha`; True if the tag is new. A tag that points elsewhere is an error, never moved."""
        existing = self.tags(repo_id).get(tag)
        new = existing is None
        if new:
            self.ask(
                f"creating tag {tag}",
                lambda: self.api.create_tag(repo_id, tag=tag, revision=sha, exist_ok=True),
                repo_id, revision=sha, writing=True,
            )  # fmt: skip
            existing = self.tags(repo_id).get(tag)
        if existing != sha:
            raise tag_is_taken(repo_id, tag, str(existing))
        return new

    def tags(self, repo_id: str) -> dict[str, str]:
        """Commit of each tag."""
        refs = self.ask(f"listing refs of {repo_id}", lambda: self.api.list_repo_refs(repo_id), repo_id)
        return {ref.name: ref.target_commit for ref in refs.tags}


def tag_is_taken(repo_id: str, tag: str, commit: str) -> HubSAEError:
    """The error for a tag that is there already and means something else."""
    return HubSAEError(
        f"{repo_id} has a tag {tag!r} already, on commit {commit[:10]}, and this release differs from it",
        hint=f"use another tag, or delete the old one: hf repo tag delete {repo_id} {tag}",
    )
