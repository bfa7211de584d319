"""The two files that a static page reads by ranges: a summary, loaded whole, and features in groups of about 150 kB."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.extras import require
from hubsae.core.files import atomic_path

SUMMARY, FEATURES = "summary.parquet", "features.parquet"
GROUP = 256
"""Features in a row group at most"""
GROUP_BYTES = 150_000
"""What a browser fetches to show one feature"""
Columns = Mapping[str, Any]


def write_site(
    root: Path, metrics: Columns, prompts: Columns, logits: Columns | None, near: Columns | None, labels: Any = ()
) -> list[str]:
    """Write both files; `labels` are rows with feature, text, author, method and score."""
    pa, pq = require("pyarrow", extra="train"), require("pyarrow.parquet", extra="train")
    n = len(metrics["feature"])
    examples = _lists(n, prompts["feature"], _examples(prompts))
    sides = {side: [[] for _ in range(n)] for side in ("top", "bottom")}
    if logits is not None:
        for feature, side, token, value in _rows(logits, "feature", "side", "token", "value"):
            sides[side][feature].append({"token": token, "value": value})
    kinds = {kind: [[] for _ in range(n)] for kind in ("decoder", "cofiring")}
    if near is not None:
        for feature, kind, other, value in _rows(near, "feature", "kind", "neighbour", "value"):
            kinds[kind][feature].append({"feature": other, "value": value})
    named: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    for label in labels:
        named[label["feature"]].append({key: label.get(key) for key in ("text", "author", "method", "score")})
    plain = {
        "feature": pa.array(metrics["feature"], pa.int32()),
        "count": pa.array(metrics["count"], pa.int64()),
        "density": pa.array(metrics["density"], pa.float64()),
        "max": pa.array(metrics["max"], pa.float32()),
        "mean": pa.array(metrics["mean"], pa.float32()),
        **{name: pa.array(metrics[name], pa.float32()) for name in ("purity", "position_0_share", "special_share")},
    }
    summary = pa.table(
        plain
        | {
            "top_token": pa.array(metrics["top_token"], pa.string()),
            "top_tokens": pa.array([_distinct(rows) for rows in examples], pa.string()),
            "top_logits": pa.array([" ".join(r["token"].strip() for r in rows) for rows in sides["top"]], pa.string()),
            "label": pa.array([rows[0]["text"] if rows else None for rows in named], pa.string()),
        }
    )
    token_values = pa.list_(pa.struct({"token": pa.string(), "value": pa.float32()}))
    others = pa.list_(pa.struct({"feature": pa.int32(), "value": pa.float32()}))
    example = pa.struct(
        {
            "kind": pa.string(), "rank": pa.int32(), "value": pa.float32(), "quantile": pa.float32(),
            "sample_id": pa.int64(), "position": pa.int32(), "role": pa.string(), "turn": pa.int32(),
            "center": pa.int32(), "tokens": pa.list_(pa.string()), "values": pa.list_(pa.float32()),
        }
    )  # fmt: skip
    label = pa.struct({"text": pa.string(), "author": pa.string(), "method": pa.string(), "score": pa.float32()})
    features = pa.table(
        plain
        | {
            "histogram": pa.array(metrics["histogram"], pa.list_(pa.int32())),
            "examples": pa.array(examples, pa.list_(example)),
            "top_logits": pa.array(sides["top"], token_values),
            "bottom_logits": pa.array(sides["bottom"], token_values),
            "neighbours": pa.array(kinds["decoder"], others),
            "cofiring": pa.array(kinds["cofiring"], others),
            "labels": pa.array(named, pa.list_(label)),
        }
    )
    options = {"compression": "snappy", "use_dictionary": False, "write_statistics": False}
    for name, table, rows in ((SUMMARY, summary, max(n, 1)), (FEATURES, features, _group(features, options))):
        with atomic_path(root / name) as scratch:
            pq.write_table(table, scratch, row_group_size=rows, **options)
    return [SUMMARY, FEATURES]


def _group(features: Any, options: Mapping[str, Any]) -> int:
    """Features in a row group, a power of two, so that one is about `GROUP_BYTES` on disk."""
    if not features.num_rows:
        return GROUP
    pa, pq = require("pyarrow", extra="train"), require("pyarrow.parquet", extra="train")
    written = pa.BufferOutputStream()
    every = max(1, features.num_rows // 1024)
    part = features.take(list(range(0, features.num_rows, every)))
    pq.write_table(part, written, **options)
    each = written.tell() / part.num_rows
    return max(8, min(GROUP, 2 ** int(np.log2(max(1.0, GROUP_BYTES / each)))))


def _rows(columns: Columns, *names: str) -> Any:
    lists = (c.tolist() if isinstance(c := columns[name], np.ndarray) else c for name in names)
    return zip(*lists, strict=True)


def _examples(prompts: Columns) -> list[dict[str, Any] | None]:
    """Each record once: one that is among the strongest tokens is not repeated as the strongest of its sample."""
    names = ("kind", "rank", "value", "quantile", "sample_id", "position", "role", "turn", "center", "tokens", "values")
    strong = {
        (feature, index) for feature, index, kind in _rows(prompts, "feature", "token_index", "kind") if kind == "token"
    }
    out: list[dict[str, Any] | None] = []
    for key, row in zip(_rows(prompts, "feature", "token_index"), _rows(prompts, *names), strict=True):
        out.append(None if row[0] == "prompt" and key in strong else dict(zip(names, row, strict=True)))
    return out


def _lists(n: int, feature: Any, rows: list[Any]) -> list[list[Any]]:
    out: list[list[Any]] = [[] for _ in range(n)]
    for of, row in zip(np.asarray(feature).tolist(), rows, strict=True):
        if row is not None:
            out[of].append(row)
    return out


def _distinct(examples: list[dict[str, Any]]) -> str:
    """The strongest tokens, each once, for searching."""
    tokens = (row["tokens"][row["center"]].strip() for row in examples if row["kind"] == "token" and row["tokens"])
    return " ".join(dict.fromkeys(token for token in tokens if token))
