"""Put folders into repositories of a Hub as they are: how a local hub comes to serve a world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path


def mirror_folders(
    repos: Mapping[str, tuple[str, Path]], endpoint: str, token: str, notify: Callable[[str], None] | None = None
) -> None:
    """Make each repo hold exactly its folder: `repos` is id -> (type, folder). What is there already is not sent."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="hubsae")
    for repo_id, (kind, folder) in repos.items():
        api.create_repo(repo_id, repo_type=kind, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, repo_type=kind, folder_path=folder, delete_patterns="*", commit_message="World of hubsae"
        )
        if notify is not None:
            notify(f"{kind} {repo_id} is served")
