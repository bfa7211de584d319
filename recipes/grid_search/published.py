"""The published grid, and which of its claims its own rows support.

36 rows: layer 12 of Qwen2.5-0.5B-Instruct on GSM8K questions, TopK and BatchTopK at three expansions and four k,
JumpReLU at four thresholds each. The rows are in `recipes/grid_search/published.csv`; every number below is
computed from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from hubsae.core.errors import FormatError
from hubsae.core.files import read_csv
from hubsae.recipes.report import Report

D_IN = 896
"""Width of the activations of the published grid."""
KINDS = {"TopK": "topk", "BatchTopK": "batch_topk", "JumpReLU": "jumprelu_fixed"}

Verdict = Literal["supported", "partly", "contradicted", "not what it says"]


@dataclass(frozen=True)
class PublishedRow:
    """One row of the published grid."""

    architecture: str
    expansion: int
    k: int | None
    threshold: float | None
    l0: float
    mse: float
    nmse: float
    dead: float
    """Share of latents, 0 to 1; which tokens it was counted on is not published."""
    delta_loss: float
    frac_rec: float
    """As published, 0 to 1."""

    @property
    def kind(self) -> str:
        """Which kind of cell it is here."""
        return KINDS[self.architecture]

    @property
    def density(self) -> float:
        """Share of latents active per token."""
        return self.l0 / (D_IN * self.expansion)


class Claim(NamedTuple):
    """A statement the release makes, held against its own rows."""

    statement: str
    verdict: Verdict
    evidence: str


def published_rows() -> list[PublishedRow]:
    """The 36 published rows.

    >>> len(published_rows())
    36
    """
    file = Path(__file__).with_name("published.csv")
    return parse_rows(read_csv(file), file)


def parse_rows(lines: Sequence[Mapping[str, str]], file: str | Path) -> list[PublishedRow]:
    """Rows of the published grid as they are printed; `file` is named in errors."""
    try:
        return [
            PublishedRow(
                architecture=line["architecture"],
                expansion=int(line["expansion"]),
                k=int(line["k"]) if line["k"] else None,
                threshold=float(line["threshold"]) if line["threshold"] else None,
                l0=float(line["l0"]),
                mse=float(line["val_mse"]),
                nmse=float(line["nmse"]),
                dead=float(line["dead_percent"]) / 100,
                delta_loss=float(line["delta_loss"]),
                frac_rec=float(line["published_frac_rec_percent"]) / 100,
            )
            for line in lines
        ]
    except (KeyError, ValueError) as error:
        raise FormatError(file, "the columns of the published grid", f"{type(error).__name__}: {error}") from error


def pairs(rows: Sequence[PublishedRow]) -> list[tuple[PublishedRow, PublishedRow]]:
    """(BatchTopK, TopK) at the same expansion and k."""
    top = {(row.expansion, row.k): row for row in rows if row.architecture == "TopK"}
    return [(r, top[r.expansion, r.k]) for r in rows if r.architecture == "BatchTopK" and (r.expansion, r.k) in top]


def implied_variance(rows: Sequence[PublishedRow]) -> tuple[float, float]:
    """Smallest and largest MSE / NMSE: the variance the NMSE was divided by.

    Small JumpReLU rows are printed with too few digits to say, so rows below an MSE of 0.01 are left out.

    >>> low, high = implied_variance(published_rows())
    >>> round(low, 1), round(high, 1)
    (47.5, 47.5)
    """
    ratios = [row.mse / row.nmse for row in rows if row.mse >= 0.01]
    return min(ratios), max(ratios)


def implied_base_loss(rows: Sequence[PublishedRow]) -> tuple[float, float]:
    """The base loss that makes "frac_rec" equal to L_base / (L_base + delta loss), and the worst misfit with it.

    >>> base, misfit = implied_base_loss(published_rows())
    >>> round(base, 2), misfit < 1e-4
    (3.21, True)
    """
    told = [row for row in rows if abs(row.delta_loss) > 0.5]
    estimates = sorted(row.frac_rec * row.delta_loss / (1 - row.frac_rec) for row in told)
    base = estimates[len(estimates) // 2]
    return base, max(abs(base / (base + row.delta_loss) - row.frac_rec) for row in rows)


def claims(rows: Sequence[PublishedRow]) -> list[Claim]:
    """Every claim of the release with what its rows say.

    >>> [claim.verdict for claim in claims(published_rows())]
    ['contradicted', 'supported', 'not what it says', 'partly', 'partly']
    """
    return [_batchtopk_wins(rows), _dead_at_k64(rows), _sweet_spot(rows), _jumprelu_density(rows), _sixteen_times(rows)]


def published_section(report: Report) -> None:
    """The published rows in a report, and the claims held against them."""
    rows = published_rows()
    base, _ = implied_base_loss(rows)
    report.heading("The published grid")
    report.text(
        f"{len(rows)} cells on layer 12 of Qwen2.5-0.5B-Instruct. Another model than this run's, other tokens and "
        "one seed: compare shapes, not values. `frac rec %` is L_base / L_sae, with L_base = "
        f"{base:.2f} nats in every row. What the release says, held against its own rows:"
    )
    held = [{"claim": c.statement, "its rows": c.verdict, "evidence": c.evidence} for c in claims(rows)]
    report.table("Claims", "published_claims", held)
    table = [
        {
            "Type": r.architecture, "Expansion": r.expansion, "K": r.k, "Threshold": r.threshold, "L0": r.l0,
            "Val MSE": r.mse, "NMSE": r.nmse, "Dead %": round(100 * r.dead, 2), "Delta Loss": r.delta_loss,
            "frac rec %": round(100 * r.frac_rec, 2),
        }
        for r in rows
    ]  # fmt: skip
    report.table("Published rows", "published", table)


def _batchtopk_wins(rows: Sequence[PublishedRow]) -> Claim:
    both = pairs(rows)
    mse = [b for b, t in both if b.mse < t.mse]
    dead = [b for b, t in both if b.dead < t.dead]
    loss = [b for b, t in both if b.delta_loss < t.delta_loss]
    where = ", ".join(f"{b.expansion}x k={b.k}" for b in mse)
    return Claim(
        "BatchTopK is better than TopK at every configuration, on MSE and on dead latents.",
        "supported" if len(mse) == len(dead) == len(both) else "contradicted",
        f"On MSE TopK is ahead in {len(both) - len(mse)} of {len(both)} matched cells (BatchTopK only at {where}); "
        f"on dead latents BatchTopK is ahead in {len(dead)} of {len(both)}; "
        f"on delta loss in {len(loss)} of {len(both)}.",
    )


def _dead_at_k64(rows: Sequence[PublishedRow]) -> Claim:
    found = next(r for r in rows if (r.architecture, r.expansion, r.k) == ("BatchTopK", 8, 64))
    return Claim(
        "8x with k=64 leaves 57 % of the latents dead, so k should be 128 to 220.",
        "supported" if round(100 * found.dead) == 57 else "contradicted",
        f"The row has {100 * found.dead:.2f} % (BatchTopK), and dead latents fall with k in every column. But another "
        "release has 1 to 4 % dead at the same layer, width and k after 20 epochs with an auxiliary loss and "
        "resampling: the share measures how it was trained before it says anything about k.",
    )


def _sweet_spot(rows: Sequence[PublishedRow]) -> Claim:
    best = [r for r in rows if r.architecture == "BatchTopK" and r.k == 220 and r.expansion in (4, 8)]
    base, misfit = implied_base_loss(rows)
    low, high = sorted(100 * r.frac_rec for r in best)
    over = sum(r.frac_rec > 1 for r in rows)
    return Claim(
        "BatchTopK, 4x or 8x, k=220 is the place to be: 90 to 93 % of the loss recovered, 13 to 21 % dead.",
        "not what it says",
        f"The rows hold {low:.1f} to {high:.1f} %, but the column is L_base / L_sae with L_base = {base:.2f} in all "
        f"{len(rows)} rows (largest misfit {100 * misfit:.3f} points), with no ablation to recover from; {over} rows "
        "exceed 100 %. A true recovered fraction cannot be computed from what was published.",
    )


def _jumprelu_density(rows: Sequence[PublishedRow]) -> Claim:
    near = [r for r in rows if r.architecture == "JumpReLU" and r.frac_rec > 0.95]
    shares = [100 * r.density for r in near]
    inside = sum(10 <= share <= 45 for share in shares)
    return Claim(
        "JumpReLU reconstructs almost perfectly, but only by firing on 10 to 45 % of its latents.",
        "supported" if inside == len(near) else "partly",
        f"{len(near)} rows reconstruct that well; they fire on {min(shares):.1f} to {max(shares):.1f} % of their "
        f"latents, {inside} of them within 10 to 45 %. None has an L0 near the TopK rows', so they compare with "
        "nothing in the grid.",
    )


def _sixteen_times(rows: Sequence[PublishedRow]) -> Claim:
    at = {(r.architecture, r.expansion, r.k): r for r in rows if r.k is not None}
    ks = sorted({r.k for r in rows if r.k is not None})
    better = {kind: [k for k in ks if at[kind, 16, k].mse < at[kind, 8, k].mse] for kind in ("TopK", "BatchTopK")}
    change = {kind: [at[kind, 16, k].mse / at[kind, 8, k].mse - 1 for k in ks] for kind in better}
    text = "; ".join(
        f"{kind}: lower MSE at 16x for k = {', '.join(map(str, better[kind])) or 'none'} "
        f"({100 * min(change[kind]):+.1f} to {100 * max(change[kind]):+.1f} %)"
        for kind in better
    )
    small = all(abs(value) < 0.05 for kind in change for value in change[kind])
    return Claim("16x adds little over 8x at the same k.", "supported" if small else "partly", f"{text}.")
