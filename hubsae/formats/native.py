"""The native format: one folder per SAE, which hubsae and SAELens 6 both load.

sae_weights.safetensors   folded float32 tensors, exactly those SAELens expects
cfg.json                  SAELens config
metadata.json             the full record (`hubsae.core.metadata`)
normalizer.safetensors    mean and std [d_in], where there are statistics
sparsity.safetensors      log10 firing frequency [d_sae], where known
fingerprint.safetensors   activations of a short text at its hook point, where a model was at hand
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.files import safetensors_header, write_json_atomic
from hubsae.core.fingerprint import FILE_NAME as FINGERPRINT_NAME
from hubsae.core.fingerprint import Fingerprint
from hubsae.core.metadata import FILE_NAME as METADATA_NAME
from hubsae.core.metadata import Metadata, NormalizerInfo
from hubsae.core.normalizer import Normalizer
from hubsae.core.sae import SAE
from hubsae.formats import saelens
from hubsae.formats import tensors as io
from hubsae.formats.base import Files, Format, Overrides, Probe
from hubsae.version import __version__

WEIGHTS_NAME = saelens.WEIGHTS_NAME
CFG_NAME = saelens.CFG_NAME
NORMALIZER_NAME = "normalizer.safetensors"
SPARSITY_NAME = saelens.SPARSITY_NAME
SAE_FILES = (WEIGHTS_NAME, CFG_NAME, METADATA_NAME, NORMALIZER_NAME, SPARSITY_NAME, FINGERPRINT_NAME)

LATENT_AXIS = {"W_enc": 1, "W_dec": 0, "b_dec": -1, "W_skip": -1} | dict.fromkeys(
    ("b_enc", "threshold", "b_gate", "b_mag", "r_mag"), 0
)
"""Which dimension of each tensor counts latents; -1 for none."""


def detect(probe: Probe) -> str | None:
    """A folder with metadata.json of hubsae and sae_weights.safetensors."""
    if not probe.is_dir or not {METADATA_NAME, WEIGHTS_NAME} <= probe.names:
        return None
    ours = "hubsae_format" in probe.json(METADATA_NAME)
    return "metadata.json of hubsae beside sae_weights.safetensors" if ours else None


def write(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write one SAE folder; each file is written whole or not at all, the metadata last.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> with tempfile.TemporaryDirectory() as d:
    ...     sorted(p.name for p in write(sae, d).iterdir())
    ['cfg.json', 'metadata.json', 'sae_weights.safetensors']
    """
    if sae.features is not None:
        sae.config.check_feature_subset()
    sae = saelens.with_constant_norm(sae)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = saelens.stored_tensors(sae)
    io.ensure_finite(folder / WEIGHTS_NAME, tensors)
    header = {
        "format": "hubsae",
        "hubsae_version": __version__,
        "config": sae.config.model_dump_json(exclude_none=True),
    }
    io.write_safetensors(folder / WEIGHTS_NAME, tensors, header)
    metadata = sae.metadata.model_copy(update={"config": sae.config})
    space = sae.normalizer
    if space is not None and metadata.normalizer.file is None:
        kind = "mean_std" if metadata.normalizer.kind == "none" else metadata.normalizer.kind
        info = {**metadata.normalizer.model_dump(), "kind": kind, "file": NORMALIZER_NAME}
        metadata = metadata.model_copy(update={"normalizer": NormalizerInfo.model_validate(info)})
    notes = {} if space is None else {
        "count": str(space.count), "norm_percentiles": json.dumps(space.norm_percentiles)
    }  # fmt: skip
    _beside(folder / NORMALIZER_NAME, None if space is None else {"mean": space.mean, "std": space.std}, notes)
    _beside(folder / SPARSITY_NAME, None if sae.sparsity is None else {"sparsity": sae.sparsity.float()})
    write_fingerprint(folder, sae.fingerprint)
    write_json_atomic(folder / CFG_NAME, saelens.cfg_of(sae, metadata))
    metadata.save(folder)
    return folder


def read(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    features: Sequence[int] | None = None,
) -> SAE:
    """Read one SAE folder; `features` reads only those latents, by slicing the file."""
    folder = Path(path)
    metadata = Metadata.load(folder)
    file = folder / WEIGHTS_NAME
    if features is None:
        tensors = io.read_safetensors(file, device=str(device))
    else:
        wanted = _checked_features(list(features), metadata.config.d_sae)
        tensors = io.read_rows(file, wanted, LATENT_AXIS)
    sae = build(
        metadata, tensors, file, normalizer=read_normalizer(folder), sparsity=read_sparsity(folder),
        device=device, dtype=dtype, features=features,
    )  # fmt: skip
    sae.fingerprint = read_fingerprint(folder)
    return sae


def build(
    metadata: Metadata,
    tensors: dict[str, Tensor],
    file: Path,
    *,
    normalizer: Normalizer | None = None,
    sparsity: Tensor | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    features: Sequence[int] | None = None,
) -> SAE:
    """A SAE from a record and stored tensors, checked against each other; `file` is named in errors."""
    config = metadata.config
    if features is not None:
        config = config.model_copy(
            update={"d_sae": len(features), "k": min(config.k, len(features)) if config.k else None}
        )
        sparsity = None if sparsity is None else sparsity[list(features)]
    tensors = dict(tensors)
    if config.architecture == "batch_topk" and "threshold" in tensors:
        _check_stored_threshold(file, config, tensors.pop("threshold"))
    io.ensure_finite(file, tensors)
    target = getattr(torch, str(dtype).removeprefix("torch.")) if dtype is not None else None
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device=device, dtype=target)
    if target is not None:
        config = config.model_copy(update={"dtype": str(target).removeprefix("torch.")})
    try:
        return SAE.build(
            config, tensors, metadata=metadata, normalizer=normalizer, sparsity=sparsity, features=features
        )
    except ConfigError as error:
        raise FormatError(file, f"the tensors that {METADATA_NAME} describes", error.message) from error


def only(tensors: dict[str, Tensor], features: Sequence[int] | None, d_sae: int) -> dict[str, Tensor]:
    """The tensors of some latents; all of them where none are named."""
    if features is None:
        return tensors
    wanted = torch.tensor(_checked_features(list(features), d_sae))
    return {
        name: tensor if LATENT_AXIS[name] < 0 else tensor.index_select(LATENT_AXIS[name], wanted)
        for name, tensor in tensors.items()
    }


def _check_stored_threshold(file: Path, config: SAEConfig, stored: Tensor) -> None:
    expected = torch.tensor(config.threshold if config.threshold is not None else float("nan"), dtype=stored.dtype)
    if not bool((stored == expected).all()):
        raise FormatError(
            file,
            f"threshold {config.threshold} as in {METADATA_NAME}",
            f"{stored.min().item():g} to {stored.max().item():g}",
            hint="the folder was changed by hand; write it again from the SAE",
        )


def _checked_features(features: list[int], d_sae: int) -> list[int]:
    bad = [f for f in features if not 0 <= f < d_sae]
    if bad or not features:
        raise ConfigError(
            f"features {bad[:5]} do not exist: this SAE has {d_sae} latents" if bad else "features= names no latent"
        )
    return features


def _beside(file: Path, tensors: dict[str, Tensor] | None, notes: dict[str, str] | None = None) -> None:
    """Write a file beside the weights; one that is left from another SAE goes."""
    if tensors is None:
        file.unlink(missing_ok=True)
    else:
        io.write_safetensors(file, tensors, notes)


def read_normalizer(folder: Path) -> Normalizer | None:
    """The normaliser beside the weights, or None."""
    file = folder / NORMALIZER_NAME
    if not file.is_file():
        return None
    tensors = io.read_safetensors(file)
    if set(tensors) != {"mean", "std"}:
        raise FormatError(file, "the tensors mean and std", ", ".join(sorted(tensors)) or "none")
    note = safetensors_header(file).notes
    return Normalizer(
        tensors["mean"], tensors["std"], int(note.get("count", "0")), json.loads(note.get("norm_percentiles", "{}"))
    )


def read_sparsity(folder: Path) -> Tensor | None:
    """log10 firing frequency [d_sae], or None where the file is not there."""
    file = folder / SPARSITY_NAME
    return io.read_safetensors(file).get("sparsity") if file.is_file() else None


def write_fingerprint(folder: Path, fingerprint: Fingerprint | None) -> None:
    """Put a fingerprint beside the weights, or take away the one that is there."""
    about = None if fingerprint is None else {"about": json.dumps(fingerprint.about, sort_keys=True)}
    _beside(folder / FINGERPRINT_NAME, None if fingerprint is None else fingerprint.tensors(), about)


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """The fingerprint beside the weights, or None."""
    file = folder / FINGERPRINT_NAME
    if not file.is_file():
        return None
    try:
        return Fingerprint.of(io.read_safetensors(file), safetensors_header(file).notes.get("about", "{}"))
    except (KeyError, ValueError, RuntimeError) as error:
        raise FormatError(file, "a fingerprint", f"something else ({error})", hint="take it again") from error


def _read_format(probe: Probe, choices: Overrides) -> SAE:
    if named := choices.named():
        raise ConfigError(
            f"{probe.path}: a hubsae folder says all of this itself; {', '.join(named)} cannot be overridden",
            hint="change the SAE and save it again",
        )
    return read(probe.path)


FORMAT = Format(
    name="native",
    title="hubsae folder",
    detect=detect,
    read=_read_format,
    write=write,
    files=(Files((WEIGHTS_NAME, METADATA_NAME), (CFG_NAME, NORMALIZER_NAME, SPARSITY_NAME, FINGERPRINT_NAME)),),
    covers=frozenset({"saelens", "sparsify", "bundle"}),
    layout="`sae_weights.safetensors`, `cfg.json`, `metadata.json` (+ `normalizer`, `sparsity`)",
)
