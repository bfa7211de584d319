"""Every metric's one name and one definition; nothing computes a number under a name that is not here.

x is the raw activation of a token, x̂ its reconstruction, n the tokens of the scope, d the width. Of a transcoder x is
the activation at its output hook point and x̂ what it predicts there.
"""

from __future__ import annotations

from typing import NamedTuple

from hubsae.core.errors import DataError
from hubsae.core.metadata import Metric
from hubsae.core.scopes import parse

DEFINITIONS: dict[str, str] = {
    "mse": "Σ‖x − x̂‖² / (n·d): mean over tokens and dimensions, in raw activation space",
    "nmse_pooled": "mse / unbiased variance over all n·d elements (one scalar; dimension means not removed)",
    "fvu": "Σ‖x − x̂‖² / Σ‖x − mean(x)‖², the mean taken per dimension over the scope",
    "fve": "1 − fvu",
    "fve_centred": "1 − Σ‖e − mean(e)‖² / Σ‖x − mean(x)‖² with e = x − x̂: forgives a constant error",
    "mse_per_sequence": "mean over sequences of the mean over their tokens of ‖x − x̂‖² / d",
    "l0_per_sequence": "mean over sequences of the mean over their tokens of the number of latents with z ≠ 0",
    "cosine": "mean over tokens of cos(x, x̂)",
    "l2_ratio": "mean over tokens of ‖x̂‖ / ‖x‖",
    "relative_error": "mean over tokens of ‖x − x̂‖ / ‖x‖",
    "relative_bias": "Σ‖x̂‖² / Σ x·x̂ : 1 where the reconstruction does not shrink",
    "l0": "mean number of latents with z ≠ 0 per token",
    "l1": "mean over tokens of Σ|z|",
    "dead_fraction": "share of latents with z ≠ 0 on none of the n tokens; n is part of the number",
    "n_dead": "number of latents with z ≠ 0 on none of the n tokens; n is part of the number",
    "position_0_only_fraction": "share of latents that fire, but on no token after the first of a sequence",
    "effective_features": "2^H, H the entropy in bits of the firing densities normalised to sum one",
    "ce_clean": "mean over predicted tokens of −log p, the model untouched (nats)",
    "ce_sae": "the same with the activations replaced by their reconstruction",
    "ce_mean": "the same with the activations replaced by one mean vector",
    "ce_zero": "the same with the activations replaced by zeros",
    "delta_ce": "ce_sae − ce_clean",
    "frac_recovered_mean": "(ce_mean − ce_sae) / (ce_mean − ce_clean)",
    "frac_recovered_zero": "(ce_zero − ce_sae) / (ce_zero − ce_clean)",
    "kl": "mean over predicted positions of KL(p_clean ‖ p_sae), in nats",
    "kl_mean": "mean over predicted positions of KL(p_clean ‖ p_mean-ablated)",
    "kl_zero": "mean over predicted positions of KL(p_clean ‖ p_zero-ablated)",
}

INTERVAL = "95 % percentile bootstrap"


class Measure(NamedTuple):
    """One number with everything needed to compare it with another.

    >>> Measure("l0", 64.0, "all", 1000, None, None).row()["definition"]
    'mean number of latents with z ≠ 0 per token'
    """

    name: str
    """Key of DEFINITIONS."""
    value: float | None
    """None where it is not defined; `note` says why."""
    scope: str
    """Which tokens, in the words of `hubsae.core.scopes`."""
    n_tokens: int
    """Tokens it was computed on."""
    interval: tuple[float, float] | None
    """Confidence interval, None where it cannot be had."""
    interval_kind: str | None
    """How the interval was made, and over how many units."""
    note: str | None = None
    """Why a value is missing, or what to know about it."""

    @property
    def definition(self) -> str:
        """The formula in one line."""
        return DEFINITIONS[self.name]

    def row(self, **more: object) -> dict[str, object]:
        """One line of a tidy table."""
        low, high = self.interval or (None, None)
        return {
            **more,
            "metric": self.name,
            "scope": self.scope,
            "value": self.value,
            "low": low,
            "high": high,
            "n_tokens": self.n_tokens,
            "interval": self.interval_kind,
            "definition": self.definition,
            "note": self.note,
        }


class Measures:
    """What has measures: found by name and scope."""

    name: str
    measures: list[Measure]
    scope: str
    """Taken where none is named."""

    def get(self, metric: str, scope: str | None = None) -> Measure:
        """A measure by name and scope, or an error that lists what there is."""
        wanted = parse(scope or self.scope).name
        for measure in self.measures:
            if measure.name == metric and measure.scope == wanted:
                return measure
        names, scopes = ({getattr(m, what) for m in self.measures} for what in ("name", "scope"))
        raise DataError(
            f"no {metric!r} in scope {wanted!r} for {self.name!r}",
            hint=f"metrics: {', '.join(sorted(names))}; scopes: {', '.join(sorted(scopes))} (they need label columns)",
        )

    def value(self, metric: str, scope: str | None = None) -> float | None:
        """The value of a measure; None where it is not defined."""
        return self.get(metric, scope).value

    def metrics(self) -> list[Metric]:
        """Entries for metadata.json."""
        return to_metrics(self.measures)


def to_metrics(measures: list[Measure]) -> list[Metric]:
    """Entries for metadata.json; measures without a defined value are left out."""
    return [
        Metric(
            name=m.name, value=m.value, definition=m.definition, n_tokens=m.n_tokens, scope=m.scope,
            interval=m.interval, interval_kind=m.interval_kind, source="hubsae",
        )
        for m in measures
        if m.value is not None
    ]  # fmt: skip
