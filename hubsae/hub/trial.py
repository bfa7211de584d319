"""Activations to try an SAE on, and what the trial says: is the written copy the same, does SAELens agree.

Without real activations the probes are made: half of them noise at the scale the SAE expects, half sums of decoder
directions, so that thresholds are crossed. Numbers about quality (FVU, L0) are only computed on real activations.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.core.errors import DataError, NotFoundError
from hubsae.core.metadata import Metadata
from hubsae.core.sae import SAE
from hubsae.formats import estimate_threshold, saelens_config
from hubsae.hub.errors import IntegrityError

PROBES = 64
TOLERANCE = 1e-6
# above this size the comparison with SAELens runs in float32 and on fewer probes
BIG = 300_000_000


@dataclass(frozen=True)
class Verification:
    """What was tried on one SAE before publishing it."""

    saelens: str
    """`same`, `differs`, `not checked`."""
    saelens_error: float | None = None
    """Largest relative difference of a reconstruction between SAELens and hubsae."""
    saelens_rows: float | None = None
    """Share of probe tokens on which SAELens selects the same latents."""
    fvu: float | None = None
    l0: float | None = None
    notes: list[str] = field(default_factory=list)


def probe_activations(sae: SAE) -> Tensor:
    """Made-up activations [PROBES, d_in] in the range this SAE was trained for."""
    generator = torch.Generator().manual_seed(0)
    transcoder = sae.config.is_transcoder  # its decoder points into another space, its encoder into this one
    origin = torch.zeros(sae.d_in) if transcoder else sae.b_dec.detach().float().cpu()
    centre, scale = origin, torch.ones(sae.d_in)
    if sae.normalizer is not None:
        centre, scale = sae.normalizer.mean.float().cpu(), sae.normalizer.std.float().cpu()
    noise = centre + scale * torch.randn(PROBES // 2, sae.d_in, generator=generator)
    few = min(16, sae.d_sae)
    rows = torch.randint(sae.d_sae, (PROBES // 2, few), generator=generator)
    strength = torch.rand(PROBES // 2, few, 1, generator=generator) * 4
    table = sae.W_enc.detach().T if transcoder else sae.W_dec.detach()
    directions = table.float().cpu()[rows]  # [PROBES / 2, few, d_in]
    sums = origin + (strength * directions).sum(1)
    return torch.cat([noise, sums])


def same(source: SAE, written: SAE, x: Tensor) -> bool:
    """Whether the copy has the same tensors and gives the same codes and reconstruction."""
    if source.config != written.config:
        return False
    ours, theirs = source.tensors(), written.tensors()
    if any(not torch.equal(ours[name], theirs[name]) for name in ours):
        return False
    with torch.no_grad():
        return bool(torch.equal(source(x), written(x)))


def compare_with_saelens(folder: str | os.PathLike[str], sae: SAE, x: Tensor) -> tuple[float, float]:
    """Load the folder with stock SAELens: (share of tokens with the same latents, largest relative error)."""
    import sae_lens

    wide = sae.d_in * sae.d_sae <= BIG
    dtype = torch.float64 if wide else torch.float32
    lens = sae_lens.SAE.load_from_disk(str(folder), device="cpu").to(dtype)
    ours = type(sae)(sae.config, {name: t.to(dtype) for name, t in sae.tensors().items()})
    x = x.to(dtype)
    with torch.no_grad():
        z, z_hat = lens.encode(x), ours.encode(x)
        x_lens = lens(x)
        x_ours = ours(x)
    rows = ((z != 0) == (z_hat != 0)).all(-1).double().mean().item()
    scale = x_ours.norm(dim=-1).clamp_min(torch.finfo(dtype).tiny)
    error = ((x_lens - x_ours).norm(dim=-1) / scale).max().item()
    return rows, error


def have_saelens() -> bool:
    """Whether the stock package is installed (looking does not import it)."""
    return find_spec("sae_lens") is not None


def verify(
    id: str,
    folder: Path,
    written: SAE,
    source: SAE | None,
    *,
    activations: Tensor | None = None,
    with_saelens: bool = True,
) -> Verification:
    """Try an SAE as it was `written` in its packaged folder; one that is not what its source was is an error."""
    x = activations[:PROBES].float() if activations is not None else probe_activations(written)
    if source is not None and not same(source, written, x):
        raise IntegrityError(
            f"{id}: read back from its written files it is not the same as its source",
            hint="nothing was uploaded; is the disk in order? if it is, this is a bug in hubsae, please report it",
        )
    notes: list[str] = []
    verdict, error, rows = "not checked", None, None
    known = saelens_config.fidelity(written.config)
    if with_saelens and known.loads and have_saelens():
        rows, error = compare_with_saelens(folder, written, x)
        verdict = "same" if rows == 1.0 and error <= TOLERANCE else "differs"
        if verdict == "differs" and known.exact:
            raise IntegrityError(
                f"{id}: stock SAELens computes something else from the written files "
                f"(same latents on {rows:.1%} of {len(x)} probe tokens, relative error up to {error:.2g})",
                hint="nothing was uploaded; publish without this check with --no-check-saelens, and please report it",
            )
    if not known.exact:
        notes.append(known.note)
        if rows is not None and error is not None:
            kind = "your activations" if activations is not None else "random probes"
            notes.append(
                f"on {len(x)} tokens of {kind} SAELens selects the same latents for {rows:.1%}, "
                # as a power of ten, so that SAEs that differ in nothing else share one line of the plan
                f"with a relative error below {10.0 ** math.ceil(math.log10(max(error, 1e-16))):.0e}"
            )
        if written.config.architecture == "topk" and activations is not None:
            notes.append(_negatives(written, activations))
    if saelens_config.architecture_in(written.config) == "topk" and not saelens_config.has_unit_rows(written):
        notes.append(
            "decoder rows are not of norm one (a normaliser is folded in, say), and a top-k cannot be rescaled: "
            "SAEDashboard and Neuronpedia's runner refuse it (fold_W_dec_norm)"
        )
    # the error of a transcoder is against the activations of its output, which are not here
    measured = None if written.config.is_transcoder else activations
    fvu, l0 = (None, None) if measured is None else quality(written, measured)
    if fvu is not None and fvu > 1:
        notes.append(
            f"it reconstructs your activations worse than their mean does (FVU {fvu:.3g}): is this the right layer, "
            "stage and reading (decode_adds_b_pre, normaliser)?"
        )
    return Verification(verdict, error, rows, fvu, l0, notes)


def _negatives(sae: SAE, activations: Tensor) -> str:
    """Whether a signed top-k ever selects a negative latent on these activations."""
    with torch.no_grad():
        values = sae.encode_sparse(activations.float()).values
    share = (values < 0).any(-1).double().mean().item()
    if share:
        return f"on {share:.2%} of {len(values):,} of your activations a negative latent is selected: the sign matters"
    return (
        f"on {len(values):,} of your activations no negative latent is selected: a ReLU changes nothing there. "
        "-s topk_relu=true publishes it as ReLU top-k, which SAELens and sparsify express"
    )


def quality(sae: SAE, activations: Tensor) -> tuple[float | None, float | None]:
    """(FVU, L0) on real activations."""
    from hubsae.evals import reconstruction

    found = reconstruction({"sae": sae}, activations)["sae"]
    return found.value("fvu"), found.value("l0")


@dataclass(frozen=True)
class Calibration:
    """A stored threshold for a BatchTopK SAE, and what it changes against the batch rule of its training."""

    threshold: float
    tokens: int
    l0_batch: float
    l0_threshold: float
    mse_batch: float
    mse_threshold: float

    def __str__(self) -> str:
        change = (self.mse_threshold / self.mse_batch - 1) if self.mse_batch else 0.0
        return (
            f"threshold {self.threshold:.6g} from {self.tokens:,} tokens: L0 {self.l0_batch:.2f} (batch rule) -> "
            f"{self.l0_threshold:.2f}, MSE {self.mse_batch:.4g} -> {self.mse_threshold:.4g} ({change:+.2%})"
        )


def calibrate(sae: SAE, activations: Tensor) -> tuple[SAE, Calibration]:
    """Give a BatchTopK SAE a stored threshold from these activations, and measure what that changes."""
    from hubsae.evals import reconstruction

    fixed = estimate_threshold(sae, activations.float())
    found = reconstruction({"batch": sae, "threshold": fixed}, activations.float())
    numbers = [found[name].value(metric) or 0.0 for metric in ("l0", "mse") for name in ("batch", "threshold")]
    return fixed, Calibration(float(fixed.config.threshold or 0.0), len(activations), *numbers)


class Activations:
    """Activations given to a push: one tensor or file, or a dataset with a config per layer and stage."""

    def __init__(self, source: Any, *, most: int = 16_384):
        self.source = source
        self.most = most
        self._read: Any = None

    def of(self, record: Metadata, *, only_place: bool) -> Tensor | None:
        """Vectors [n, d_in] of where an SAE reads, by its record; None where a dataset has none for it."""
        if isinstance(self.source, Tensor):
            if self.source.ndim < 2:
                raise DataError(f"activations: expected [tokens, d_in], found shape {tuple(self.source.shape)}")
            return self._one(self.source.reshape(-1, self.source.shape[-1]), only_place)
        from hubsae.activations import ActivationDataset
        from hubsae.evals.record import activation_reader

        path = Path(str(self.source))
        if path.is_file():
            return self._one(_sample(ActivationDataset.open(path), self.most), only_place)
        read = self._read = self._read or activation_reader(str(self.source), split="train")
        try:
            return _sample(read(record.base_model.stage, record.hook.layer, record.hook.kind), self.most)
        except NotFoundError:
            return None

    def _one(self, vectors: Tensor, only_place: bool) -> Tensor:
        if not only_place:
            raise DataError(
                "one set of activations was given, but this release has SAEs of several layers or stages",
                hint="give a dataset folder with a config per place (layers.6, or ppo_step30.layers.6)",
            )
        return vectors[: self.most].float()


def _sample(dataset: Any, most: int) -> Tensor:
    """Rows spread over the whole dataset, the same ones each time."""
    if dataset.n_rows <= most:
        return dataset.read_all(dtype=torch.float32)
    rows = torch.linspace(0, dataset.n_rows - 1, most).long().unique().tolist()
    return dataset.take(rows, dtype=torch.float32)


def summarize(checks: Sequence[Verification]) -> str:
    """One line over all checks."""
    lens = [c for c in checks if c.saelens == "same"]
    parts = [f"{len(checks)} read back and equal to their sources"]
    if lens:
        worst = max(c.saelens_error or 0.0 for c in lens)
        parts.append(f"{len(lens)} the same in stock SAELens (relative error up to {worst:.1e})")
    elif checks and all(c.saelens == "not checked" for c in checks):
        why = "switched off" if have_saelens() else "pip install 'hubsae[saelens]'"
        parts.append(f"SAELens parity not checked ({why})")
    return "; ".join(parts)
