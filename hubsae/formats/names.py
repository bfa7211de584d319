"""What a file name says: stage, layer, k, threshold, expansion, architecture.

Names are read by the few conventions that exist in the wild, or by a pattern a person gives. What a name does
not say stays unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any

from hubsae.core.errors import ConfigError

_ARCHITECTURES = {
    "batchtopk": "batch_topk",
    "batch_topk": "batch_topk",
    "matryoshkabatchtopk": "batch_topk",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "relu": "relu",
    "standard": "relu",
    "vanilla": "relu",
    "gated": "gated",
}
_NUMBER = r"[0-9]+(?:[.p][0-9]+)?(?:e-?[0-9]+)?"
_ANY, _WHOLE = r"[^/]+?", r"[0-9]+"
FIELDS = {
    "stage": _ANY, "layer": _WHOLE, "k": _WHOLE, "threshold": _NUMBER, "expansion": _WHOLE, "architecture": _ANY,
    "name": _ANY,
}  # fmt: skip
"""What a pattern may name, and what each looks like."""
_SUFFIXES = (".safetensors", ".sae.pt", ".pt", ".pth", ".bin", ".npz", ".onnx", ".ckpt")

_STAGE_LAYER = re.compile(r"^sae_(?P<stage>.+?)_layer_?(?P<layer>\d+)(?:_.*)?$")
_LAYER = re.compile(r"(?:^|[^a-z])(?:layers?|blocks)[._-]?(\d+)(?:$|[^0-9])|(?:^|[_.-])[lL](?!0_\d)(\d+)(?:$|[_.RAM-])")
_K = re.compile(r"(?:^|[_-])(?:k|topk|top_k|L0_)[_-]?(\d+)(?:$|[_.-])")
_EXPANSION = re.compile(r"(?:^|[_-])(?:exp)?(\d+)x(?:$|[_.-])", re.IGNORECASE)
_THRESHOLD = re.compile(rf"(?:^|_)t({_NUMBER})(?:$|_)")
_ARCHITECTURE = re.compile(
    r"(?:^|[_.-])(batch_?topk|topk|jumprelu|gated|standard|vanilla|relu)(?:$|[_.0-9-])", re.IGNORECASE
)


@dataclass(frozen=True)
class NameInfo:
    """What could be read from a name; None where it does not say."""

    stage: str | None = None
    layer: int | None = None
    k: int | None = None
    threshold: float | None = None
    """The threshold a JumpReLU was initialised or trained with, as names in a grid give it."""
    expansion: int | None = None
    architecture: str | None = None
    name: str | None = None

    def known(self) -> dict[str, object]:
        """Only what the name says."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def or_else(self, other: NameInfo) -> NameInfo:
        """This, and where it does not say, the other."""
        return NameInfo(**{**other.known(), **self.known()})  # pyright: ignore[reportArgumentType]


def stem_of(name: str) -> str:
    """A file name without the suffix of a weights file.

    >>> stem_of("layer7.sae.pt"), stem_of("JumpReLU_exp4x_t0.5.pt")
    ('layer7', 'JumpReLU_exp4x_t0.5')
    """
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def parse_name(path: str) -> NameInfo:
    """Read the last part of a path by the known conventions.

    >>> parse_name("sae_ppo_step116_layer18.pt").known()
    {'stage': 'ppo_step116', 'layer': 18}
    >>> parse_name("BatchTopK_exp8x_k220.pt").known()
    {'k': 220, 'expansion': 8, 'architecture': 'batch_topk'}
    >>> parse_name("JumpReLU_exp4x_t0.5.pt").known()
    {'threshold': 0.5, 'expansion': 4, 'architecture': 'jumprelu'}
    """
    stem = stem_of(PurePosixPath(path).name)
    stage: str | None = None
    layer: int | None = None
    if match := _STAGE_LAYER.match(stem):
        stage, layer = match["stage"], int(match["layer"])
    elif match := _LAYER.search(stem):
        layer = int(match[1] or match[2])
    k, expansion = _K.search(stem), _EXPANSION.search(stem)
    threshold, architecture = _THRESHOLD.search(stem), _ARCHITECTURE.search(stem)
    kind = _ARCHITECTURES[architecture[1].lower()] if architecture else None
    return NameInfo(
        stage=stage,
        layer=layer,
        k=int(k[1]) if k else None,
        threshold=_number(threshold[1]) if threshold and kind in (None, "jumprelu") else None,
        expansion=int(expansion[1]) if expansion else None,
        architecture=kind,
    )


def parse_path(path: str) -> NameInfo:
    """Read a file's name, and what it does not say from the folders above it (`.../k64/layer18/ae.pt`).

    >>> parse_path("ppo_step10/layer_6/sae.pt").known()
    {'layer': 6}
    """
    info = NameInfo()
    for part in reversed(PurePosixPath(path).parts):
        info = info.or_else(parse_name(part))
    return info


class NamePattern:
    """A naming scheme as a template: `{stage}_L{layer}_k{k}.pt`, matched against the path below the folder.

    >>> NamePattern("{stage}/L{layer}-k{k}.pt").match("ppo_step10/L6-k64.pt").known()
    {'stage': 'ppo_step10', 'layer': 6, 'k': 64}
    >>> NamePattern("layer{layer}.pt").match("readme.pt") is None
    True
    """

    def __init__(self, template: str):
        self.template = template
        parts: list[str] = []
        seen: set[str] = set()
        for piece in re.split(r"(\{[^{}]*\}|\*)", template):
            if piece == "*":
                parts.append(r"[^/]*")
            elif piece.startswith("{") and piece.endswith("}"):
                name = piece[1:-1]
                if name not in FIELDS or name in seen:
                    raise ConfigError(
                        f"the pattern {template!r} "
                        + (f"names {{{name}}} twice" if name in seen else f"has an unknown field {{{name}}}"),
                        hint="fields: " + ", ".join(f"{{{f}}}" for f in FIELDS) + "; * matches anything",
                    )
                seen.add(name)
                parts.append(f"(?P<{name}>{FIELDS[name]})")
            else:
                parts.append(re.escape(piece))
        if not seen:
            raise ConfigError(
                f"the pattern {template!r} has no field",
                hint="write for instance '{stage}_L{layer}_k{k}.pt'; fields: " + ", ".join(FIELDS),
            )
        self._regex = re.compile("".join(parts))

    def match(self, path: str) -> NameInfo | None:
        """What the path says by this scheme, or None where it does not follow it."""
        found = self._regex.fullmatch(path) or self._regex.fullmatch(PurePosixPath(path).name)
        if not found:
            return None
        read = {_WHOLE: int, _NUMBER: _number, _ANY: str}
        values: dict[str, Any] = {name: read[FIELDS[name]](text) for name, text in found.groupdict().items()}
        if "architecture" in values:
            kind = _ARCHITECTURES.get(values["architecture"].lower())
            if kind is None:
                raise ConfigError(f"{path}: {values['architecture']!r} names no architecture")
            values["architecture"] = kind
        return NameInfo(**values)


def _number(text: str) -> float:
    # sweeps write 0p0001 where a dot would look like a suffix
    return float(text.replace("p", "."))
