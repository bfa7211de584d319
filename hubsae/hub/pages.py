"""The feature pages of a release on the Hub: fetched to look at, or published as a static Space of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hubsae.core.errors import HubSAEError
from hubsae.hub.client import HubClient, split_repo
from hubsae.hub.contents import Contents, LocalFile, State
from hubsae.hub.secrets import refuse_secrets
from hubsae.hub.upload import Published, publish
from hubsae.index.features import FeatureIndex
from hubsae.index.page import FOLDER, TABLES, indexes, render

README = """---
title: {title}
emoji: 🔎
colorFrom: gray
colorTo: blue
sdk: static
pinned: false
---

Features of the sparse autoencoders of [{repo}]({url}): what each fires on, how strongly, and what it makes likelier.
"""


def fetch(
    repo: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    notify: Callable[[str], None] | None = None,
    every: bool = False,
) -> Path:
    """Download what the feature pages of a repo read, through the shared cache; the folder that holds it.

    With `every`, all files of its indexes.
    """
    repo_id, revision = split_repo(repo, revision)
    client = HubClient(token, endpoint or "", notify=notify)
    sha = client.resolve(repo_id, revision)
    if client.offline:
        return client.cached_snapshot(repo_id, sha)
    wanted = {"summary.json", *TABLES}
    parts = (path.split("/") for path in client.tree(repo_id, sha))
    paths = ["/".join(p) for p in parts if len(p) == 3 and p[0] == FOLDER and (every or p[2] in wanted)]
    if not paths:
        raise HubSAEError(
            f"{repo_id} has no reverse index", hint="make one from the release and push again: hubsae index"
        )
    for path in paths:
        client.download(repo_id, path, revision=sha)
    return client.cached_snapshot(repo_id, sha)


def open_index(source: str | Path, sae: str | None = None, *, revision: str | None = None) -> FeatureIndex:
    """The index of an SAE: from a release folder, the folder of an index, or a repo (`owner/name[@revision]`).

    `open_index("me/my-sae", "layers.15")[123].examples`
    """
    root = Path(source) if Path(source).is_dir() else fetch(str(source), revision=revision, every=True)
    return FeatureIndex.open(root, sae)


def publish_space(
    release: Path,
    space: str,
    *,
    repo: str,
    private: bool | None = None,
    allow_secrets: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Published:
    """Publish the pages of a release folder as a static Space, in one commit; `repo` is what the pages tell to load.

    Nothing runs there: a static Space serves files, and the browser does the rest. What looks like a token or key is
    refused without `allow_secrets`.
    """
    saes = indexes(release)
    if not saes:
        raise HubSAEError(
            f"{release} has no reverse index", hint=f"make one: hubsae index {release} --activations ACTS"
        )
    client = HubClient(token, endpoint or "", notify=notify)
    files = [LocalFile("index.html", render(saes, title=repo, repo=repo).encode())]
    for name in (line["name"] for line in saes):
        files += [LocalFile(f"{FOLDER}/{name}/{table}", release / FOLDER / name / table) for table in TABLES]
    readme = README.format(title=f"Features of {repo.split('/')[-1]}", repo=repo, url=client.page(repo))
    files.append(LocalFile("README.md", readme.encode()))
    if not allow_secrets:
        refuse_secrets(files)

    def build(state: State) -> Contents:
        stale = {path for path in state.tree if path.startswith(f"{FOLDER}/")} - {file.path for file in files}
        return Contents(files, frozenset(stale))

    made = client.ensure_repo(space, repo_type="space", space_sdk="static", private=private)
    return publish(client, made, build, message=f"Feature pages of {repo}", repo_type="space")
