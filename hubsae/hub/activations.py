"""`hubsae.ActivationDataset`: opens activation datasets of the Hub like a folder, publishes them."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubsae.activations import dataset as local
from hubsae.activations.layout import MANIFEST, configs_in, parse_shard_name
from hubsae.activations.manifest import described
from hubsae.activations.opening import Found, choose_config, find_activations, no_split, parquet_shards
from hubsae.activations.shards import READERS
from hubsae.core.errors import HubRequestError, NotFoundError
from hubsae.core.files import read_json
from hubsae.core.options import pass_on
from hubsae.core.progress import progress
from hubsae.core.text import natural_key
from hubsae.hub.client import LIBRARY, HubClient, RemoteFile, split_repo
from hubsae.hub.datasets import REPO_TYPE, push_activations
from hubsae.hub.upload import Published
from hubsae.version import __version__

RANGE_BYTES = 32 << 20
"""Bytes of one range request: shorter ones spend their time waiting, longer ones hold too much in memory."""


class ActivationDataset(local.ActivationDataset):
    """One config and split of an activation dataset: of a folder, of a repo on the Hub, or of memory.

    >>> import torch
    >>> data = ActivationDataset.from_tensor(torch.arange(12.0).reshape(6, 2))
    >>> len(data), data.d, next(iter(data.batches(4, shuffle=False))).shape
    (6, 2, torch.Size([4, 2]))
    """

    @classmethod
    def _find_in_repo(
        cls,
        repo: str,
        config: str | int | None,
        split: str,
        *,
        revision: str | None,
        stream: bool,
        token: str | bool | None,
        cache_dir: str | Path | None,
        local_files_only: bool,
        vector: str | None,
    ) -> Found:
        name, pinned = split_repo(repo, revision)
        if not stream:
            folder, chosen = fetch_activations(
                name, lambda have: choose_config(repo, have, config),
                revision=pinned, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
            )  # fmt: skip
            return find_activations(folder, chosen, split, vector=vector)._replace(path=repo)
        listing = open_remote(name, revision=pinned, token=token)
        chosen = choose_config(repo, listing.configs, config)
        files = listing.files(chosen, split)
        if not files:
            raise no_split(repo, chosen, split, listing.splits(chosen))
        return parquet_shards(files, repo, chosen, split, listing.configs, vector)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str = "main",
        pr: bool = False,
        token: str | bool | None = None,
        message: str | None = None,
        verify: bool = True,
        allow_secrets: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> Published:
        """Publish the whole dataset folder that this config belongs to, to `repo_id` and in one commit.

        `private` is for a repo that is new; `revision` names a branch, `pr` makes a pull request instead; `token` and
        the commit's `message` as usual. `verify` reads every page back first; what looks like a token or key is refused
        without `allow_secrets`; `notify` gets a line for what happens.
        """
        return pass_on(push_activations, locals(), folder=self.path)


def describe(repo: str, *, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """What `hubsae show` tells of an activation dataset on the Hub; the footers say it, no vectors are read."""
    name, pinned = split_repo(repo, revision)
    listing = open_remote(name, revision=pinned, token=token)
    manifest: dict[str, Any] = {}
    if MANIFEST in listing.tree:
        manifest = read_json(listing.client.download(name, MANIFEST, revision=listing.revision, repo_type=REPO_TYPE))
    opened, splits = [], {}
    for config in listing.configs:
        have = listing.splits(config)
        data = [
            ActivationDataset(*parquet_shards(listing.files(config, split), repo, config, split, listing.configs))
            for split in have
        ]
        splits[config] = {part.split: part.n_rows for part in data}
        opened.append(data[have.index("train") if "train" in have else 0])
    return described(repo, opened, splits, manifest)


def fetch_activations(
    repo_id: str,
    choose: Callable[[Sequence[str]], str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str]:
    """Download one config through the shared cache; the snapshot folder and the config's name."""
    client = HubClient(token=token, cache_dir=cache_dir or "", local_files_only=local_files_only)
    sha = client.resolve(repo_id, revision, repo_type=REPO_TYPE)
    if client.offline:
        folder = client.cached_snapshot(repo_id, sha, repo_type=REPO_TYPE)
        return folder, choose(configs_in(folder))
    tree = client.tree(repo_id, sha, repo_type=REPO_TYPE)
    name = choose(_configs(tree))
    wanted = [path for path in tree if path.startswith(f"{name}/") or path == MANIFEST]
    size = sum(tree[path].size for path in wanted)
    what = f"fetching {repo_id} {name}"
    with client.quiet(), progress(what, size, "bytes") as task, ThreadPoolExecutor(READERS) as pool:
        jobs = {path: pool.submit(client.download, repo_id, path, revision=sha, repo_type=REPO_TYPE) for path in wanted}
        for path, job in jobs.items():
            file = job.result()
            if file.stat().st_size != tree[path].size:
                raise HubRequestError(
                    f"{path}: expected {tree[path].size} bytes, found {file.stat().st_size} in the cache",
                    hint=f"remove {file} and try again",
                )
            task.advance(tree[path].size)
    return client.cached_snapshot(repo_id, sha, repo_type=REPO_TYPE), name


def _configs(tree: dict[str, RemoteFile]) -> list[str]:
    found = {path.split("/")[0] for path in tree if path.count("/") == 1 and parse_shard_name(path.split("/")[1])}
    return sorted(found, key=natural_key)


@dataclass
class RemoteListing:
    """The shards of an activation dataset on the Hub, at one commit."""

    client: HubClient
    repo_id: str
    revision: str
    tree: dict[str, RemoteFile] = field(repr=False)

    @property
    def configs(self) -> list[str]:
        """Configs that are there."""
        return _configs(self.tree)

    def splits(self, config: str) -> list[str]:
        """Splits of a config."""
        return sorted({found[0] for name in self.tree if (found := self._shard(config, name))})

    def _shard(self, config: str, path: str) -> tuple[str, int, int] | None:
        folder, _, name = path.rpartition("/")
        return parse_shard_name(name) if folder == config else None

    def files(self, config: str, split: str) -> list[RangeFile]:
        """The shards of a split, in reading order."""
        paths = sorted(p for p in self.tree if (found := self._shard(config, p)) and found[0] == split)
        return [RangeFile(self.client, self.repo_id, self.revision, p, self.tree[p].size) for p in paths]


def open_remote(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> RemoteListing:
    """List a dataset repo, pinned to the commit that `revision` means now."""
    client = HubClient(token=token)
    sha = client.resolve(repo_id, revision, repo_type=REPO_TYPE)
    listing = RemoteListing(client, repo_id, sha, client.tree(repo_id, sha, repo_type=REPO_TYPE))
    if not listing.configs:
        raise NotFoundError(
            f"{repo_id} holds no activations", hint="expected folders such as layers.18 with .parquet files"
        )
    return listing


class RangeFile:
    """A file on the Hub that is read by ranges, several at once. The address behind the redirect is kept."""

    remote = True

    def __init__(self, client: HubClient, repo_id: str, revision: str, path: str, size: int):
        self.client, self.repo_id, self.revision, self.path, self.size = client, repo_id, revision, path, size
        self.name = f"{repo_id}@{revision[:10]}/{path}"
        self._address: str | None = None
        self._lock = threading.Lock()

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill the views from `offset` on, by ranges of 32 MB."""
        places = []
        for view in views:
            for start in range(0, len(view), RANGE_BYTES):
                part = view[start : start + RANGE_BYTES]
                places.append((offset + start, part))
            offset += len(view)
        # a short piece (a page header) travels with what follows it
        while places:
            group = [places.pop(0)]
            length = len(group[0][1])
            while places and length + len(places[0][1]) <= RANGE_BYTES + (64 << 10):
                group.append(places.pop(0))
                length += len(group[-1][1])
            data = memoryview(self.fetch(group[0][0], length))
            at = 0
            for _, view in group:
                view[:] = data[at : at + len(view)]
                at += len(view)

    def fetch(self, start: int, length: int) -> bytes:
        """The bytes [start, start + length)."""
        if length == 0:
            return b""
        data = self.client.ask(
            f"reading {self.path}",
            lambda: self._ask(start, length),
            self.repo_id, revision=self.revision, path=self.path, repo_type=REPO_TYPE,
        )  # fmt: skip
        if len(data) != length:
            raise HubRequestError(
                f"{self.name}: expected {length} bytes at {start}, found {len(data)}",
                hint="the server does not answer range requests; open the dataset without stream=True",
            )
        return data

    def _ask(self, start: int, length: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        home = hf_hub_url(
            self.repo_id, self.path, repo_type=REPO_TYPE, revision=self.revision, endpoint=self.client.endpoint
        )
        headers = build_hf_headers(token=self.client.token, library_name=LIBRARY, library_version=__version__)
        span = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        with self._lock:
            address = self._address
        if address is not None and address != home:
            # a signed address of the storage behind the Hub: it must not see the token, and it expires
            answer = _get(address, span)
            if answer.status_code == 206:
                return answer.content
            with self._lock:
                self._address = None
        answer = _get(home, {**headers, **span})
        hf_raise_for_status(answer)
        if answer.status_code == 200 and length < self.size:
            raise HubRequestError(f"{self.name}: the server ignores ranges", hint="open it without stream=True")
        with self._lock:
            self._address = str(answer.url)
        return answer.content

    def arrow(self) -> Any:
        """A file object for pyarrow."""
        return _Seekable(self)


def _get(url: str, headers: dict[str, Any]) -> Any:
    from huggingface_hub.utils import get_session

    session = get_session()
    # before version 1 the client library stood on requests, which follows by itself
    follow: dict[str, Any] = {"follow_redirects": True} if hasattr(session, "follow_redirects") else {}
    return session.get(url, headers=headers, timeout=60, **follow)


class _Seekable(io.RawIOBase):
    """A RangeFile as a file object."""

    def __init__(self, file: RangeFile):
        super().__init__()
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self.file.size - self.position))
        view[:length] = self.file.fetch(self.position, length)
        self.position += length
        return length
