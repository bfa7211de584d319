"""Where an SAE's error sits: tokens put into groups by what they are, and the error of each group.

Position 0, each special token, what the chat template puts beside it (role names, newlines) and the content by role are
told apart by the label columns of harvested chats: an average over all of them says little about any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hubsae.core.sae import SAE
from hubsae.core.scopes import parse
from hubsae.evals.accumulate import GROUPS, ROW_STATS
from hubsae.evals.passes import Rows, run_pass
from hubsae.evals.read_off import Reconstruction
from hubsae.evals.reconstruction import prepare

COLUMN = "token_group"
MOST = 48
"""Groups at most; the smallest are counted together."""


class TokenGroups(NamedTuple):
    """Which group each token is in."""

    codes: np.ndarray
    """[rows] int64"""
    names: list[str]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What single tokens look like, with their leading space; `#id` where there is no tokenizer.

    >>> token_texts(None, [5])
    ['#5']
    """
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    pieces = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    out = []
    for number, piece in zip(ids, pieces, strict=True):
        if isinstance(piece, str) and "▁" in piece:
            out.append(piece.replace("▁", " "))
        elif isinstance(piece, str):
            out.append(tokenizer.decode([int(number)], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        else:
            out.append(f"#{number}")
    return out


def token_groups(labels: Mapping[str, np.ndarray], tokenizer: Any = None) -> TokenGroups:
    """Groups of tokens by position 0, special token, place behind it in the template, and role.

    >>> special = np.array([True, False, False, True])
    >>> labels = {"token_id": np.array([1, 7, 9, 1]), "is_special": special, "position": np.arange(4)}
    >>> token_groups(labels).names
    ['position 0', '#1', 'content']
    """
    n = len(next(iter(labels.values())))
    token = labels.get("token_id", np.zeros(n, np.int64)).astype(np.int64)
    special = labels.get("is_special", np.zeros(n, bool)).astype(bool)
    template = labels.get("is_template", np.zeros(n, bool)).astype(bool) & ~special
    sample = labels.get("sample_id", np.zeros(n, np.int64))
    role = np.asarray(labels["role"]).astype(str) if "role" in labels else np.full(n, "")
    roles, role_code = np.unique(role, return_inverse=True)
    at = np.arange(n)
    last = np.maximum.accumulate(np.where(special, at, -1))
    beside = template & (last >= 0) & (sample[np.maximum(last, 0)] == sample)
    # (kind, which, how far behind): sorted in this order, so position 0 comes first and content last
    kind = np.where(special, 1, np.where(template, 2, 3))
    which = np.where(kind == 1, token, np.where(beside, token[np.maximum(last, 0)], -1))
    which = np.where(kind == 3, role_code, which)
    behind = np.where(beside, np.minimum(at - last, 9), 0)
    if "position" in labels:
        first = labels["position"] == 0
        kind, which, behind = (np.where(first, 0, column) for column in (kind, which, behind))
    keys, codes, counts = np.unique(np.stack([kind, which, behind], 1), axis=0, return_inverse=True, return_counts=True)
    codes = codes.reshape(-1)
    texts = dict(zip(found := sorted({int(w) for k, w, _ in keys if k in (1, 2) and w >= 0}),
                     token_texts(tokenizer, found), strict=True))  # fmt: skip
    names = []
    for k, w, b in keys.tolist():
        if k == 0:
            names.append("position 0")
        elif k == 1:
            names.append(texts[w])
        elif k == 2:
            names.append(f"{texts[w]} +{b}" if w >= 0 else "template")
        else:
            names.append(f"content {roles[w]}".strip())
    if len(names) > MOST:
        kept = np.sort(np.argsort(-counts, kind="stable")[: MOST - 1])
        place = np.full(len(names), MOST - 1)
        place[kept] = np.arange(MOST - 1)
        codes, names = place[codes], [*(names[i] for i in kept), "other"]
    return TokenGroups(codes, names)


def error_by_group(
    saes: Mapping[str, SAE], data: Any, tokenizer: Any = None, *, force: bool = False, show: bool | None = False
) -> list[dict[str, Any]]:
    """One line per SAE and group of tokens: how many, their error, and their share of all of it.

    `error` is Σ‖x − x̂‖² / Σ‖x − mean‖² of the group, the mean being that of the SAE's own scope; `relative_error` the
    mean of ‖x − x̂‖ / ‖x‖.
    """
    rows = Rows(data)
    wanted = ("token_id", "position", "is_special", "is_template", "sample_id", "role")
    stored = data.columns([c for c in wanted if c in rows.stored]) if rows.stored else {}
    labels = {**stored, **{c: rows.extra[c] for c in wanted if c in rows.extra}}
    groups = token_groups(labels, tokenizer) if labels else TokenGroups(np.zeros(rows.n or 0, np.int64), ["all"])
    rows.extra[COLUMN] = groups.codes
    scopes = [parse(f"{COLUMN}={number}") for number in range(len(groups.names))]
    _, named, sums = prepare(saes, rows, scopes=scopes, force=force)
    run_pass(rows, named, [sums], show=show, name="errors by group")
    return [
        {"sae": name, "tokens": group, **row}
        for name, sae in named.items()
        for group, scope in zip(groups.names, scopes, strict=True)
        if (row := _errors(sums, name, scope.name, sae.metadata.own_scope)) is not None
    ]


def _errors(sums: Reconstruction, name: str, scope: str, own: str) -> dict[str, Any] | None:
    def of(table: torch.Tensor, wanted: str) -> torch.Tensor:
        bit = sums.names.index(wanted if wanted in sums.names else "all")
        cells = [slot for pattern, slot in sums.cells.of.items() if pattern >> bit & 1]
        return table.reshape(-1, GROUPS, *table.shape[1:])[cells].sum((0, 1))

    n = int(of(sums.inputs.n, scope))
    if not n:
        return None
    stats, sum_x = sums.saes[name].stats.value(), sums.inputs.sum_x.value()
    sse, relative = (of(stats, scope)[ROW_STATS.index(column)].item() for column in ("sse", "relative"))
    mean = of(sum_x, own) / float(of(sums.inputs.n, own))
    spread = float(of(sums.inputs.norm2.value(), scope)) - 2 * float(of(sum_x, scope) @ mean) + n * float(mean @ mean)
    everything = of(stats, "all")[ROW_STATS.index("sse")].item()
    return {
        "n_tokens": n,
        "error": sse / spread if spread > 0 else None,
        "relative_error": relative / n,
        "share_of_error": sse / everything if everything else None,
    }
