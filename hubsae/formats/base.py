"""What a format is, how a path is looked at, and the choices a person may make.

A format has a `detect`, which says from content alone whether it reads a path (never from a guess), a `read`, which
names what its tensors mean and leaves the algebra to `assembling.assemble`, and where it makes sense a `write`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hubsae.core.config import Architecture, TokenNorm
from hubsae.core.errors import ConfigError, FormatError, HubSAEError, nearest
from hubsae.core.sae import SAE
from hubsae.core.text import printable
from hubsae.formats import tensors as io
from hubsae.formats.names import NameInfo, parse_name


class ReadWarning(UserWarning):
    """Something about a file is not known or was decided by its reader; the message says what."""


@dataclass(frozen=True)
class Overrides:
    """Choices a person makes where a file does not say, or against what its reader would decide.

    >>> Overrides.of({"k": 64}).k
    64
    """

    architecture: Architecture | None = None
    k: int | None = None
    topk_relu: bool | None = None
    """topk: whether a ReLU follows the selection."""
    threshold: float | None = None
    """batch_topk: the inference threshold to store; None keeps what the file has."""
    decode_adds_b_pre: bool | None = None
    """Whether the decoder adds the pre-bias back."""
    apply_b_dec_to_input: bool | None = None
    """Whether b_dec is subtracted before encoding, where the layout leaves it open."""
    transposed: bool | None = None
    """Square matrices of a layout with no fixed orientation: True if stored as [d_sae, d_in] for W_enc."""
    map: Any = None
    """Which tensor is which, for files of no known layout: W_enc=enc.weight.T,b_enc=enc.bias,..."""
    token_norm: TokenNorm | None = None
    input_scale: float | None = None
    """A scalar the activations were multiplied by in training and that is not in the weights."""
    layer: int | None = None
    stage: str | None = None
    hook: str | None = None
    hook_out: str | None = None
    """Transcoders: where what they predict lies."""
    base_model: str | None = None
    base_model_revision: str | None = None

    @staticmethod
    def of(values: dict[str, Any]) -> Overrides:
        """Check names; None means not given."""
        known = [f.name for f in fields(Overrides)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"there is no choice named {name!r} when reading an SAE",
                    hint=f"nearest: {nearest(name, known)}; all: {', '.join(known)}",
                )
        return Overrides(**values)

    def named(self) -> dict[str, Any]:
        """The choices that were made."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def of_reading(self) -> list[str]:
        """Those that change how tensors are read, not what is recorded about them."""
        said = ("layer", "stage", "hook", "hook_out", "base_model", "base_model_revision")
        return sorted(name for name in self.named() if name not in said)


class Probe:
    """One look at a path, shared by all formats, so that each file is opened once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._cache: dict[str, Any] = {}
        if not self.path.exists():
            raise FormatError(self.path, "an SAE file or folder", "nothing at that path")

    @cached_property
    def is_dir(self) -> bool:
        """Whether a folder was given."""
        return self.path.is_dir()

    @cached_property
    def names(self) -> frozenset[str]:
        """Files in the folder; for a file, its own name."""
        if not self.is_dir:
            return frozenset([self.path.name])
        return frozenset(item.name for item in self.path.iterdir() if not item.name.startswith("."))

    @cached_property
    def name(self) -> NameInfo:
        """What the path's own name says (layer, stage, k ...)."""
        return parse_name(self.path.name)

    def file(self, name: str) -> Path:
        """A file of the folder, or the file itself."""
        return self.path / name if self.is_dir else self.path

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = load()
        return self._cache[name]

    def _mapping(self, name: str, load: Callable[[Path], Any]) -> dict[str, Any]:
        file = (self.path if self.is_dir else self.path.parent) / name
        value = self._once(name, lambda: load(file)) if file.is_file() else {}
        return value if isinstance(value, dict) else {}

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object beside or inside the path; {} where there is none. A broken one is an error."""
        return self._mapping(name, io.read_small_json)

    def yaml(self, name: str) -> dict[str, Any]:
        """A YAML mapping beside or inside the path; {} where there is none."""
        return self._mapping(name, io.read_small_yaml)

    def header(self, name: str = "") -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names, types and shapes of a safetensors file; {} where there is none."""
        file = self.file(name)
        if not file.is_file() or file.suffix != ".safetensors":
            return {}
        return self._once(name, lambda: io.safetensors_header(file))

    def pickle(self, name: str = "") -> Any:
        """What a PyTorch file holds; None where there is none."""
        file = self.file(name)
        if not file.is_file() or file.suffix not in io.PICKLES:
            return None
        return self._once(name, lambda: io.read_pickle(file))

    def state(self, name: str = "") -> dict[str, Any]:
        """The dict that a PyTorch file holds; anything else is an error."""
        value = self.pickle(name)
        if not isinstance(value, dict):
            raise FormatError(self.file(name), "a state dict", type(value).__name__)
        return value


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What a reader trips over in a file is the file's fault: a typed error that names it, whatever was raised."""
    try:
        yield
    except HubSAEError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        what = printable(f"{type(error).__name__}: {error}".splitlines()[0], 160)
        raise FormatError(
            path, "an SAE", f"content that contradicts itself ({what})", hint="the file is damaged; download it again"
        ) from error


class Files(NamedTuple):
    """Files that together are one SAE, by their paths from its folder."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One on-disk format."""

    name: str
    title: str
    detect: Callable[[Probe], str | None] = lambda probe: None
    """Why this format reads the path, in words, or None."""
    read: Callable[[Probe, Overrides], SAE] | None = None
    write: Callable[..., Any] | None = None
    """write(sae, path) where it can be written."""
    write_beside: Callable[[SAE, Path], Any] | None = None
    """write_beside(sae, folder) where it can be written beside an SAE's own files."""
    files: tuple[Files, ...] = ()
    """What makes up an SAE that is a folder; in a repo, what is downloaded of it."""
    suffixes: tuple[str, ...] = ()
    """Suffixes of an SAE that is a single file."""
    beside: tuple[str, ...] = ()
    """Files that say more about a single file, from its folder; `{stem}` is its name without the suffix."""
    covers: frozenset[str] = frozenset()
    """Formats whose reading of the same files gives the same SAE, so that both fitting is no ambiguity."""
    layout: str = ""
    """What its files look like, for the docs."""
    suffix: str | None = None
    """Suffix of a single-file format when written."""
