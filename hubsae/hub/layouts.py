"""Which files of a repo without a manifest make up one SAE each, told from their paths alone.

A listing of a repo costs one request, its weights cost gigabytes. So the choice of what to download is made from
names; what a file really is, the readers in `formats` decide from its content once it is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from hubsae.core.text import natural_key, printable
from hubsae.formats.detection import BESIDE, FOLDERS, SUFFIXES
from hubsae.formats.names import stem_of

_NEVER = ("optimizer", "scheduler", "training_args", "activations", "rng_state", "tokenizer", "sparsity", "normalizer")
# files that the language model itself consists of, in case a repo holds both
_MODEL = ("model-0", "pytorch_model", "adapter_model", "consolidated")


def units(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """A repo's paths as SAEs: by what a reader is pointed at, a folder ("." is the root) or a file, the files of each.

    >>> list(units(["saes/sae_base_layer6.pt", "README.md", "L6/cfg.json", "L6/sae_weights.safetensors"]))
    ['L6', 'saes/sae_base_layer6.pt']
    """
    everything = {path for path in paths if printable(path) == path}  # others are no names: nothing is read from them
    folders = {"."} | {str(parent) for path in everything for parent in PurePosixPath(path).parents}
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for folder in sorted(folders):
        for needed, optional in FOLDERS:
            inside = [_join(folder, name) for name in needed]
            if not everything.issuperset(inside):
                continue
            inside += [path for name in optional if (path := _join(folder, name)) in everything]
            found[folder] = tuple(inside)
            # other weights beside them (model.pt, model.onnx, raw tensors) are the same SAE again
            taken.update(path for path in everything if str(PurePosixPath(path).parent) == folder)
            taken.update(inside)
            break
    for path in sorted(everything - taken):
        file = PurePosixPath(path).name.lower()
        if file.endswith(SUFFIXES) and not file.startswith(_NEVER) and not file.startswith(_MODEL):
            found[path] = (path, *_beside(path, everything))
    return dict(sorted(found.items(), key=lambda unit: natural_key(unit[0])))


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _beside(path: str, everything: set[str]) -> list[str]:
    """Files that say more about a single-file SAE; `../` goes up a folder, inside the repo."""
    found = []
    for pattern in BESIDE:
        folder, name = PurePosixPath(path).parent, pattern.format(stem=stem_of(PurePosixPath(path).name))
        while name.startswith("../"):
            folder, name = folder.parent, name[3:]
        found.append(str(folder / name))
    return sorted({name for name in found if name in everything})
