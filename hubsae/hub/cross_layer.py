"""Cross-layer transcoders by repo or folder: every file of theirs at one commit, then read as one object."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from hubsae import formats
from hubsae.core.cross_layer import CrossLayerTranscoder
from hubsae.core.errors import NotFoundError
from hubsae.hub.client import split_repo
from hubsae.hub.load import Where

FILES = re.compile(r"^(?:W_(?:enc|dec)_\d+|(?:.*[_-])?layer_\d+)\.safetensors$|^config\.yaml$")


def read_cross_layer(
    repo_or_path: str | os.PathLike[str],
    subfolder: str = "",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    hook: str | None = None,
    hook_out: str | None = None,
    base_model: str | None = None,
) -> CrossLayerTranscoder:
    """A cross-layer transcoder, from a folder or a repo on the Hub (`repo_or_path`, or `subfolder` in it).

    circuit-tracer's layout and Gemma Scope 2's; `hook` and `hook_out` say where it reads and writes (`mlp_in`,
    `mlp_out`), and `base_model` of what model, if its files do not. `revision`, `token`, `cache_dir` and
    `local_files_only` are as for `HubSAE.from_pretrained`.

    >>> clt = read_cross_layer("mntss/clt-gemma-2-2b-426k")  # doctest: +SKIP
    >>> with clt.attach(model) as codes: model(ids)  # doctest: +SKIP
    """
    options = {"hook": hook, "hook_out": hook_out, "base_model": base_model}
    if Path(repo_or_path).exists():
        return formats.read_cross_layer(Path(repo_or_path) / subfolder, **options)
    repo, revision = split_repo(str(repo_or_path), revision)
    client = Where(token=token, cache_dir=cache_dir, local_files_only=local_files_only).client()
    sha = client.resolve(repo, revision)
    folder = client.cached_snapshot(repo, sha) / subfolder
    if not client.offline:
        here = [name for name in client.tree(repo, sha) if PurePosixPath(name).parent == PurePosixPath(subfolder)]
        wanted = [name for name in here if FILES.match(PurePosixPath(name).name)]
        if not wanted:
            raise NotFoundError(
                f"{repo} holds no cross-layer transcoder in {subfolder or 'its root'}",
                hint="give its folder: read_cross_layer(repo, 'clt/width_262k_l0_medium')",
            )
        for name in wanted:
            client.download(repo, name, revision=sha)
        folder = client.download(repo, wanted[0], revision=sha).parent
    if base_model is None and "gemma-scope-2" in repo:
        options["base_model"] = "google/" + repo.rpartition("/")[2].replace("scope-2", "3").replace("270m-pt", "270m")
    return formats.read_cross_layer(folder, **options)
