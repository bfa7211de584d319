"""What is done with formats: read one SAE, write it, convert, write further formats beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from hubsae.core.config import Architecture, TokenNorm
from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import umask
from hubsae.core.options import named_options, pass_on
from hubsae.core.sae import SAE
from hubsae.formats import native
from hubsae.formats.base import Format, Overrides, reading
from hubsae.formats.detection import FORMATS, MAPPED, choose, format_named, probe_of


@named_options
def read(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    features: Sequence[int] | None = None,
    architecture: Architecture | None = None,
    k: int | None = None,
    topk_relu: bool | None = None,
    threshold: float | None = None,
    decode_adds_b_pre: bool | None = None,
    apply_b_dec_to_input: bool | None = None,
    transposed: bool | None = None,
    token_norm: TokenNorm | None = None,
    input_scale: float | None = None,
    layer: int | None = None,
    stage: str | None = None,
    hook: str | None = None,
    hook_out: str | None = None,
    map: str | Mapping[str, str] | None = None,
    base_model: str | None = None,
    base_model_revision: str | None = None,
) -> SAE:
    """Read one SAE in any known format into the canonical form.

    From `architecture` on they are choices where the file does not say, or against its reader; see `convert`.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as d:
    ...     _ = write(sae, d, "native")
    ...     read(d).config.k
    2
    """
    choices = pass_on(Overrides, locals())
    with reading(Path(path)):
        probe = probe_of(path)
        chosen = choose(probe, format or (MAPPED if choices.map else None))
        assert chosen.read is not None
        native_as_it_is = chosen.name == "native" and not choices.named()
        if native_as_it_is and str(device) == "cpu":
            return native.read(probe.path, dtype=dtype, features=features)
        sae = None if native_as_it_is else chosen.read(probe, choices)
    if sae is None:  # apart, since what a device raises is not the file's fault
        return native.read(probe.path, device=device, dtype=dtype, features=features)
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
    found, target = format_named(format, "write"), Path(path)
    assert found.write is not None
    if found.suffix is not None:
        if target.is_dir() or not target.suffix:
            target = target / f"sae{found.suffix}"
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
        os.chmod(scratch, 0o777 & ~umask())
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


@named_options
def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "native",
    format: str | None = None,
    *,
    architecture: Architecture | None = None,
    k: int | None = None,
    topk_relu: bool | None = None,
    threshold: float | None = None,
    decode_adds_b_pre: bool | None = None,
    apply_b_dec_to_input: bool | None = None,
    transposed: bool | None = None,
    token_norm: TokenNorm | None = None,
    input_scale: float | None = None,
    layer: int | None = None,
    stage: str | None = None,
    hook: str | None = None,
    hook_out: str | None = None,
    map: str | Mapping[str, str] | None = None,
    base_model: str | None = None,
    base_model_revision: str | None = None,
) -> SAE:
    """Read one format and write another; returns the SAE that was written.

    `source` is a file or folder, read as `format` if that is given; `target` is written as `to`. The rest are choices
    where the file does not say, or against its reader: `architecture`, `k`, `topk_relu` (a ReLU behind the top-k),
    `threshold` (of batch top-k), `decode_adds_b_pre`, `apply_b_dec_to_input`, `transposed` (square W_enc stored as
    [d_sae, d_in]), `token_norm`, `input_scale`; and for the record `layer`, `stage`, `hook`, `hook_out` (where a
    transcoder writes), `map` (which tensor is which, in files of no known layout), `base_model` and
    `base_model_revision`.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> made = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as d:
    ...     _ = write(made, f"{d}/mine", "native")
    ...     convert(f"{d}/mine", f"{d}/theirs", to="sparsify").config.k
    2
    """
    sae = pass_on(read, locals(), path=source)
    write(sae, target, to)
    return sae


def write_also(sae: SAE, folder: str | os.PathLike[str], formats: Iterable[str]) -> None:
    """Write further formats beside an SAE's own files: sparsify, onnx, pt, raw, bundle.

    sparsify's keys are added to cfg.json, so that the one folder loads in SAELens and in sparsify.
    """
    for name in formats:
        write_one = FORMATS[name].write_beside if name in FORMATS else None
        if write_one is None:
            known = ", ".join(f.name for f in FORMATS.values() if f.write_beside)
            raise ConfigError(f"{name!r} cannot be written beside an SAE", hint=f"choose from {known}")
        write_one(sae, Path(folder))
