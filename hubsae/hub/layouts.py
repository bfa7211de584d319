"""Which files of a repo without a manifest make up one SAE each, told from their paths alone.

A listing of a repo costs one request, its weights cost gigabytes. So the choice of what to download is made from
names; what a file really is, the readers in `formats` decide from its content once it is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from hubsae.formats.names import NameInfo, parse_path, stem_of

# files of a folder that together are one SAE: (all of these, and any of those that are there)
_FOLDERS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("cfg.json", "sae_weights.safetensors"),
        ("metadata.json", "normalizer.safetensors", "sparsity.safetensors"),
    ),
    (("config.json", "sae_weights.safetensors"), ()),
    (("cfg.json", "sae.safetensors"), ()),
    (("config.json", "ae.pt"), ()),
    (("hyperparams.json", "checkpoints/final.safetensors"), ("lm_config.json",)),
    (("model.safetensors", "model.metadata.json"), ("release_manifest.json",)),
    (("config.json", "params.safetensors"), ()),
    (("params.npz",), ("config.json",)),
)
_SINGLE = (".pt", ".pth", ".safetensors", ".npz")
_NEVER = ("optimizer", "scheduler", "training_args", "activations", "rng_state", "tokenizer", "sparsity", "normalizer")
# files that the language model itself consists of, in case a repo holds both
_MODEL = ("model-0", "pytorch_model", "adapter_model", "consolidated")


@dataclass(frozen=True)
class Unit:
    """The files of one SAE."""

    id: str
    path: str
    """What a reader is pointed at: a folder ("." is the root) or a file."""
    files: tuple[str, ...]
    name: NameInfo = field(default_factory=NameInfo)


def units(paths: Iterable[str]) -> list[Unit]:
    """Group a repo's paths into SAEs.

    >>> [u.id for u in units(["saes/sae_base_layer6.pt", "README.md", "L6/cfg.json", "L6/sae_weights.safetensors"])]
    ['L6', 'saes/sae_base_layer6.pt']
    """
    everything = set(paths)
    folders = {"."} | {str(parent) for path in everything for parent in PurePosixPath(path).parents}
    found: list[Unit] = []
    taken: set[str] = set()
    for folder in sorted(folders):
        for needed, optional in _FOLDERS:
            inside = [_join(folder, name) for name in needed]
            if not everything.issuperset(inside):
                continue
            inside += [path for name in optional if (path := _join(folder, name)) in everything]
            name = parse_path(folder) if folder != "." else NameInfo()
            found.append(Unit(folder, folder, tuple(inside), name))
            # other weights beside them (model.pt, model.onnx, raw tensors) are the same SAE again
            taken.update(path for path in everything if _parent(path) == folder)
            taken.update(inside)
            break
    for path in sorted(everything - taken):
        file = PurePosixPath(path).name.lower()
        if file.endswith(_SINGLE) and not file.startswith(_NEVER) and not file.startswith(_MODEL):
            found.append(Unit(path, path, (path,), parse_path(path)))
    return sorted(found, key=lambda unit: _natural(unit.id))


def short_id(id: str) -> str:
    """An id without the suffix of its file, which may be left out when asking for it."""
    folder, _, file = id.rpartition("/")
    return f"{folder}/{stem_of(file)}" if folder else stem_of(file)


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _natural(text: str) -> list[tuple[int, int | str]]:
    """Sort key in which layer6 comes before layer12."""
    parts: list[tuple[int, int | str]] = []
    digits = ""
    for char in text + "\0":
        if char.isdigit() and char.isascii():
            digits += char
            continue
        if digits:
            parts.append((0, int(digits)))
            digits = ""
        parts.append((1, char))
    return parts
