"""Hash everything anew: a release, an activation dataset, the states of a training, or what the cache holds of a repo.

Loads trust a file that was hashed once and has not changed since; this trusts nothing, and asks no Hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hubsae.core.errors import HubSAEError, NotFoundError
from hubsae.core.files import read_json, sha256_file
from hubsae.core.progress import progress
from hubsae.core.text import format_bytes, printable
from hubsae.formats.manifest import Manifest
from hubsae.formats.release import check_files
from hubsae.hub.catalog import CACHE_NOTES
from hubsae.hub.client import HubClient, split_repo
from hubsae.hub.contents import LocalFile


@dataclass
class Verified:
    """What was looked at, and what is not as it was written."""

    path: str
    kinds: list[str] = field(default_factory=list)
    """release, SAE, activations, training, cache of a model or dataset."""
    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    """Files of the cache, which can be fetched again."""

    @property
    def whole(self) -> bool:
        """Nothing is damaged."""
        return not self.problems

    def lines(self) -> list[str]:
        """As text."""
        amount = f"{self.files} file{'s' if self.files != 1 else ''}, {format_bytes(self.bytes)}"
        found = "whole" if self.whole else f"{len(self.problems)} damaged"
        return [f"{self.path} ({', '.join(self.kinds)}): {amount}: {found}", *(f"  {p}" for p in self.problems)]


def verify(
    path_or_repo: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    remove: bool = False,
    show: bool | None = None,
) -> Verified:
    """Compare every file with the hash that was written when it was made; damage is listed, not raised.

    `path_or_repo` is a folder, or `owner/name` for all that the cache (`cache_dir`) holds of it, every revision.
    `remove` deletes damaged files of the cache, so that the next load fetches them again. `show` is for progress.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> from hubsae.formats import Release
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     release = Release.create(folder, name="demo")
    ...     _ = release.add(HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2)), "layer1")
    ...     verify(folder).whole, (release.folder("layer1") / "cfg.json").write_text("{}"), verify(folder).whole
    (True, 2, False)
    """
    root = Path(path_or_repo).expanduser()
    out = Verified(str(path_or_repo))
    if root.exists():
        _folder(root, out, show)
    else:
        _cache(split_repo(os.fspath(path_or_repo))[0], HubClient(cache_dir=cache_dir or ""), out, show)
        if remove:
            for blob in out.damaged:
                blob.unlink(missing_ok=True)
    out.problems = [printable(problem) for problem in out.problems]
    return out


def _each(out: Verified, checks: list[tuple[Path, Callable[[], object]]], show: bool | None) -> None:
    """Run a check per file; what it raises is a problem."""
    total = sum(path.stat().st_size for path, _ in checks if path.is_file())
    with progress("hashing", total, "bytes", show=show) as task:
        for path, check in checks:
            size = path.stat().st_size if path.is_file() else 0
            try:
                check()
            except (HubSAEError, OSError) as error:
                out.problems.append(error.message if isinstance(error, HubSAEError) else str(error))
            out.files, out.bytes = out.files + 1, out.bytes + size
            task.advance(size)


# -- folders -----------------------------------------------------------------------------------------------------


def _folder(root: Path, out: Verified, show: bool | None) -> None:
    checks: list[tuple[Path, Callable[[], object]]] = []
    if Manifest.lies_in(root):
        out.kinds.append("release")
        for entry in Manifest.read(root).all_files:
            checks.append((root / entry.path, lambda entry=entry: check_files(root, [entry], hashes=True)))
    elif activations := _shards(root):
        out.kinds.append("activations")
        checks += activations
    elif states := _states(root):
        out.kinds.append("training")
        checks += states
    else:
        from hubsae.formats import read

        out.kinds.append("SAE")
        checks.append((root, lambda: read(root) and None))
    _each(out, checks, show)


def _shards(root: Path) -> list[tuple[Path, Callable[[], object]]]:
    """A check of every page of every shard; and of the hash where the writer noted one."""
    from hubsae.activations.layout import configs_in, shards_in
    from hubsae.activations.parquet_source import ParquetSource
    from hubsae.activations.sources import LocalFile

    checks: list[tuple[Path, Callable[[], object]]] = []
    for config in configs_in(root) if root.is_dir() else []:
        noted: dict[str, str] = {}
        for journal in sorted((root / config).glob(".journal-*.json")):
            noted |= read_json(journal)
        for path in (path for paths in shards_in(root / config).values() for path in paths):

            def check(path: Path = path, sha256: str | None = noted.get(path.name)) -> None:
                if sha256 is not None:
                    _same(path, sha256_file(path), sha256)
                ParquetSource(LocalFile(path)).check()

            checks.append((path, check))
    return checks


def _states(root: Path) -> list[tuple[Path, Callable[[], object]]]:
    from hubsae.train import checkpoint

    folders = [folder for folder in sorted(root.glob("state*")) if folder.is_dir()] if root.is_dir() else []
    return [
        (state / "state.json", lambda state=state: checkpoint.verify(state))
        for folder in folders
        for state in checkpoint.states(folder)
    ]


def _same(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise HubSAEError(f"{path}: expected hash {expected[:16]}..., found {found[:16]}...")


# -- the cache ---------------------------------------------------------------------------------------------------


def _cache(repo_id: str, client: HubClient, out: Verified, show: bool | None) -> None:
    """Every blob against its name, which is its hash: sha256 of a large file, git's of a small one."""
    checks: list[tuple[Path, Callable[[], object]]] = []
    for repo_type in ("model", "dataset"):
        folder = client.cached_snapshot(repo_id, "any", repo_type=repo_type).parents[1]
        blobs = sorted(_blobs(folder))
        if not blobs:
            continue
        out.kinds.append(f"cache of a {repo_type}")
        names = {path.resolve(): path for path in sorted((folder / "snapshots").rglob("*")) if path.is_file()}
        for blob in blobs:

            def check(blob: Path = blob, shown: Path = names.get(blob.resolve(), blob), notes: Path = folder) -> None:
                found = sha256_file(blob) if len(blob.name) == 64 else LocalFile("", blob).git_oid
                if found != blob.name:
                    out.damaged += [blob, notes / CACHE_NOTES / f"ok-{blob.name}"]
                    _same(shown, found, blob.name)

            checks.append((blob, check))
    if not checks:
        raise NotFoundError(
            f"{repo_id} is no folder here, and the cache ({client.cache_dir}) holds nothing of it",
            hint=f"fetch it with: hubsae pull {repo_id}",
        )
    _each(out, checks, show)


def _blobs(folder: Path) -> Iterator[Path]:
    for blob in (folder / "blobs").glob("*"):
        if len(blob.name) in (40, 64) and set(blob.name) <= set("0123456789abcdef") and blob.is_file():
            yield blob
