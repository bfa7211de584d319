"""All formats in one table, and what is done with them: detect, read, write, convert, write beside."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hubsae.core.errors import AmbiguousFormatError, ConfigError, FormatError, nearest
from hubsae.core.sae import SAE
from hubsae.formats import (
    bundle,
    dictionary_learning,
    jumprelu_pt,
    linear_pt,
    llamascopium,
    native,
    onnx,
    openai,
    plain,
    saelens,
    scopes,
    sparsify,
)
from hubsae.formats.base import Format, Overrides, Probe

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        native.FORMAT,
        saelens.FORMAT,
        sparsify.FORMAT,
        dictionary_learning.FORMAT,
        linear_pt.RL_CHAIN,
        linear_pt.GRID,
        jumprelu_pt.FORMAT,
        bundle.FORMAT,
        scopes.QWEN_SCOPE,
        scopes.GEMMA_SCOPE,
        llamascopium.FORMAT,
        openai.FORMAT,
        plain.TENSORS,
        plain.RAW,
        onnx.FORMAT,
    )
}

# Files that mean nothing without the others of their folder.
PART_OF_FOLDER = ("sae_weights.safetensors", "sae.safetensors", "cfg.json", "metadata.json", "ae.pt")

# Names under which optional formats are written beside an SAE's own files.
BESIDE = {"sparsify": ".", "onnx": "model.onnx", "pt": "model.pt", "raw": "raw"}


@dataclass(frozen=True)
class Reading:
    """One way a path can be read."""

    format: str
    why: str
    """What in the file or folder says so."""

    def __str__(self) -> str:
        return f"{self.format}: {self.why}"


def detect(path: str | os.PathLike[str]) -> list[Reading]:
    """Every reading that fits a file or folder, by its content; none is guessed.

    A reading that another one covers (a hubsae folder is also a SAELens folder) is left out.
    """
    return _detect(probe_of(path))


def probe_of(path: str | os.PathLike[str]) -> Probe:
    """A look at a path; the weights or config file of a folder format stands for its folder."""
    file = Path(path)
    if file.name in PART_OF_FOLDER and file.is_file():
        folder = Probe(file.parent)
        if _detect(folder):
            return folder
    return Probe(file)


def _detect(probe: Probe) -> list[Reading]:
    readings = [Reading(f.name, why) for f in FORMATS.values() if (why := f.detect(probe))]
    covered = {name for reading in readings for name in FORMATS[reading.format].covers}
    return [reading for reading in readings if reading.format not in covered]


def choose(path: str | os.PathLike[str], format: str | None = None) -> Format:
    """The one format a path is read with; more than one or none is an error that says how to go on."""
    return _choose(probe_of(path), format)


def _choose(probe: Probe, format: str | None) -> Format:
    if format is not None:
        return _readable(format)
    readings = _detect(probe)
    if len(readings) == 1:
        return FORMATS[readings[0].format]
    if readings:
        raise AmbiguousFormatError(
            f"{probe.path}: {len(readings)} readings fit\n" + "\n".join(f"  {reading}" for reading in readings),
            hint="choose one: format=" + " or format=".join(r.format for r in readings) + " (command line: --format)",
        )
    raise FormatError(probe.path, "an SAE in a known format", _looks_like(probe), hint=_no_format_hint(probe))


def _readable(name: str) -> Format:
    found = FORMATS.get(name)
    if found is None or found.read is None:
        known = [f.name for f in FORMATS.values() if f.read]
        raise ConfigError(
            f"{name!r} is {'only written, not read' if found else 'no format'}",
            hint=f"nearest: {nearest(name, known)}; formats that are read: {', '.join(known)}",
        )
    return found


def _looks_like(probe: Probe) -> str:
    if probe.is_dir:
        names = sorted(probe.names)
        if not names:
            return "an empty folder"
        return f"a folder with {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
    if probe.path.stat().st_size == 0:
        return "an empty file (0 bytes)"
    if header := probe.header():
        return f"tensors {', '.join(sorted(header)[:8])}"
    value = probe.pickle()
    if isinstance(value, dict):
        return f"a dict with {', '.join(str(k) for k in list(value)[:8])}"
    return f"{type(value).__name__}" if value is not None else f"a {probe.path.suffix or 'nameless'} file"


def _no_format_hint(probe: Probe) -> str:
    if probe.is_dir:
        from hubsae.formats.planning import weight_files

        inside = weight_files(probe.path, most=3)
        if inside:
            return (
                f"it holds files such as {inside[0].name}: read one of them, "
                "or make a release of all with `hubsae package`"
            )
    return "`hubsae show PATH` lists what is in it; format=... forces a reading"


def read(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    features: Sequence[int] | None = None,
    **overrides: Any,
) -> SAE:
    """Read one SAE in any known format into the canonical form.

    Overrides are choices where the file does not say, or against its reader: `k`, `architecture`, `topk_relu`,
    `decode_adds_b_pre`, `apply_b_dec_to_input`, `transposed`, `threshold`, `input_scale`, `layer`, `stage`,
    `hook`, `base_model`, ...

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as d:
    ...     _ = write(sae, d, "native")
    ...     read(d).config.k
    2
    """
    probe = probe_of(path)
    choices = Overrides.of(overrides)
    chosen = _choose(probe, format)
    if chosen.name == "native" and not choices.named():
        return native.read(probe.path, device=device, dtype=dtype, features=features)
    assert chosen.read is not None
    sae = chosen.read(probe, choices)
    if features is None and dtype is None and str(device) == "cpu":
        return sae
    return native.build(
        sae.metadata,
        native.only(sae.tensors(), features, sae.d_sae),
        probe.path,
        normalizer=sae.normalizer,
        sparsity=sae.sparsity,
        device=device,
        dtype=dtype,
        features=features,
    )


def write(sae: SAE, path: str | os.PathLike[str], format: str = "native") -> Path:
    """Write one SAE in a format that can be written; whole or not at all."""
    found = FORMATS.get(format)
    if found is None or found.write is None:
        known = [f.name for f in FORMATS.values() if f.write]
        raise ConfigError(
            f"{format!r} is {'only read, not written' if found else 'no format'}",
            hint=f"formats that are written: {', '.join(known)}",
        )
    target = Path(path)
    if found.suffix is not None:
        if target.is_dir() or target.suffix != found.suffix:
            target = target / f"sae{found.suffix}" if target.is_dir() or not target.suffix else target
        target.parent.mkdir(parents=True, exist_ok=True)
        return found.write(sae, target)
    return _write_folder(found, sae, target)


def _write_folder(found: Format, sae: SAE, target: Path) -> Path:
    """A new folder appears under its name only when all its files are written; an existing one is written into."""
    if target.exists() and not target.is_dir():
        raise FormatError(target, f"a folder to write {found.name} into", "a file")
    assert found.write is not None
    if target.exists():
        return found.write(sae, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        found.write(sae, scratch)
        os.chmod(scratch, 0o777 & ~_umask())
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "native",
    format: str | None = None,
    **overrides: Any,
) -> SAE:
    """Read one format and write another; returns the SAE that was written.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> made = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as d:
    ...     _ = write(made, f"{d}/mine", "native")
    ...     convert(f"{d}/mine", f"{d}/theirs", to="sparsify").config.k
    2
    """
    sae = read(source, format, **overrides)
    write(sae, target, to)
    return sae


def write_also(sae: SAE, folder: str | os.PathLike[str], formats: Iterable[str]) -> list[Path]:
    """Write further formats beside an SAE's own files: sparsify, onnx, pt, raw. Returns the new files.

    sparsify's keys are added to cfg.json, so that the one folder loads in SAELens and in sparsify.
    """
    folder = Path(folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    for name in formats:
        if name not in BESIDE:
            raise ConfigError(f"{name!r} cannot be written beside an SAE", hint=f"choose from {', '.join(BESIDE)}")
        if name == "sparsify":
            sparsify.write(sae, folder, merge_cfg=True)
        else:
            write_one = FORMATS[name].write
            assert write_one is not None
            write_one(sae, folder / BESIDE[name])
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    return sorted(p for p, at in after.items() if before.get(p) != at)
