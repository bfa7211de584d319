"""The files of an index: plain Parquet with flat, stable schemas, a summary and a report (docs/index.md has them all).

Row f of the metrics is feature f, dead ones too. The same table gives the same bytes: no time, no path of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.files import write_json_atomic, write_text_atomic
from hubsae.core.parquet import table_of, write_table
from hubsae.core.text import printable
from hubsae.evals.groups import token_texts
from hubsae.index.best import Kept, Records, keep
from hubsae.index.lens import Logits, Neighbours
from hubsae.index.table import FeatureTable
from hubsae.index.tally import bin_edges

FOLDER = "reverse-index"
VERSION = 1
METRICS, PROMPTS, LOGITS, NEIGHBOURS, LABELS = (
    f"{name}.parquet"
    for name in ("feature_metrics", "feature_prompts", "feature_logits", "feature_neighbours", "labels")
)
SUMMARY, REPORT = "summary.json", "report.md"
KINDS = ("token", "prompt", "sample")


def index_name(sae_id: str) -> str:
    """The folder of an SAE's index below `reverse-index/`.

    >>> index_name("saes_k64/ppo_step116/layer18")
    'saes_k64--ppo_step116--layer18'
    """
    return sae_id.strip("/").replace("/", "--") or "sae"


@dataclass
class Extras:
    """What is known of an index beside the table."""

    sae: Mapping[str, Any]
    """What was indexed, for the summary"""
    source: Mapping[str, Any]
    tokenizer: Any = None
    tokenizer_id: str | None = None
    logits: Logits | None = None
    decoder: Neighbours | None = None
    cofiring: Neighbours | None = None


def write_index(table: FeatureTable, folder: str | os.PathLike[str], extras: Extras) -> Path:
    """Write every file of an index, those of the static page included."""
    from hubsae.index.labels import read as read_labels
    from hubsae.index.site import write_site

    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    table.result()
    held = table.records
    kept = keep(held.feature, held.value, held.index, held.sample, table.top, table.random)
    texts = TokenTexts(extras.tokenizer)
    metrics = metric_columns(table, kept, texts)
    prompts = prompt_columns(table, kept, texts)
    write_table(root / METRICS, table_of(metrics, _METRIC_TYPES))
    write_table(root / PROMPTS, table_of(prompts, _PROMPT_TYPES))
    files = [METRICS, PROMPTS]
    logits = None
    if extras.logits is not None:
        logits = logit_columns(extras.logits, texts)
        write_table(root / LOGITS, table_of(logits, _LOGIT_TYPES))
        files.append(LOGITS)
    near = neighbour_columns({"decoder": extras.decoder, "cofiring": extras.cofiring})
    if near is not None:
        write_table(root / NEIGHBOURS, table_of(near, _NEIGHBOUR_TYPES))
        files.append(NEIGHBOURS)
    named = [asdict(label) for label in read_labels(root) if label.feature < table.d_sae]
    files += write_site(root, metrics, prompts, logits, near, named)
    summary = {
        "format": "hubsae-reverse-index", "version": VERSION, "sae": dict(extras.sae), "source": dict(extras.source),
        "tokenizer": {"id": extras.tokenizer_id, "sha256": table.identity.get("tokenizer")},
        "scope": table.scope.name, "n_tokens": table.n_tokens, "n_rows": table.n_rows,
        "n_active": int((table.count > 0).sum()), "n_dead": int((table.count == 0).sum()),
        "top": table.top, "quantile_examples": table.random, "window": table.window, "bin_edges": bin_edges(),
        "files": sorted([*files, REPORT]),
    }  # fmt: skip
    write_text_atomic(root / REPORT, report(summary, metrics, prompts))
    write_json_atomic(root / SUMMARY, summary)
    return root


class TokenTexts:
    """Texts of tokens, each looked up once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.known = tokenizer, {-1: ""}

    def __call__(self, ids: np.ndarray) -> list[str]:
        """Texts of ids; −1 is nothing."""
        fresh = [i for i in np.unique(ids).tolist() if i not in self.known]
        self.known.update(zip(fresh, token_texts(self.tokenizer, fresh), strict=True))
        return [self.known[i] for i in ids.tolist()]


# ---- columns ---------------------------------------------------------------------------------------------------

_METRIC_TYPES = {
    "feature": "int32", "count": "int64", "density": "float64", "max": "float32", "mean": "float64",
    "position_0_share": "float64", "special_share": "float64", "purity": "float64", "top_token_id": "int32",
    "top_token": "string", "histogram": ["int64"],
}  # fmt: skip
_PROMPT_TYPES = {
    "feature": "int32", "kind": "string", "rank": "int32", "value": "float32", "quantile": "float32",
    "token_index": "int64", "sample_id": "int64", "position": "int32", "role": "string", "turn": "int32",
    "token_id": "int32", "center": "int32", "token_ids": ["int32"], "tokens": ["string"],
    "values": ["float32"],
}  # fmt: skip
_LOGIT_TYPES = {
    "feature": "int32", "side": "string", "rank": "int32", "token_id": "int32", "token": "string", "value": "float32",
}  # fmt: skip
_NEIGHBOUR_TYPES = {"feature": "int32", "kind": "string", "rank": "int32", "neighbour": "int32", "value": "float32"}


def metric_columns(table: FeatureTable, kept: Kept, texts: TokenTexts) -> dict[str, Any]:
    """One entry per feature."""
    count, records = table.count, table.records
    shown = kept.token_rank >= 0
    feature, token = records.feature[kept.rows[shown]], records.token[kept.rows[shown]]
    first = kept.rows[kept.token_rank == 0]
    strongest = np.zeros(table.d_sae, np.float32)
    strongest[records.feature[first]] = records.value[first]
    top_id = np.full(table.d_sae, -1)
    top_id[records.feature[first]] = records.token[first]
    pair, times = np.unique(np.stack([feature, token]), axis=1, return_counts=True)
    most = np.zeros(table.d_sae)
    np.maximum.at(most, pair[0], times)
    alive, safe = count > 0, np.maximum(count, 1)
    named = alive & bool(table.known.get("token_id"))
    shares = {}
    for name, column, found in (("position_0", "position", table.first), ("special", "is_special", table.special)):
        shares[f"{name}_share"] = _maybe(found / safe, alive & bool(table.known.get(column)))
    return {
        "feature": np.arange(table.d_sae, dtype=np.int32),
        "count": count,
        "density": count / max(1, table.n_tokens),
        "max": strongest,
        "mean": np.where(alive, table.sum / 2.0**20 / safe, 0.0),
        **shares,
        "purity": _maybe(most / np.maximum(np.bincount(feature, minlength=table.d_sae), 1), named),
        "top_token_id": _maybe(top_id, named),
        "top_token": _maybe(texts(top_id), named),
        "histogram": list(table.histogram),
    }


def _maybe(values: Any, known: np.ndarray) -> list[Any]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    return [value if held else None for value, held in zip(values, known.tolist(), strict=True)]


def prompt_columns(table: FeatureTable, kept: Kept, texts: TokenTexts) -> dict[str, Any]:
    """One entry per feature, kind and rank."""
    picked, kinds, ranks = [], [], []
    for number, rank in enumerate((kept.token_rank, kept.prompt_rank, kept.random_rank)):
        chosen = np.flatnonzero(rank >= 0)
        picked.append(kept.rows[chosen])
        ranks.append(rank[chosen])
        kinds.append(np.full(len(chosen), number))
    rows, kind, rank = (np.concatenate(column) for column in (picked, kinds, ranks))
    order = np.lexsort((rank, kind, table.records.feature[rows]))
    rows, kind, rank = rows[order], kind[order], rank[order]
    held = table.records.take(rows)
    ids, values, center = _windows(held, table.window)
    known = np.ones(len(rows), bool)
    roles = [*table.roles, None]
    return {
        "feature": held.feature,
        "kind": [KINDS[k] for k in kind.tolist()],
        "rank": rank.astype(np.int32),
        "value": held.value,
        "quantile": _quantiles(table, held),
        "token_index": held.index,
        "sample_id": np.maximum(held.sample, -1),
        "position": held.position,
        "role": [roles[r] for r in held.role.tolist()],
        "turn": _maybe(held.turn, known & (held.turn >= 0)),
        "token_id": held.token,
        "center": center.astype(np.int32),
        "token_ids": ids,
        "tokens": [texts(window) for window in ids],
        "values": values,
    }


def _windows(held: Records, window: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """The windows without the places beyond the sample, and where the token stands in each."""
    ids, values, center = [], [], np.zeros(len(held.feature), np.int64)
    inside = held.ids >= 0
    inside[:, window] = True
    for row in range(len(held.feature)):
        ids.append(held.ids[row][inside[row]])
        values.append(held.around[row][inside[row]])
        center[row] = inside[row, :window].sum()
    return ids, values, center


def _quantiles(table: FeatureTable, held: Records) -> np.ndarray:
    """Share of a feature's firings that are weaker, read off its histogram, linear within a bin."""
    from hubsae.index.tally import bins_of

    edges = np.array(bin_edges())
    place = bins_of(held.value)
    below = np.cumsum(table.histogram, 1)
    inside = table.histogram[held.feature, place]
    part = (np.abs(held.value) - edges[place]) / (edges[place + 1] - edges[place])
    share = below[held.feature, place] - inside + inside * np.clip(part, 0, 1)
    return (share / np.maximum(below[held.feature, -1], 1)).astype(np.float32)


def logit_columns(logits: Logits, texts: TokenTexts) -> dict[str, Any]:
    """One entry per feature, side and rank."""
    features, n = logits.top.shape
    ids = np.concatenate([logits.top_ids, logits.bottom_ids], 1).reshape(-1)
    return {
        "feature": np.repeat(np.arange(features, dtype=np.int32), 2 * n),
        "side": (["top"] * n + ["bottom"] * n) * features,
        "rank": np.tile(np.arange(n, dtype=np.int32), 2 * features),
        "token_id": ids,
        "token": texts(ids),
        "value": np.concatenate([logits.top, logits.bottom], 1).reshape(-1),
    }


def neighbour_columns(tables: Mapping[str, Neighbours | None]) -> dict[str, Any] | None:
    """One entry per feature, kind and rank."""
    parts = [(kind, near) for kind, near in tables.items() if near is not None]
    if not parts:
        return None
    feature, kind, rank, other, value = [], [], [], [], []
    for name, near in parts:
        at, place = np.nonzero(near.ids >= 0)
        feature.append(at)
        rank.append(place)
        kind += [name] * len(at)
        other.append(near.ids[at, place])
        value.append(near.values[at, place])
    of, places, others, values = (np.concatenate(column) for column in (feature, rank, other, value))
    order = np.lexsort((places, [name != "decoder" for name in kind], of))
    return {
        "feature": of[order],
        "kind": [kind[i] for i in order.tolist()],
        "rank": places[order],
        "neighbour": others[order],
        "value": values[order],
    }


def report(summary: Mapping[str, Any], metrics: Mapping[str, Any], prompts: Mapping[str, Any]) -> str:
    """The index in words: what was indexed, and a few features with their strongest context."""
    sae = summary["sae"]
    lines = [
        f"# Features of {sae.get('id') or 'an SAE'}",
        "",
        f"{summary['n_tokens']:,} tokens (scope: {summary['scope']}), {sae['d_sae']:,} features: "
        f"{summary['n_active']:,} fire, {summary['n_dead']:,} never do.",
        "",
        "| feature | density | largest value | strongest context |",
        "|---|---|---|---|",
    ]
    contexts: dict[int, str] = {}
    for at, (feature, kind, rank) in enumerate(
        zip(np.asarray(prompts["feature"]).tolist(), prompts["kind"], np.asarray(prompts["rank"]).tolist(), strict=True)
    ):
        if kind == "token" and rank == 0:
            contexts[feature] = mark(prompts["tokens"][at], int(prompts["center"][at]))
    density = np.asarray(metrics["density"])
    middling = [f for f in np.argsort(np.abs(np.log10(np.maximum(density, 1e-12)) + 3)).tolist() if density[f]][:10]
    for f in sorted(middling):
        lines.append(f"| {f} | {density[f]:.2g} | {metrics['max'][f]:.3g} | {contexts.get(f, '')} |")
    return "\n".join(lines) + "\n"


def mark(tokens: Sequence[str], center: int) -> str:
    """A context as text for a table of Markdown, the token in bold; nothing in it is markup."""

    def plain(text: str) -> str:
        shown = printable(text.replace("\n", "↵"))
        return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-!|" else c for c in shown)

    return "".join(f"**{plain(t).strip() or '␣'}**" if i == center else plain(t) for i, t in enumerate(tokens))
