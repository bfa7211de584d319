"""A reverse index for Neuronpedia: its folder for bulk imports, and the batches that its upload call takes.

Bulk folder: `MODEL/SOURCE/` with `release.jsonl`, `model.jsonl`, `sourceset.jsonl`, `source.jsonl` (one object each),
`features/batch-N.jsonl.gz` and `activations/batch-N.jsonl.gz`. Upload batches: `upload/batch-N.json`, each the body of
one `POST /api/feature/upload-batch` with at most 128 features.

What it cannot take is left out and counted: features that never fire (it wants at least one activation each), labels
(its explanations name a method and a model that exist there), co-firing (it shows Pearson correlations, not cosines).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hubsae.core.errors import HubSAEError
from hubsae.core.files import atomic_path
from hubsae.core.parquet import arrow
from hubsae.core.progress import progress
from hubsae.index.features import FeatureIndex
from hubsae.index.files import SUMMARY
from hubsae.index.site import FEATURES

UPLOAD_FEATURES = 128  # of one upload call
UPLOAD_TOKENS = 1024  # of one activation
LOGITS = 20  # of one side
QUARTERS = ((0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Exported:
    """What was written, and what Neuronpedia cannot take."""

    folder: Path
    features: int
    activations: int
    batches: int
    uploads: int
    dead: int
    """Features left out because they never fire"""
    labels: int
    """Labels left out"""


@dataclass(frozen=True)
class Names:
    """What the export is called over there."""

    model: str
    """Its id of the language model, such as `qwen3-8b`"""
    source_set: str
    """The name after the layer in `18-NAME`"""
    release: str
    creator: str
    creator_id: str
    repo: str | None = None
    """Where the weights are, on the Hub"""

    def __post_init__(self) -> None:
        for what in ("model", "source_set", "release"):
            if not _NAME.fullmatch(getattr(self, what)):
                raise HubSAEError(
                    f"{getattr(self, what)!r} cannot be the {what.replace('_', ' ')} of an export",
                    hint="letters, digits, '.', '_' and '-', at most 100",
                )


def export(
    index: str | Path,
    out: str | Path,
    names: Names,
    *,
    vectors: Any = None,
    created: datetime | None = None,
) -> Exported:
    """Write the bulk folder and the upload batches of one index (`reverse-index/NAME`) below `out`.

    `vectors` [d_sae, d_in] are the decoder rows; with them Neuronpedia can steer. Equal inputs and `created` give equal
    bytes. Memory holds one row group of the index at a time.
    """
    index = Path(index)
    if not (index / SUMMARY).is_file():
        raise HubSAEError(f"{index} is not a reverse index", hint="make one: hubsae index")
    summary = FeatureIndex.open(index).summary
    if not isinstance((summary.get("sae") or {}).get("d_sae"), int) or len(summary.get("bin_edges") or ()) < 2:
        raise HubSAEError(f"{index} is not a whole reverse index", hint="make one: hubsae index")
    layer = summary["sae"].get("layer")
    source = f"{0 if layer is None else layer}-{names.source_set}"
    folder = Path(out) / names.model / source
    if folder.exists() and any(folder.iterdir()):
        raise HubSAEError(f"{folder} is not empty", hint="choose another folder, or remove it")
    when = (created or datetime.now(UTC)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    _write_heads(folder, names, summary, source, when)
    common = {"modelId": names.model, "layer": source, "creatorId": names.creator_id, "createdAt": when}
    edges: Sequence[float] = summary["bin_edges"]
    total = {"features": 0, "activations": 0, "batches": 0, "uploads": 0, "dead": 0, "labels": 0}
    waiting: list[dict[str, Any]] = []
    with progress("exporting", summary["sae"]["d_sae"], "features") as task:
        tables = arrow().parquet.ParquetFile(index / FEATURES)
        for rows in (tables.read_row_group(group).to_pylist() for group in range(tables.num_row_groups)):
            alive = [row for row in rows if row["count"] > 0 and row["examples"]]
            total["dead"] += len(rows) - len(alive)
            total["labels"] += sum(len(row["labels"] or ()) for row in alive)
            features = [_feature(row, common, summary["sae"], edges, vectors) for row in alive]
            activations = [one for row in alive for one in _activations(row, common, edges)]
            if features:
                name = f"batch-{total['batches']}.jsonl.gz"
                _write_lines(folder / "features" / name, features)
                _write_lines(folder / "activations" / name, activations)
                total["batches"] += 1
                total["features"] += len(features)
                total["activations"] += len(activations)
            waiting += [_upload(row, edges) for row in alive]
            while len(waiting) >= UPLOAD_FEATURES:
                _write_upload(folder, names, source, waiting[:UPLOAD_FEATURES], total)
                del waiting[:UPLOAD_FEATURES]
            task.advance(len(rows))
        if waiting:
            _write_upload(folder, names, source, waiting, total)
    return Exported(folder, **total)


# ---- one feature -----------------------------------------------------------------------------------------------


def _feature(
    row: dict[str, Any], common: dict[str, Any], sae: dict[str, Any], edges: Sequence[float], vectors: Any
) -> dict[str, Any]:
    bars = [(edge, n) for edge, n in zip(edges, row["histogram"], strict=False)]
    seen = [place for place, (_, n) in enumerate(bars) if n]
    shown = bars[seen[0] : seen[-1] + 1] if seen else []
    near = [one for one in row["neighbours"] or () if one["feature"] != row["feature"]]
    top, bottom = (row[side] or [] for side in ("top_logits", "bottom_logits"))
    vector = [] if vectors is None else [float(x) for x in vectors[row["feature"]]]
    return {
        **common,
        "index": str(row["feature"]),
        "maxActApprox": row["max"],
        "hasVector": bool(vector),
        "vector": vector,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": row["max"],
        "hookName": _hook(sae),
        "topkCosSimIndices": [one["feature"] for one in near],
        "topkCosSimValues": [one["value"] for one in near],
        "pos_str": [one["token"] for one in top],
        "pos_values": [one["value"] for one in top],
        "neg_str": [one["token"] for one in bottom],
        "neg_values": [one["value"] for one in bottom],
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_values": [edge for edge, _ in shown],
        "freq_hist_data_bar_heights": [float(n) for _, n in shown],
        "sourceSetName": common["layer"].split("-", 1)[1],
    }


def _hook(sae: dict[str, Any]) -> str | None:
    """The hook as TransformerLens names it, where it is the residual stream after a layer."""
    layer, hook = sae.get("layer"), str(sae.get("hook") or "")
    if hook.startswith("blocks."):
        return hook
    return f"blocks.{layer}.hook_resid_post" if layer is not None and hook == f"model.layers.{layer}" else None


def _activations(row: dict[str, Any], common: dict[str, Any], edges: Sequence[float]) -> Iterator[dict[str, Any]]:
    for place, one in enumerate(row["examples"]):
        values = one["values"]
        low, high, share = _band(row, one, edges)
        word = f"{common['modelId']}\0{common['layer']}\0{row['feature']}\0{place}"
        yield {
            **common,
            "id": f"c{hashlib.sha256(word.encode()).hexdigest()[:24]}",
            "index": str(row["feature"]),
            "tokens": one["tokens"],
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "qualifyingTokenIndex": one["center"],
            "binMin": low,
            "binMax": high,
            "binContains": share,
            "dataSource": None,
            "dataIndex": str(one["sample_id"]),
        }


def _band(row: dict[str, Any], one: dict[str, Any], edges: Sequence[float]) -> tuple[float, float, float]:
    """The quarter of firings that an example drawn at random stands for: its limits in value, and its share.

    The strongest ones stand for no range; Neuronpedia writes that as −1 three times.
    """
    if one["kind"] != "sample" or one["quantile"] is None:
        return -1.0, -1.0, -1.0
    low, high = next(quarter for quarter in QUARTERS if one["quantile"] >= quarter[0])
    return _value_at(row, low, edges), _value_at(row, high, edges), high - low


def _value_at(row: dict[str, Any], quantile: float, edges: Sequence[float]) -> float:
    """The value below which this share of the firings lies, linear within a bin of the histogram."""
    bins = row["histogram"]
    wanted = quantile * sum(bins)
    for place, n in enumerate(bins):
        if n and wanted <= n:
            return float(edges[place] + (edges[place + 1] - edges[place]) * wanted / n)
        wanted -= n
    return float(row["max"])


def _upload(row: dict[str, Any], edges: Sequence[float]) -> dict[str, Any]:
    activations = []
    for one in row["examples"]:
        start = max(0, min(one["center"] - UPLOAD_TOKENS // 2, len(one["tokens"]) - UPLOAD_TOKENS))
        end = start + UPLOAD_TOKENS
        line: dict[str, Any] = {"tokens": one["tokens"][start:end], "values": one["values"][start:end]}
        low, high, share = _band(row, one, edges)
        if share > 0:
            line |= {"quantileMin": low, "quantileMax": high, "quantileFraction": share}
        activations.append(line)
    sides = {"topLogits": row["top_logits"], "bottomLogits": row["bottom_logits"]}
    logits = {name: [dict(one) for one in (side or [])[:LOGITS]] for name, side in sides.items()}
    return {"index": row["feature"], "density": row["density"], **logits, "activations": activations}


# ---- files -----------------------------------------------------------------------------------------------------


def _write_heads(folder: Path, names: Names, summary: dict[str, Any], source: str, when: str) -> None:
    by = {"creatorId": names.creator_id, "createdAt": when}
    url = [] if names.repo is None else [f"https://huggingface.co/{names.repo}"]
    sae = summary["sae"]
    description = f"{sae.get('architecture') or 'sparse autoencoder'}, {sae['d_sae']} features, {sae.get('hook') or ''}"
    heads: dict[str, dict[str, Any]] = {
        "release": {
            "name": names.release, "description": names.release, "descriptionShort": names.release, "urls": url,
            "creatorName": names.creator, "creatorNameShort": names.creator, **by,
        },
        "model": {
            "id": names.model, "displayName": sae.get("base_model") or names.model, "displayNameShort": names.model,
            "instruct": bool(re.search(r"instruct|chat|-it\b", str(sae.get("base_model")), re.I)),
            "dimension": sae.get("d_in"), "updatedAt": when, **by,
        },
        "sourceset": {
            "modelId": names.model, "name": names.source_set, "releaseName": names.release, "urls": url,
            "creatorName": names.creator, "description": description, "visibility": "PUBLIC", **by,
        },
        "source": {
            "id": source, "modelId": names.model, "setName": names.source_set, "hfRepoId": names.repo,
            "hfFolderId": sae.get("id"), "saelensSaeId": sae.get("id"), "visibility": "PUBLIC",
            "notes": f"{summary['n_tokens']} tokens, scope {summary['scope']}", **by,
        },
    }  # fmt: skip
    for name, value in heads.items():
        _write(folder / f"{name}.jsonl", _line(value))


def _write_upload(
    folder: Path, names: Names, source: str, features: list[dict[str, Any]], total: dict[str, int]
) -> None:
    body = {"modelId": names.model, "source": source, "features": features}
    _write(folder / "upload" / f"batch-{total['uploads']}.json", _line(body))
    total["uploads"] += 1


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=5, mtime=0) as lines:
        for row in rows:
            lines.write(_line(row))
    _write(path, packed.getvalue())


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as scratch:
        scratch.write_bytes(data)
