"""Activation datasets on the Hub: publish a folder in one commit, fetch one config, or read it by ranges.

Vectors never go through `datasets.push_to_hub` (it writes them 13 to 17 times slower, in pages our reader cannot read
directly): the finished Parquet files are uploaded as they are, object by object, and become visible in one commit.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubsae.activations.card import update_card
from hubsae.activations.dataset import READERS, ActivationDataset
from hubsae.activations.layout import MANIFEST, configs_in, natural, parse_shard_name, shards_in
from hubsae.activations.manifest import finalize
from hubsae.core.errors import DataError, HubRequestError, NotFoundError
from hubsae.core.files import read_json
from hubsae.hub.client import LIBRARY, HubClient, RemoteFile, split_repo
from hubsae.hub.errors import explained
from hubsae.hub.progress import shown
from hubsae.hub.upload import Contents, LocalFile, Published, State, publish
from hubsae.version import __version__

REPO_TYPE = "dataset"
RANGE_BYTES = 32 << 20
"""Bytes of one range request: shorter ones spend their time waiting, longer ones hold too much in memory."""


@dataclass(frozen=True)
class PushPlan:
    """What a push would publish."""

    repo_id: str
    folder: Path
    files: list[LocalFile]
    manifest: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def rows(self) -> list[dict[str, Any]]:
        """One line per config and split."""
        return [
            {"config": name, "split": split, "rows": part["rows"], "files": len(part["shards"]), "bytes": part["bytes"],
             "dtype": entry["dtype"], "d": entry["d"], "scale": entry["scale"]}
            for name, entry in self.manifest["configs"].items()
            for split, part in entry["splits"].items()
        ]  # fmt: skip


def plan_push(
    folder: str | Path, repo_id: str | None = None, *, client: HubClient | None = None, verify: bool = True
) -> PushPlan:
    """Look at a folder before it is published: finish it, check every page, list the files."""
    root = Path(folder)
    if not configs_in(root):
        raise DataError(
            f"{root} holds no activation dataset",
            hint="expected folders such as layers.18 with .parquet files; `hubsae convert-activations` makes them",
        )
    if stale := [p for name in configs_in(root) for p in (root / name).glob(".*.parquet.*.tmp")]:
        raise DataError(
            f"{root} is being written, or its harvest was interrupted: {stale[0].name} is unfinished",
            hint="let the harvest finish, or run the same command again: it continues where it stopped",
        )
    finalize(root)
    if verify:
        for name in configs_in(root):
            for split in shards_in(root / name):
                ActivationDataset.open(root, name, split).verify()
    manifest = read_json(root / MANIFEST)
    files = [LocalFile(p.relative_to(root).as_posix(), p) for name in configs_in(root) for p in _files_of(root / name)]
    files.append(LocalFile(MANIFEST, root / MANIFEST))
    if repo_id is None:
        client = client or HubClient()
        repo_id = f"{client.whoami()}/{root.resolve().name}"
    return PushPlan(repo_id, root, files, manifest)


def _files_of(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]


def push_activations(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str = "main",
    pr: bool = False,
    token: str | bool | None = None,
    message: str | None = None,
    verify: bool = True,
    client: HubClient | None = None,
    notify: Callable[[str], None] | None = None,
    plan: PushPlan | None = None,
) -> Published:
    """Publish a dataset folder to a dataset repo: one commit, or none. Interrupted, the next call completes it.

    Every page is read back and its checksum compared before anything is sent. Configs that are on the Hub and not
    in the folder stay, so several harvests can go into one repo; files of a config are replaced as a whole.
    """
    client = client or HubClient(token=token, notify=notify)
    plan = plan or plan_push(folder, repo_id, client=client, verify=verify)
    repo = client.ensure_repo(plan.repo_id, private=private, repo_type=REPO_TYPE)
    if revision != "main" and not revision.startswith("refs/"):
        client.ensure_branch(repo, revision, repo_type=REPO_TYPE)

    def build(state: State) -> Contents:
        manifest, delete = _merged(client, repo, plan, state)
        readme = state.tree.get("README.md")
        if readme is not None:
            existing = _text(client, repo, "README.md", state.head)
        else:
            local = plan.folder / "README.md"
            existing = local.read_text(encoding="utf-8") if local.is_file() else None
        card = update_card(existing, manifest, repo)
        files = [f for f in plan.files if f.path != MANIFEST]
        files.append(LocalFile(MANIFEST, _json(manifest)))
        files.append(LocalFile("README.md", card.encode()))
        return Contents(files, frozenset(delete))

    names = ", ".join(plan.manifest["configs"])
    with shown() as progress:
        return publish(
            client,
            repo,
            build,
            message=message or f"Publish activations: {names}",
            revision=revision,
            repo_type=REPO_TYPE,
            pr=pr,
            progress=progress,
        )


def _merged(client: HubClient, repo: str, plan: PushPlan, state: State) -> tuple[dict[str, Any], set[str]]:
    """The manifest of what the repo will hold, and the files of replaced configs that are no longer part of them."""
    manifest = dict(plan.manifest)
    ours = {file.path for file in plan.files}
    if MANIFEST in state.tree:
        import json

        held = json.loads(_text(client, repo, MANIFEST, state.head))
        configs = {**held.get("configs", {}), **manifest["configs"]}
        manifest["configs"] = {name: configs[name] for name in sorted(configs, key=natural)}
        if run := {**held.get("run", {}), **manifest.get("run", {})}:
            manifest["run"] = run
    delete = {
        path
        for path in state.tree
        if path.rpartition("/")[0] in plan.manifest["configs"]
        and parse_shard_name(path.rpartition("/")[2])
        and path not in ours
    }
    return manifest, delete


def _text(client: HubClient, repo: str, path: str, head: str) -> str:
    return client.download(repo, path, revision=head, repo_type=REPO_TYPE).read_text(encoding="utf-8")


def _json(value: Any) -> bytes:
    import json

    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# -- reading -------------------------------------------------------------------------------------------------------


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
    name = choose(sorted(_configs(tree), key=natural))
    wanted = [path for path in tree if path.startswith(f"{name}/") or path == MANIFEST]
    size = sum(tree[path].size for path in wanted)
    with shown() as progress, ThreadPoolExecutor(READERS) as pool:
        progress.start(f"fetching {repo_id} {name}", len(wanted), size)
        jobs = {path: pool.submit(client.download, repo_id, path, revision=sha, repo_type=REPO_TYPE) for path in wanted}
        for path, job in jobs.items():
            file = job.result()
            if file.stat().st_size != tree[path].size:
                raise HubRequestError(
                    f"{path}: expected {tree[path].size} bytes, found {file.stat().st_size} in the cache",
                    hint=f"remove {file} and try again",
                )
            progress.advance(1, tree[path].size)
    return client.cached_snapshot(repo_id, sha, repo_type=REPO_TYPE), name


def _configs(tree: dict[str, RemoteFile]) -> list[str]:
    found = {path.split("/")[0] for path in tree if path.count("/") == 1 and parse_shard_name(path.split("/")[1])}
    return list(found)


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
        return sorted(_configs(self.tree), key=natural)

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


def remote_manifest(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """The manifest of a dataset repo, empty where it has none."""
    repo, at = split_repo(repo_id, revision)
    listing = open_remote(repo, revision=at, token=token)
    if MANIFEST not in listing.tree:
        return {}
    return read_json(listing.client.download(repo, MANIFEST, revision=listing.revision, repo_type=REPO_TYPE))


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
            group, length = [places.pop(0)], 0
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
        with explained(self.client, self.repo_id, revision=self.revision, path=self.path, repo_type=REPO_TYPE):
            data = self.client.retry(lambda: self._ask(start, length), f"reading {self.path}")
        if len(data) != length:
            raise HubRequestError(
                f"{self.name}: expected {length} bytes at {start}, found {len(data)}",
                hint="the server does not answer range requests; open the dataset without stream=True",
            )
        return data

    def _ask(self, start: int, length: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        home = hf_hub_url(
            self.repo_id, self.path, repo_type=REPO_TYPE, revision=self.revision, endpoint=self.client.endpoint
        )
        headers = build_hf_headers(token=self.client.token, library_name=LIBRARY, library_version=__version__)
        span = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        with self._lock:
            address = self._address
        if address is not None and address != home:
            # a signed address of the storage behind the Hub: it must not see the token, and it expires
            answer = get_session().get(address, headers=span, follow_redirects=True, timeout=60)
            if answer.status_code == 206:
                return answer.content
            with self._lock:
                self._address = None
        answer = get_session().get(home, headers={**headers, **span}, follow_redirects=True, timeout=60)
        hf_raise_for_status(answer)
        if status_of_response(answer) == 200 and length < self.size:
            raise HubRequestError(f"{self.name}: the server ignores ranges", hint="open it without stream=True")
        with self._lock:
            self._address = str(answer.url)
        return answer.content

    def arrow(self) -> Any:
        """A file object for pyarrow."""
        return _Seekable(self)


def status_of_response(answer: Any) -> int:
    """The status of an answer."""
    return int(answer.status_code)


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
