"""A few features for a card, out of the reverse index that lies in a release (its files: docs/index.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from hubsae.core.errors import MissingExtraError
from hubsae.core.parquet import arrow
from hubsae.index.files import index_name

SHOWN = 5
BEFORE, AFTER = 8, 4
"""Tokens of context on a card."""
MOST_BYTES = 256 << 20
"""A larger table is not fetched for a card."""


class Example(NamedTuple):
    """One feature, and the strongest place it fires on."""

    feature: int
    density: float
    before: str
    token: str
    after: str
    label: str | None


def example_features(find: Callable[[str], Path], sizes: Mapping[str, int], sae_id: str) -> list[Example]:
    """Features of one SAE from frequent to rare, labelled ones first; none where the release has no index of it."""
    folder = f"reverse-index/{index_name(sae_id)}"
    metrics, prompts, labels = (f"{folder}/{name}.parquet" for name in ("feature_metrics", "feature_prompts", "labels"))
    if metrics not in sizes or sizes.get(prompts, MOST_BYTES) >= MOST_BYTES:
        return []
    try:
        pq = arrow().parquet
    except MissingExtraError:
        return []  # a push that can do without is not stopped by it
    known = pq.read_table(find(labels), columns=["feature", "text"]).to_pylist() if labels in sizes else []
    names = {row["feature"]: row["text"] for row in known}
    alive = pq.read_table(find(metrics), columns=["feature", "density", "count"]).to_pylist()
    alive = sorted((row for row in alive if row["count"]), key=lambda row: (-row["density"], row["feature"]))
    pool = [row for row in alive if row["feature"] in names] or alive
    # from the second sixth to the fifth: neither those that always fire nor those that hardly do
    picked = {pool[len(pool) * (place + 1) // (SHOWN + 1)]["feature"]: None for place in range(SHOWN)} if pool else {}
    density = {row["feature"]: row["density"] for row in alive}
    rows = pq.read_table(
        find(prompts), columns=["feature", "center", "tokens"],
        filters=[("feature", "in", list(picked)), ("kind", "==", "prompt"), ("rank", "==", 0)],
    ).to_pylist()  # fmt: skip
    found = {row["feature"]: row for row in rows}
    return [_example(found[f], density[f], names.get(f)) for f in picked if f in found]


def _example(row: dict, density: float, label: str | None) -> Example:
    tokens, at = row["tokens"], row["center"]
    before, after = tokens[max(0, at - BEFORE) : at], tokens[at + 1 : at + 1 + AFTER]
    return Example(row["feature"], density, "".join(before), tokens[at], "".join(after), label)
