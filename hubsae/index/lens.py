"""What a feature writes and what stands near it: logit lens, nearest decoder rows, features that fire together."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hubsae.core.errors import ConfigError
from hubsae.core.sae import SAE
from hubsae.evals.weights import unit_rows

AT_ONCE = 1 << 25
"""Numbers of a table of products held at a time."""
FEWEST = 5
"""A feature that fires on fewer of the drawn tokens says nothing about what it fires with."""
PAIRS_AT_ONCE = 1 << 23


class Logits(NamedTuple):
    """Tokens that each feature promotes and suppresses. Tables are [features, n]."""

    top_ids: np.ndarray
    top: np.ndarray
    bottom_ids: np.ndarray
    bottom: np.ndarray


class Neighbours(NamedTuple):
    """The nearest other features of each. Tables are [features, n], −1 where there are fewer."""

    ids: np.ndarray
    values: np.ndarray


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm that stands before the unembedding, under the names it has in transformers models."""
    inner = getattr(model, str(getattr(model, "base_model_prefix", "") or "-"), model)
    decoder = getattr(inner, "decoder", inner)
    for name in ("norm", "final_layer_norm", "ln_f", "norm_f", "final_norm"):
        for owner in (inner, decoder):
            found = getattr(owner, name, None)
            if isinstance(found, nn.Module):
                return found
    return None


@torch.no_grad()
def logit_lens(sae: SAE, model: Any, n: int = 10) -> Logits:
    """The decoder row of each feature through the model's final norm and unembedding: its top and bottom tokens."""
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"{type(model).__name__} has no unembedding", hint="load it with AutoModelForCausalLM")
    norm = final_norm(model)
    weight = head.weight  # [vocabulary, d]
    n = min(n, weight.shape[0])
    step = max(1, AT_ONCE // weight.shape[0])
    parts: list[list[Tensor]] = []
    for start in range(0, sae.d_sae, step):
        rows = sae.W_dec[start : start + step].detach().to(weight.device, weight.dtype)
        # a norm divides by the size of what it is given, so only the direction of a row counts
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12) * rows.shape[1] ** 0.5
        logits = (rows if norm is None else norm(rows)) @ weight.t()
        high, low = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        parts.append([t.cpu() for t in (high.indices, high.values.float(), low.indices, low.values.float())])
    top_ids, top, bottom_ids, bottom = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Logits(top_ids, top, bottom_ids, bottom)


@torch.no_grad()
def decoder_neighbours(sae: SAE, n: int = 10) -> Neighbours:
    """The features whose decoder rows have the largest cosine with each."""
    unit = unit_rows(sae.W_dec)
    n = min(n, sae.d_sae - 1)
    step = max(1, AT_ONCE // sae.d_sae)
    ids, values = [], []
    for start in range(0, sae.d_sae, step):
        cosines = unit[start : start + step] @ unit.t()
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, start + own] = -2
        best = cosines.topk(n, dim=1)
        ids.append(best.indices.cpu())
        values.append(best.values.cpu())
    return Neighbours(torch.cat(ids).numpy(), torch.cat(values).numpy())


def cofiring(tokens: np.ndarray, features: np.ndarray, d_sae: int, n: int = 10) -> Neighbours:
    """The features that fire on the same tokens as each, by the cosine of their firings on the drawn tokens.

    `tokens` and `features` are the firings of the drawn tokens: [firings] each.

    >>> tokens, features = np.repeat(np.arange(6), 2), np.array([0, 1] * 5 + [0, 2])
    >>> near = cofiring(tokens, features, 3, n=1)
    >>> near.ids[:, 0].tolist(), near.values[1, 0].round(3)
    ([1, 0, -1], np.float32(0.913))
    """
    ids, values = np.full((d_sae, n), -1), np.zeros((d_sae, n), np.float32)
    count = np.bincount(features, minlength=d_sae)
    common = count[features] >= FEWEST
    tokens, features = tokens[common], features[common]
    _, row = np.unique(tokens, return_inverse=True)
    order = np.lexsort((features, row.reshape(-1)))
    row, by_row = row.reshape(-1)[order], features[order]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row))]) if len(row) else np.zeros(1, np.int64)
    by_feature = np.lexsort((row, by_row))
    size = np.diff(starts)[row[by_feature]] if len(row) else np.zeros(0, np.int64)
    total = np.cumsum(size)
    edges = np.concatenate([[0], np.cumsum(np.bincount(by_row, minlength=d_sae))])
    low = 0
    while low < d_sae:
        # as many features at a time as give a bounded number of pairs
        done = total[edges[low] - 1] if edges[low] else 0
        last = int(np.searchsorted(total, done + PAIRS_AT_ONCE, side="right")) if len(total) else 0
        high = max(low + 1, int(np.searchsorted(edges, last, side="right")) - 1)
        here = by_feature[edges[low] : edges[high]]
        if len(here):
            lengths = size[edges[low] : edges[high]]
            offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            other = by_row[np.repeat(starts[row[here]], lengths) + offset].astype(np.int64)
            mine = np.repeat(by_row[here], lengths).astype(np.int64)
            pair, together = np.unique((mine * d_sae + other)[mine != other], return_counts=True)
            one, two = pair // d_sae, pair % d_sae
            cosine = (together / np.sqrt(count[one] * count[two].astype(float))).astype(np.float32)
            best = np.lexsort((two, -cosine, one))
            group = one[best]
            place = np.arange(len(group)) - np.searchsorted(group, group)
            kept = best[place < n]
            ids[one[kept], place[place < n]] = two[kept]
            values[one[kept], place[place < n]] = cosine[kept]
        low = high
    return Neighbours(ids, values)
