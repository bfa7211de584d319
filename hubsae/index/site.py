"""The two files that a static page reads by ranges: a summary, loaded whole, and features in groups of about 150 kB."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.parquet import arrow, table_of, write_table

SUMMARY, FEATURES = "summary.parquet", "features.parquet"
GROUP = 256
"""Features in a row group at most"""
GROUP_BYTES = 150_000
"""What a browser fetches to show one feature"""
Columns = Mapping[str, Any]
_PLAIN = {
    "feature": "int32", "count": "int64", "density": "float64", "max": "float32", "mean": "float32",
    "purity": "float32", "position_0_share": "float32", "special_share": "float32",
}  # fmt: skip
_SUMMARY = {**_PLAIN, "top_token": "string", "top_tokens": "string", "top_logits": "string", "label": "string"}
_EXAMPLE = {
    "kind": "string", "rank": "int32", "value": "float32", "quantile": "float32", "sample_id": "int64",
    "position": "int32", "role": "string", "turn": "int32", "center": "int32", "tokens": ["string"],
    "values": ["float32"],
}  # fmt: skip
_LOGITS, _OTHERS = [{"token": "string", "value": "float32"}], [{"feature": "int32", "value": "float32"}]
LABELS = [{"text": "string", "author": "string", "method": "string", "score": "float32"}]
_FEATURES = {
    **_PLAIN, "histogram": ["int32"], "examples": [_EXAMPLE], "top_logits": _LOGITS, "bottom_logits": _LOGITS,
    "neighbours": _OTHERS, "cofiring": _OTHERS, "labels": LABELS,
}  # fmt: skip
OPTIONS = {"compression": "snappy", "use_dictionary": False, "write_statistics": False}


def write_site(
    root: Path, metrics: Columns, prompts: Columns, logits: Columns | None, near: Columns | None, labels: Any = ()
) -> list[str]:
    """Write both files; `labels` are rows with feature, text, author, method and score."""
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
    named = named_by_feature(n, labels)
    summary = table_of(
        {
            **metrics,
            "top_tokens": [_distinct(rows) for rows in examples],
            "top_logits": [" ".join(r["token"].strip() for r in rows) for rows in sides["top"]],
            "label": [rows[0]["text"] if rows else None for rows in named],
        },
        _SUMMARY,
    )
    found = {"examples": examples, "top_logits": sides["top"], "bottom_logits": sides["bottom"], "labels": named}
    features = table_of({**metrics, **found, "neighbours": kinds["decoder"], "cofiring": kinds["cofiring"]}, _FEATURES)
    write_table(root / SUMMARY, summary, row_group_size=max(n, 1), **OPTIONS)
    write_table(root / FEATURES, features, row_group_size=_group(features), **OPTIONS)
    return [SUMMARY, FEATURES]


def named_by_feature(n: int, labels: Iterable[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """What the pages show of the labels of each feature."""
    named: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    for label in labels:
        named[label["feature"]].append({key: label.get(key) for key in LABELS[0]})
    return named


def _group(features: Any) -> int:
    """Features in a row group, a power of two, so that one is about `GROUP_BYTES` on disk."""
    if not features.num_rows:
        return GROUP
    pa = arrow()
    written = pa.BufferOutputStream()
    every = max(1, features.num_rows // 1024)
    part = features.take(list(range(0, features.num_rows, every)))
    pa.parquet.write_table(part, written, **OPTIONS)
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
