"""Publish an activation dataset: a folder of Parquet files, in one commit.

Vectors never go through `datasets.push_to_hub` (it writes them 13 to 17 times slower, in pages our reader cannot read
directly): the finished Parquet files are uploaded as they are, object by object, and become visible in one commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubsae.activations.card import update_card
from hubsae.activations.dataset import ActivationDataset
from hubsae.activations.layout import MANIFEST, configs_in, parse_shard_name, shards_in
from hubsae.activations.manifest import finalize
from hubsae.core.errors import DataError
from hubsae.core.files import json_text, read_json
from hubsae.core.text import natural_key
from hubsae.hub.client import HubClient
from hubsae.hub.contents import Contents, LocalFile, State
from hubsae.hub.secrets import refuse_secrets
from hubsae.hub.upload import Published, publish

REPO_TYPE = "dataset"


@dataclass(frozen=True)
class ActivationsPlan:
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
    folder: str | Path,
    repo_id: str | None = None,
    *,
    client: HubClient | None = None,
    verify: bool = True,
    allow_secrets: bool = False,
) -> ActivationsPlan:
    """Look at a folder before it is published: finish it, check every page, look for secrets, list the files."""
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
    if not allow_secrets:
        card = root / "README.md"
        refuse_secrets([*files, LocalFile(card.name, card)] if card.is_file() else files)
    if repo_id is None:
        client = client or HubClient()
        repo_id = f"{client.whoami()}/{root.resolve().name}"
    return ActivationsPlan(repo_id, root, files, manifest)


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
    allow_secrets: bool = False,
    client: HubClient | None = None,
    notify: Callable[[str], None] | None = None,
    plan: ActivationsPlan | None = None,
) -> Published:
    """Publish a dataset folder to a dataset repo: one commit, or none. Interrupted, the next call completes it.

    Every page is read back and its checksum compared before anything is sent. Configs that are on the Hub and not
    in the folder stay, so several harvests can go into one repo; files of a config are replaced as a whole. What looks
    like a token or key is refused without `allow_secrets`.
    """
    client = client or HubClient(token=token, notify=notify)
    plan = plan or plan_push(folder, repo_id, client=client, verify=verify, allow_secrets=allow_secrets)
    repo = client.ensure_repo(plan.repo_id, private=private, repo_type=REPO_TYPE)

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
        files.append(LocalFile(MANIFEST, json_text(manifest).encode()))
        files.append(LocalFile("README.md", card.encode()))
        return Contents(files, frozenset(delete))

    names = ", ".join(plan.manifest["configs"])
    return publish(
        client,
        repo,
        build,
        message=message or f"Publish activations: {names}",
        revision=revision,
        repo_type=REPO_TYPE,
        pr=pr,
    )


def _merged(client: HubClient, repo: str, plan: ActivationsPlan, state: State) -> tuple[dict[str, Any], set[str]]:
    """The manifest of what the repo will hold, and the files of replaced configs that are no longer part of them."""
    manifest = dict(plan.manifest)
    ours = {file.path for file in plan.files}
    if MANIFEST in state.tree:
        held = json.loads(_text(client, repo, MANIFEST, state.head))
        configs = {**held.get("configs", {}), **manifest["configs"]}
        manifest["configs"] = {name: configs[name] for name in sorted(configs, key=natural_key)}
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
