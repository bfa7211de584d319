"""Find out what kind of activations a path holds: our folders, SAELens caches, piles of files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hubsae.activations.layout import VECTOR, config_name, configs_in, shards_in
from hubsae.activations.parquet_source import ParquetSource
from hubsae.activations.sources import ArrowSource, ByteFile, LocalFile, RawSource, Source, TensorSource
from hubsae.core.errors import DataError, FormatError, HookError, NotFoundError, nearest
from hubsae.core.files import read_json, safetensors_header
from hubsae.core.hooks import HookPoint
from hubsae.core.text import natural_key

PILE = re.compile(r"(?:(?P<stage>.+?)_)?layers?[_.]?(?P<layer>\d+)(?:_(?P<split>train|val|validation|test))?$")
SUFFIXES = (".pt", ".npy", ".safetensors", ".parquet")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_FLOATS = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}


class Found(NamedTuple):
    """What `ActivationDataset` is made of."""

    sources: list[Source]
    config: str
    split: str
    path: str
    configs: list[str]


def no_split(path: str, config: str, split: str, have: Sequence[str]) -> NotFoundError:
    """The error for a split that is not there."""
    return NotFoundError(f"{path} ({config}) has no split {split!r}", hint=f"splits here: {', '.join(have) or 'none'}")


def choose_config(path: str, have: Sequence[str], wanted: str | int | None) -> str:
    """The config meant by `wanted`: its name, another spelling of the hook point, or the only one there is."""
    if not have:
        raise NotFoundError(
            f"{path} holds no activations", hint="expected folders such as layers.18 with .parquet files"
        )
    if wanted is None:
        if len(have) == 1:
            return have[0]
        raise NotFoundError(f"{path} holds {len(have)} configs; say which", hint=f"configs: {', '.join(have)}")
    if str(wanted) in have:
        return str(wanted)
    try:
        hook = HookPoint.parse(wanted).name
    except HookError:
        hook = str(wanted)
    fitting = [name for name in have if name == hook or name.endswith("." + hook)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise NotFoundError(f"{path}: {wanted!r} fits several configs", hint=f"choose one of {', '.join(fitting)}")
    raise NotFoundError(f"{path} has no config {str(wanted)!r}", hint=f"configs here: {nearest(str(wanted), have)}")


def parquet_shards(
    files: Sequence[ByteFile], path: str, config: str, split: str, configs: Sequence[str], vector: str | None = None
) -> Found:
    """The shards of a split, without empty ones."""
    sources: list[Source] = [ParquetSource(file, vector=vector or VECTOR) for file in files]
    return Found([s for s in sources if s.n_rows] or sources[:1], config, split, path, list(configs))


def find_activations(path: Path, config: str | int | None, split: str, *, vector: str | None = None) -> Found:
    """What lies at a local path."""
    if configs := configs_in(path):
        name = choose_config(str(path), configs, config)
        shards = shards_in(path / name)
        if split not in shards:
            raise no_split(str(path), name, split, sorted(shards))
        files = [LocalFile(p) for p in shards[split]]
        return parquet_shards(files, str(path), name, split, configs, vector)
    if shards_in(path):  # the folder of one config
        return find_activations(path.parent, path.name, split, vector=vector)
    if (path / "state.json").is_file():
        return _open_saelens(path, config)
    pile = find_pile(path)
    if not pile:
        raise FormatError(
            path,
            "activations",
            "none that are known",
            hint="known: hubsae folders, SAELens caches, .pt, .npy, .safetensors and .parquet files of vectors",
        )
    name = choose_config(str(path), list(pile), config)
    splits = pile[name]
    if split not in splits:
        raise no_split(str(path), name, split, sorted(splits))
    sources: list[Source] = []
    for file in splits[split]:
        sources += open_file(file, vector)
    return Found(sources, name, split, str(path), list(pile))


def find_pile(path: Path) -> dict[str, dict[str, list[Path]]]:
    """Files of matrices by config and split, read from names such as `ppo_step10_layer18_train.pt`."""
    files = [path] if path.is_file() else sorted(path.rglob("*"), key=lambda p: natural_key(p.as_posix()))
    found: dict[str, dict[str, list[Path]]] = {}
    for file in files:
        if file.suffix not in SUFFIXES or not file.is_file() or file.name.startswith("."):
            continue
        match = PILE.fullmatch(file.stem)
        if match:
            hook = f"layers.{int(match['layer'])}"
            name = config_name(hook, re.sub(r"[^A-Za-z0-9._-]", "-", match["stage"]) if match["stage"] else None)
            split = {"val": "validation", None: "train"}.get(match["split"], match["split"])
        else:
            parent = file.parent.name if path.is_dir() and file.parent != path else "default"
            folder = PILE.fullmatch(parent)
            name, split = (f"layers.{int(folder['layer'])}" if folder else parent), "train"
        found.setdefault(name, {}).setdefault(split, []).append(file)
    return found


def open_file(path: Path, vector: str | None = None) -> list[Source]:
    """The matrices in one file."""
    if path.suffix == ".parquet":
        return [ParquetSource(LocalFile(path), vector=vector or VECTOR)]
    if path.suffix == ".npy":
        return [_open_npy(path)]
    if path.suffix == ".safetensors":
        return _open_safetensors(path, vector)
    return [_open_pt(path, vector)]


def _open_npy(path: Path) -> Source:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise FormatError(path, "a .npy matrix", f"something else ({error})") from error
    kinds = {"float16": torch.float16, "float32": torch.float32}
    if mapped.ndim < 2 or mapped.dtype.name not in kinds or not mapped.flags.c_contiguous:
        found = f"{mapped.dtype} of shape {mapped.shape}"
        raise FormatError(path, "a C-ordered matrix [..., d] of float16 or float32", found)
    shape = (int(np.prod(mapped.shape[:-1])), mapped.shape[-1])
    return RawSource(LocalFile(path), int(mapped.offset), shape, kinds[mapped.dtype.name], str(path))


def _open_safetensors(path: Path, wanted: str | None) -> list[Source]:
    tensors = safetensors_header(path).tensors
    matrices = {k: v for k, v in tensors.items() if len(v.shape) >= 2 and v.dtype in _FLOATS}
    if wanted is None and len({v.shape[-1] for v in matrices.values()}) == 1 and len(matrices) == 1:
        wanted = next(iter(matrices))
    if wanted not in matrices:
        raise DataError(
            f"{path} holds {len(matrices)} matrices; say which are the activations",
            hint=f"vector=... out of {', '.join(matrices) or 'none'}",
        )
    chosen = matrices[wanted]
    shape = (int(np.prod(chosen.shape[:-1])), chosen.shape[-1])
    return [RawSource(LocalFile(path), chosen.start, shape, _FLOATS[chosen.dtype], str(path))]


def _open_pt(path: Path, wanted: str | None) -> Source:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of the old, unzipped format cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, pickle errors among them
        raise FormatError(
            path,
            "tensors that load with weights_only=True",
            f"{type(error).__name__}: {str(error).splitlines()[0][:160]}",
            hint="nothing else is ever unpickled; save the bare tensor again with torch.save",
        ) from error
    labels: dict[str, np.ndarray] = {}
    if isinstance(loaded, Mapping):
        keys = [k for k, v in loaded.items() if isinstance(v, torch.Tensor) and v.ndim >= 2 and v.is_floating_point()]
        name = wanted or next(
            (k for k in ("acts", "activations", VECTOR) if k in keys), keys[0] if len(keys) == 1 else None
        )
        if name not in keys:
            raise DataError(
                f"{path} holds several tensors; say which are the activations", hint=f"vector=... out of {keys}"
            )
        rows = loaded[name].flatten(0, -2).shape[0]
        for theirs, ours in (("tokens", "token_id"), ("positions", "position"), ("text_ids", "sample_id")):
            value = loaded.get(theirs)
            if isinstance(value, torch.Tensor) and value.numel() == rows:
                labels[ours] = value.flatten().numpy()
        loaded = loaded[name]
    if not isinstance(loaded, torch.Tensor) or loaded.ndim < 2:
        raise FormatError(path, "a matrix [rows, d]", f"{type(loaded).__name__} {tuple(getattr(loaded, 'shape', ()))}")
    return TensorSource(loaded.flatten(0, -2), str(path), labels)


def _open_saelens(path: Path, config: str | int | None) -> Found:
    """A folder written by SAELens' CacheActivationsRunner (`datasets` Arrow files, one context per row)."""
    state, info = read_json(path / "state.json"), read_json(path / "dataset_info.json")
    features = info.get("features", {})
    hooks = [n for n, f in features.items() if isinstance(f, dict) and str(f.get("_type", "")).startswith("Array2D")]
    by_name = {}
    for hook in hooks:
        try:
            by_name[HookPoint.parse(hook).name] = hook
        except HookError:
            by_name[hook] = hook
    wanted = next((name for name, hook in by_name.items() if hook == config), config)  # the original name will do
    name = choose_config(str(path), list(by_name), wanted)
    sources: list[Source] = []
    samples = 0
    for entry in state.get("_data_files", []):
        source = ArrowSource(path / Path(entry["filename"]).name, by_name[name], samples)
        samples += source.n_samples
        sources.append(source)
    return Found(sources, name, "train", str(path), list(by_name))
