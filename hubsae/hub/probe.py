"""Load the probe that lies beside an SAE, from a release folder or a repo on the Hub: one file, checked."""

from __future__ import annotations

import os
from dataclasses import replace

from hubsae.core.errors import NotFoundError
from hubsae.core.options import pass_on
from hubsae.evals.probes import FILE, Probe
from hubsae.hub.load import Where, fetch


def load_probe(
    repo_or_path: str | os.PathLike[str],
    id: str | None = None,
    *,
    layer: int | None = None,
    stage: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Probe:
    """The probe of an SAE: what predicts a score from its codes.

    `repo_or_path` is a repo on the Hub or a release folder; `id`, `layer` and `stage` name the SAE. `revision`,
    `token`, `endpoint`, `cache_dir`, `local_files_only` and `force_download` are as for `HubSAE.from_pretrained`.

    >>> import tempfile, torch
    >>> from hubsae import HubSAE, Release, SAEConfig
    >>> release = Release.create(tempfile.mkdtemp(), name="r", base_model="me/model")
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> _ = release.add(sae, "layer3")
    >>> _ = Probe(torch.ones(8).double(), 0.5).save(release.folder("layer3"))
    >>> probe = load_probe(release.refresh().path, "layer3")
    >>> probe(sae.encode_sparse(torch.randn(5, 4))).shape
    torch.Size([5])
    """
    where = pass_on(Where, locals())
    client = where.client()
    catalog = where.catalog(client, repo_or_path)
    filters = {name: value for name, value in (("layer", layer), ("stage", stage)) if value is not None}
    entry = catalog.choose(id, filters)
    wanted = FILE if entry.path == "." else f"{entry.path}/{FILE}"
    files = tuple(file for file in entry.files if file.path == wanted)
    if not files:
        with_one = [e.id for e in catalog.entries if any(f.path.endswith(f"/{FILE}") for f in e.files)]
        raise NotFoundError(
            f"{catalog.source} has no probe beside {entry.id}",
            hint=f"SAEs with one: {', '.join(with_one[:10]) or 'none'}",
        )
    return Probe.load(fetch(client, catalog, replace(entry, files=files), force=force_download, everything=True))
