"""A drift report on disk: tidy CSV tables, one JSON summary, per-latent tensors and plots."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from hubsae.core.errors import DataError, MissingExtraError
from hubsae.core.files import atomic_path, write_csv_atomic, write_json_atomic
from hubsae.evals.comparison import less_control
from hubsae.evals.drift import DriftReport, GroupDrift
from hubsae.evals.rates import change

TABLES = ("stages", "moves", "cross", "rates", "control")


def table_rows(report: DriftReport, table: str) -> list[dict[str, Any]]:
    """Rows of a table, the control chain's below the chain's."""
    if table not in TABLES:
        raise DataError(f"no table {table!r}", hint=f"there are: {', '.join(TABLES)}")
    if table == "control":
        return [{"chain": report.name, **row} for row in less_control(report)]
    rows: list[dict[str, Any]] = []
    for one in (report, report.control):
        if one is None:
            continue
        for group in one.groups:
            where = {"chain": one.name, "layer": group.layer, "k": group.k}
            if table == "rates":
                rows += [{**where, **row} for row in _rates(group)]
            else:
                rows += [{**where, **row._asdict()} for row in getattr(group, table)]
    return rows


def _rates(group: GroupDrift) -> list[dict[str, Any]]:
    rows = []
    for (metric, scope), series in group.series.items():
        for step in series.steps:
            at_step = change(series, float(step))
            low, high = at_step.interval or (None, None)
            rows.append(
                {
                    "metric": metric,
                    "scope": scope,
                    "step": at_step.step,
                    "value": at_step.value,
                    "delta_from_base": at_step.delta,
                    "delta_low": low,
                    "delta_high": high,
                    "delta_per_step": at_step.per_step,
                }
            )
    return rows


def summary(report: DriftReport) -> dict[str, Any]:
    """The report as one JSON-ready mapping: what each layer did from its first stage to its last."""
    groups = []
    for group in report.groups:
        first, last = group.stages[0], group.stages[-1]
        series = group.series.get(("nmse_pooled", first.scope))
        to_end = change(series, float(series.steps[-1])) if series is not None else None
        to_base = [m for m in group.moves if m.against == "base"]
        groups.append(
            {
                "layer": group.layer,
                "k": group.k,
                "stages": [row.stage for row in group.stages],
                "n_tokens": first.n_tokens,
                "scope": first.scope,
                "nmse_pooled": {"first": first.nmse_after, "last": last.nmse_after},
                "nmse_pooled_change": None
                if to_end is None
                else {"delta": to_end.delta, "interval": to_end.interval, "per_step": to_end.per_step},
                "effective_features": {"first": first.effective_features, "last": last.effective_features},
                "dead_fraction": {"first": first.dead_fraction, "last": last.dead_fraction},
                "births": sum(row.births or 0 for row in group.stages),
                "deaths": sum(row.deaths or 0 for row in group.stages),
                "decoder_cosine_to_base": to_base[-1].decoder_mean if to_base else None,
                "encoder_cosine_to_base": to_base[-1].encoder_mean if to_base else None,
            }
        )
    out: dict[str, Any] = {"chain": report.name, "groups": groups}
    if report.control is not None:
        out["control"] = summary(report.control)
        out["less_control"] = less_control(report)
    else:
        out["note"] = "no control chain: changes include the effect of training longer"
    return _finite(out)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(report: DriftReport, folder: str | os.PathLike[str], *, plots: bool = True) -> list[Path]:
    """Write `drift_*.csv`, drift.json, drift_latents.safetensors, and the plots where matplotlib is there."""
    from safetensors.torch import save_file

    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    written = [
        write_csv_atomic(root / f"drift_{table}.csv", rows) for table in TABLES if (rows := table_rows(report, table))
    ]
    written.append(write_json_atomic(root / "drift.json", summary(report)))
    latents = {}
    for group in report.groups:
        for stage, density in group.densities.items():
            latents[f"{group.name}/{stage}/density"] = density.float()
        for key, moved in group.cosines.items():
            latents[f"{group.name}/{key}/decoder_cosine"] = moved.decoder.float()
            latents[f"{group.name}/{key}/encoder_cosine"] = moved.encoder.float()
            if moved.matching != "index":
                latents[f"{group.name}/{key}/partner"] = moved.partner.clone()
    with atomic_path(root / "drift_latents.safetensors") as temporary:
        save_file({key: tensor.contiguous() for key, tensor in latents.items()}, temporary)
    written.append(root / "drift_latents.safetensors")
    if plots:
        try:
            from hubsae.evals.plots import drift_plots

            written += drift_plots(report, root)
        except MissingExtraError as error:
            import warnings

            warnings.warn(f"no plots: {error}", stacklevel=2)
    return written
