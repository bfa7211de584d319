"""What a finished dataset says about itself: manifest, statistics files, card. All of it follows from the shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hubsae.activations.dataset import ActivationDataset
from hubsae.activations.layout import FORMAT_VERSION, LABELS, MANIFEST, STATISTICS, configs_in, shards_in
from hubsae.activations.opening import find_pile
from hubsae.activations.parquet_source import ParquetSource
from hubsae.activations.sources import LocalFile
from hubsae.activations.stats import ActivationStats
from hubsae.core.errors import DataError
from hubsae.core.files import atomic_path, read_json, write_json_atomic
from hubsae.version import __version__

FORMAT_NAME = "hubsae-activations"


def survey(root: Path) -> tuple[dict[str, Any], dict[str, ActivationStats]]:
    """The manifest of a dataset folder and the statistics of each config, read from the shards' footers."""
    configs: dict[str, Any] = {}
    statistics: dict[str, ActivationStats] = {}
    for name in configs_in(root):
        splits: dict[str, Any] = {}
        entry: dict[str, Any] = {}
        running: dict[str, ActivationStats] = {}
        for split, paths in sorted(shards_in(root / name).items()):
            sources = [ParquetSource(LocalFile(path)) for path in paths]
            data = ActivationDataset(sources, config=name, split=split, path=str(root))  # refuses what does not belong
            header = sources[0].header
            if header is None:
                raise DataError(f"{paths[0]} was not written by hubsae", hint="rewrite it: hubsae convert-activations")
            entry = {"d": header.d, "dtype": header.dtype, "scale": header.scale}
            entry |= {"columns": {**LABELS, **header.columns}, "source": header.source}
            running[split] = data.stats
            shards = [
                {"file": f"{name}/{p.name}", "rows": s.n_rows, "bytes": p.stat().st_size}
                for p, s in zip(paths, sources, strict=True)
            ]
            splits[split] = {
                "rows": sum(s["rows"] for s in shards),
                "samples": sum(s.counts.get("samples", 0) for s in sources),
                "truncated": sum(s.counts.get("truncated", 0) for s in sources),
                "bytes": sum(s["bytes"] for s in shards),
                "shards": shards,
            }
        of = "train" if "train" in running else next(iter(running))
        statistics[name] = running[of]
        configs[name] = {**entry, "splits": splits, "statistics": {"split": of, **statistics[name].summary()}}
    manifest = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "hubsae": __version__, "configs": configs}
    return manifest, statistics


def finalize(root: str | Path, run: dict[str, Any] | None = None, decode: Callable[[int], str] | None = None) -> Path:
    """Write `activations.json`, the statistics files and the card of a dataset folder; safe to repeat.

    `run` is what a harvest wants on record beside the shards (counts of truncated samples, say); `decode` names the
    tokens with massive activations.
    """
    from hubsae.activations.card import write_card

    root = Path(root)
    manifest, statistics = survey(root)
    if not manifest["configs"]:
        raise DataError(f"{root}: nothing was written, so there is no dataset to finish")
    path = root / MANIFEST
    before = read_json(path) if path.is_file() else {}
    if runs := {**before.get("run", {}), **(run or {})}:
        manifest["run"] = runs
    tokens = dict(before.get("tokens", {}))
    if decode is not None:
        ids = {token for entry in manifest["configs"].values() for token in entry["statistics"]["largest"]}
        tokens |= {str(token): decode(token) for token in sorted(ids)}
    if tokens:
        manifest["tokens"] = tokens
    for name, stats in statistics.items():
        write_statistics(root / name / STATISTICS, stats)
    write_json_atomic(path, manifest)
    write_card(root, manifest)
    return root


def write_statistics(path: Path, stats: ActivationStats) -> None:
    """Mean and std per dimension as safetensors, in the names a release's `normalizer.safetensors` has."""
    from safetensors.torch import save_file

    tensors = {"mean": stats.mean, "std": stats.std}
    tensors |= {"mean_without_first": stats.mean_without_first, "std_without_first": stats.std_without_first}
    facts = {"count": stats.count, "count_without_first": stats.rest.count, "norm_percentiles": stats.norm_percentiles}
    metadata = {"hubsae": json.dumps(facts)}  # one key, because safetensors writes several in no fixed order
    with atomic_path(path) as temporary:
        save_file({k: v.to(torch.float64).contiguous() for k, v in tensors.items()}, temporary, metadata)


def describe(path: str | Path, *, config: str | int | None = None) -> dict[str, Any]:
    """What `hubsae show` tells of activations: rows, type, scale, norm statistics and a histogram per config.

    Works on folders of ours and on what else `ActivationDataset.open` reads (one pass computes the statistics there).

    >>> import tempfile
    >>> from hubsae.activations import ActivationWriter
    >>> with tempfile.TemporaryDirectory() as out:
    ...     with ActivationWriter(out, d=2, config="layers.6") as writer:
    ...         writer.write(torch.ones(3, 2), sample_id=0, position=[0, 1, 2])
    ...     describe(out)["configs"][0]["splits"]
    {'train': 3}
    """
    root = Path(path)
    names = configs_in(root) or list(find_pile(root))
    several = config is None and len(names) > 1
    opened = [ActivationDataset.open(root, name) for name in (names if several else [config])]
    manifest = read_json(root / MANIFEST) if (root / MANIFEST).is_file() else {}
    splits: dict[str, dict[str, int]] = {data.config: {data.split: data.n_rows} for data in opened}
    for name, found in splits.items():
        for split, shards in shards_in(root / name).items():
            found[split] = sum(ParquetSource(LocalFile(p)).n_rows for p in shards)
    return described(str(path), opened, splits, manifest)


def described(
    path: str, opened: Iterable[ActivationDataset], splits: Mapping[str, dict[str, int]], manifest: dict[str, Any]
) -> dict[str, Any]:
    """One entry per config, from its opened split; `splits` has the rows of all of them."""
    rows = [
        {
            "config": data.config,
            "d": data.d,
            "dtype": str(data.stored_dtype).removeprefix("torch."),
            "scale": data.scale,
            "splits": splits[data.config],
            "files": len(data.sources),
            "columns": list(data.label_names),
            "source": data.info,
            "statistics": data.stats.summary(),
            "histogram": data.stats.histogram(),
        }
        for data in opened
    ]
    about = {"run": manifest.get("run", {}), "tokens": manifest.get("tokens", {})}
    return {"kind": "activations", "path": path, "configs": rows, **about}
