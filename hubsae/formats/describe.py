"""What a path is, for `hubsae show`: format, shapes, norms, hook point, and what is not known."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.core.config import SAEConfig
from hubsae.core.errors import AmbiguousFormatError, HubSAEError
from hubsae.core.metadata import Metadata
from hubsae.core.sae import SAE
from hubsae.core.text import format_bytes
from hubsae.formats import tensors as io
from hubsae.formats.base import Probe
from hubsae.formats.detection import choose, format_named, probe_of, readings_of
from hubsae.formats.manifest import Manifest
from hubsae.formats.planning import plan
from hubsae.formats.registry import read
from hubsae.formats.release import Release
from hubsae.formats.saelens_config import fidelity
from hubsae.formats.table import SAETable

ROWS_FOR_NORMS = 4096
OTHER_METRICS = "metrics in other scopes"


@dataclass
class TensorInfo:
    """One tensor as it lies in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Description:
    """What was found at a path."""

    path: str
    kind: str
    """sae, release, folder of SAEs, activations, unknown."""
    readings: list[str] = field(default_factory=list)
    format: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    saes: SAETable = field(default_factory=SAETable)
    files: list[dict[str, Any]] = field(default_factory=list)
    """Path, size and sha256 of an SAE's files, where a listing says them."""
    activations: dict[str, Any] = field(default_factory=dict)
    """Of kind activations: what `activations.describe` found."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, without what is empty."""
        if self.activations:
            return self.activations
        return {name: value for name, value in asdict(self).items() if value not in (None, [], {})}


def describe(path: str | Path, format: str | None = None, **overrides: Any) -> Description:
    """Look at an SAE file, an SAE folder, a release, or a folder of many SAEs.

    >>> import tempfile
    >>> from hubsae import HubSAE, SAEConfig
    >>> with tempfile.TemporaryDirectory() as d:
    ...     HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2)).save_pretrained(d)
    ...     describe(d).unknown
    ['base model', 'hook point']
    """
    path = Path(path)
    probe = probe_of(path)
    if format is None and Manifest.lies_in(probe.path):
        return _release(path)
    readings = readings_of(probe)
    out = Description(str(path), "sae", [str(r) for r in readings])
    if format is not None:
        format_named(format, "read")
    if not readings and format is None:
        return _many(path, out) if probe.is_dir else _unknown_file(probe, out)
    out.tensors = list(_tensors(probe))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sae = read(path, format, **overrides)
        out.notes += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    except HubSAEError as error:
        several = isinstance(error, AmbiguousFormatError)
        out.notes.append(str(error))
        out.unknown.append("which of the readings is right" if several else "part of what is needed to run it")
        return out
    out.format = format or readings[0].format
    _fill(out, sae)
    return out


def _fill(out: Description, sae: SAE) -> None:
    fill_record(out, sae.metadata, sae.config)
    t = sae.tensors()
    out.norms = {
        "encoder": _spread(t["W_enc"][:, :ROWS_FOR_NORMS].norm(dim=0)),
        "decoder": _spread(t["W_dec"][:ROWS_FOR_NORMS].norm(dim=1)),
        "b_dec": f"{float(t['b_dec'].norm()):.4g}",
    }
    for name in ("b_enc", "threshold"):
        if name in t:
            out.norms[name] = _spread(t[name])


def fill_record(out: Description, meta: Metadata, config: SAEConfig) -> None:
    """What the record of an SAE says, without its tensors."""
    out.config = config.model_dump(mode="json", exclude_none=True) | {"selection": config.selection}
    hook, base = meta.hook, meta.base_model
    sizes = (math.prod(config.tensor_shape(name)) for name in config.tensor_names)
    own = None if meta.own_scope == "all" else meta.own_scope
    facts = {
        "parameters": sum(sizes),
        "expansion": round(config.d_sae / config.d_in, 3),
        "base model": base.id,
        "base model revision": base.revision,
        "stage": base.stage,
        "hook point": hook.module_path or hook.transformer_lens,
        "layer": hook.layer,
        "tokens it is for": own,
        "normaliser": None if meta.normalizer.kind == "none" else meta.normalizer.model_dump(exclude_none=True),
        "decode adds b_pre": meta.decoder.decode_adds_b_pre,
        "trained tokens": meta.training.tokens,
        "activations": meta.activations.id,
        "source": meta.provenance.source_file,
        "SAELens": fidelity(config).note,
    }
    out.facts |= {k: v for k, v in facts.items() if v is not None}
    ours = {m.name: m.value for m in meta.metrics if (m.scope or "all") == meta.own_scope}
    others = {f"{m.name} ({m.scope or 'all'})": m.value for m in meta.metrics if (m.scope or "all") != meta.own_scope}
    out.facts |= {name: found for name, found in (("metrics", ours), (OTHER_METRICS, others)) if found}
    out.unknown = [k for k, v in (("base model", base.id), ("hook point", facts["hook point"])) if v is None]


def _spread(values: Tensor) -> str:
    low, mid, high = (float(v) for v in torch.quantile(values.float()[: 1 << 20], torch.tensor([0.0, 0.5, 1.0])))
    return f"{low:.4g} / {mid:.4g} / {high:.4g}"


def _tensors(probe: Probe) -> list[TensorInfo]:
    """Tensors of the weights file, without reading them."""
    if not probe.is_dir:
        if header := probe.header():
            return [TensorInfo(name, shape, dtype) for name, (dtype, shape) in header.items()]
        if probe.path.suffix == ".npz":
            return [TensorInfo(name, shape, "") for name, shape in io.npz_shapes(probe.path).items()]
        value = probe.pickle()
        return [
            TensorInfo(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in io.walk_tensors(value)
        ][:64]
    return [
        TensorInfo(f"{file.name}: {name}", shape, dtype)
        for file in sorted(probe.path.glob("*.safetensors"))
        if file.name != "normalizer.safetensors"
        for name, (dtype, shape) in io.safetensors_header(file).items()
    ]


def _release(path: Path) -> Description:
    release = Release.open(path)
    out = Description(str(path), "release", format="release", facts=release_facts(release.manifest))
    out.facts |= {"results": len(release.results), "plots": len(release.plots)}
    out.saes = SAETable(entry.row() for entry in release)
    out.unknown = [] if release.manifest.license else ["license"]
    return out


def release_facts(m: Manifest) -> dict[str, Any]:
    """What a manifest says of the release as a whole."""
    facts = {
        "name": m.name,
        "SAEs": len(m),
        "base model": m.base_model,
        "license": m.license,
        "datasets": ", ".join(m.datasets) or None,
        "description": m.description,
        "size": format_bytes(sum(f.size for f in m.all_files)),
    }
    return {k: v for k, v in facts.items() if v is not None}


def _many(path: Path, out: Description) -> Description:
    """A folder that is no SAE itself: what its files would be."""
    out.kind = "folder of SAEs"
    todo = plan(path)
    out.saes = SAETable(
        {"id": item.id, **item.info.known(), "file": item.source.name, "format": item.format, "bytes": item.size}
        for item in todo.saes
    )
    out.notes = [f"{p.name}: {why}" for p, why in todo.left_out]
    return out


def _unknown_file(probe: Probe, out: Description) -> Description:
    out.kind = "unknown"
    out.tensors = _tensors(probe)
    out.unknown = ["its format"]
    if not out.tensors:
        choose(probe)  # raises, and says what it looks like
    return out
