"""What is measured of every SAE on the chats put aside: errors by group of tokens, L0, and what the model loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from hubsae.core.metadata import Metric
from hubsae.core.sae import SAE
from hubsae.core.scopes import parse
from hubsae.evals import reconstruction
from hubsae.evals.definitions import to_metrics
from hubsae.evals.results import SAEReconstruction
from hubsae.evals.splice import SpliceResult, splice_many
from hubsae.recipes.standard import Measures, in_parts, pick_device
from hubsae.train import TrainConfig, train_many

from . import matched
from .cells import Cell, train_configs
from .gsnr import gsnr
from .settings import LABELS, Config

TOKENS = {
    "st": "st",
    "st_no0": "st & not position_0",
    "all": "all",
    "no0": "not position_0",
}
"""Short name -> scope. `st` are the tokens of the published MSE_st."""
GROUPS = ("position 0", "delimiter", "role name", "template newline", "content")
LABELLED = ("token_id", "position", "is_special", "is_template", "sample_id")
NOTED = ("mse", "fvu", "mse_per_sequence", "l0", "l0_per_sequence", "dead_fraction", "relative_error")
"""Metrics that go onto the record of an SAE, in the scopes above."""


def measure_all(
    config: Config, saes: Mapping[str, Callable[[], SAE]], held: Any, kept: Mapping[str, Path], model: Any,
    tokenizer: Any, texts: Sequence[Any], progress: Any,
) -> tuple[Measures, list[str]]:  # fmt: skip
    """Measure every SAE; `kept` are, by method, rows of its training stream, on which gradients are taken.

    The tables are cells, groups, advantage, splice, gsnr. Returned with them: of each method, kind and expansion the
    SAE nearest to the middle level of L0.
    """
    how, t = config.measure, config.train
    columns = token_columns(held.columns(LABELLED), special_ids(tokenizer, config.data.special))
    rows, groups, metrics, density = errors(saes, held, columns, progress)
    whole = matched.whole(rows)
    chosen = [
        sae for kind in t.kinds for x in t.expansions
        for sae in matched.representative(whole, kind, x, how.levels).values()
    ]  # fmt: skip
    spliced = splice_many(
        model, tokenizer, {name: saes[name]() for name in chosen}, texts[: how.texts], max_length=how.text_length
    )
    for name, result in spliced.items():
        metrics[name] += result.metrics()
    first = [c for c in train_configs(config, "fast", {"activations": {}}) if c.seed == t.seeds[0]]
    start = starts(first, load_file(kept["fast"])["x"])
    gradients = []
    for method in t.methods:
        stream = load_file(kept[method])
        for one in first:
            own = saes.get(f"{method}/{one.name}")
            for weights, sae in (("its own", own and own()), ("one start for all", start.get(one.name))):
                if sae is not None:
                    found = gradient_ratios(one, sae.cpu(), stream, how.gsnr_batches)
                    gradients += [{"weights": weights, "method": LABELS[method], **row} for row in found]
    tables = {
        "cells": rows, "groups": groups, "advantage": matched.advantage(whole, t.published, how.levels),
        "splice": [_loss(name, result) for name, result in spliced.items()], "gsnr": gradients,
    }  # fmt: skip
    return Measures(metrics, density, tables), chosen


def special_ids(tokenizer: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """The ids of special tokens by their text; a role name may be several tokens of a model."""
    return {name: [int(i) for i in tokenizer(name, add_special_tokens=False)["input_ids"]] for name in names}


def places_of(labels: Mapping[str, np.ndarray], special: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Where each special token stands [rows]: all tokens of a name that is several, one behind the other in a chat.

    >>> labels = {"token_id": np.array([1, 7, 8, 7, 8]), "sample_id": np.array([0, 0, 0, 0, 1])}
    >>> {name: places.tolist() for name, places in places_of(labels, {"<s>": [1], "role": [7, 8]}).items()}
    {'<s>': [True, False, False, False, False], 'role': [False, True, True, False, False]}
    """
    token, sample = labels["token_id"], labels["sample_id"]
    found = {}
    for name, ids in special.items():
        starts = np.ones(max(0, len(token) - len(ids) + 1), bool)
        for shift, number in enumerate(ids):
            here = slice(shift, shift + len(starts))
            starts &= (token[here] == number) & (sample[here] == sample[: len(starts)])
        mask = np.zeros(len(token), bool)
        for shift in range(len(ids)):
            mask[shift : shift + len(starts)] |= starts
        found[name] = mask
    return found


def token_columns(labels: Mapping[str, np.ndarray], special: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Columns [rows] that groups of tokens are scopes by: `st`, and `group`, one of GROUPS.

    >>> labels = {"token_id": np.array([1, 7, 5, 9, 7]), "position": np.arange(5), "sample_id": np.zeros(5, int),
    ...           "is_special": np.array([1, 0, 0, 0, 0], bool), "is_template": np.array([1, 1, 1, 0, 0], bool)}
    >>> found = token_columns(labels, {"<s>": [1], "user": [7]})
    >>> found["st"].tolist(), found["group"].tolist()
    ([True, True, False, False, True], ['position 0', 'role name', 'template newline', 'content', 'content'])
    """
    st = np.any(list(places_of(labels, special).values()), axis=0)
    first, delimiter, template = labels["position"] == 0, labels["is_special"], labels["is_template"]
    group = np.select([first, delimiter, template & st, template], GROUPS[:4], GROUPS[4])
    return {"st": st, "group": group}


def errors(
    saes: Mapping[str, Callable[[], SAE]], held: Any, columns: Mapping[str, np.ndarray], progress: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[Metric]], dict[str, torch.Tensor]]:
    """A row per SAE (ids are method/cell), a row per SAE and group, metrics for records, log10 densities."""
    scopes = [*TOKENS.values(), *(f"group={name}" for name in GROUPS)]
    rows, groups, metrics, density = [], [], {}, {}
    wanted = {parse(scope).name for scope in TOKENS.values()}
    for part in in_parts(saes):
        found = reconstruction(part, held, scopes=scopes, columns=columns)
        for name in part:
            one = found[name]
            rows.append(_row(name, one))
            groups += _by_group(name, one)
            metrics[name] = to_metrics([m for m in one.measures if m.name in NOTED and m.scope in wanted])
            density[name] = one.features.log10_density()
        progress(len(rows), len(saes), "SAEs measured")
    return rows, groups, metrics, density


def split_id(name: str) -> tuple[str, Cell]:
    """Method and cell of an SAE's id."""
    method, _, cell = name.partition("/")
    return method, Cell.of(cell)


def _row(name: str, one: SAEReconstruction) -> dict[str, Any]:
    method, cell = split_id(name)
    row: dict[str, Any] = {
        "id": name, "method": method, "kind": cell.kind, "expansion": cell.expansion, "number": cell.number,
        "seed": cell.seed, "l0": one.value("l0", TOKENS["no0"]), "l0_all": one.value("l0", "all"),
        "dead_fraction": one.value("dead_fraction", "all"),
    }  # fmt: skip
    for short, scope in TOKENS.items():
        mse = one.value("mse_per_sequence", scope)
        row |= {f"mse_{short}": mse, f"log2_mse_{short}": math.log2(mse) if mse else None}
        row[f"fvu_{short}"] = one.value("fvu", scope)
    return row


def _by_group(name: str, one: SAEReconstruction) -> list[dict[str, Any]]:
    method, cell = split_id(name)
    out = []
    for group in GROUPS:
        scope = parse(f"group={group}").name
        if any(m.scope == scope and m.n_tokens for m in one.measures):
            fvu, mse = one.get("fvu", scope), one.get("mse", scope)
            low, high = fvu.interval or (None, None)
            out.append(
                {"id": name, "method": method, "kind": cell.kind, "number": cell.number, "seed": cell.seed,
                 "tokens": group, "n_tokens": mse.n_tokens, "fvu": fvu.value, "low": low, "high": high,
                 "relative_error": one.value("relative_error", scope), "mse": mse.value, "l0": one.value("l0", scope)}
            )  # fmt: skip
    return out


def _loss(name: str, result: SpliceResult) -> dict[str, Any]:
    low, high = result.get("delta_ce").interval or (None, None)
    names = ("ce_clean", "delta_ce", "kl", "frac_recovered_mean")
    values = {m: result.value(m) for m in names}
    percent = 100 * (values["delta_ce"] or 0.0) / (values["ce_clean"] or 1.0)
    return {"id": name, **values, "delta_percent": percent, "delta_ce_low": low, "delta_ce_high": high,
            "tokens": result.get("kl").n_tokens}  # fmt: skip


def starts(configs: Sequence[TrainConfig], rows: torch.Tensor) -> dict[str, SAE]:
    """One SAE of each architecture as training begins: the same weights for every method."""
    one = {c.architecture: c for c in configs}.values()
    begun = [c.model_copy(update={"tokens": c.batch_size, "lr": 1e-12, "exclude": ()}) for c in one]
    found = train_many(begun, rows, quiet=True, device=pick_device())
    return {result.name: result.sae for result in found if result.sae is not None}


def gradient_ratios(
    config: TrainConfig, sae: SAE, kept: Mapping[str, torch.Tensor], batches: int
) -> list[dict[str, Any]]:
    """GSNR of an SAE on rows of a method's stream, in a random order, with position 0 and without."""
    found, cell, size = [], Cell.of(config.name), config.batch_size
    config = config.model_copy(update={"exclude": ()})  # which rows are taken is said below
    for tokens, rows in (("all tokens", kept["x"]), ("without position 0", kept["x"][kept["position"] != 0])):
        chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: size * batches]]
        parts = chosen[: len(chosen) // size * size].split(size)
        ratio = gsnr([config], {config.name: sae}, parts, device=pick_device())[config.name]
        found.append(
            {"kind": cell.kind, "expansion": cell.expansion, "number": cell.number, "seed": cell.seed, "tokens": tokens,
             "gsnr": ratio.pooled, "gsnr_mean": ratio.mean, "batches": ratio.batches, "batch": size}
        )  # fmt: skip
    return found
