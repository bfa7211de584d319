"""Solutions as items of a harvest, with the score and the place of every step; and the rows of one kind, read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubsae.activations import ActivationDataset
from hubsae.core.files import write_text_atomic
from hubsae.rl.steps import StepFormat, tokenize

from .errors import Solution

COLUMNS = {
    "score": "float32", "good": "bool", "problem": "int32", "step": "int32", "length": "int32", "is_format": "bool",
    "step_end": "bool", "content_end": "bool",
}  # fmt: skip
"""score: of the step a token is in, NaN in the prompt. good: whether the step is right, by rule where that is known,
else score above a half. step: its number from 1, 0 in the prompt. length: tokens of the step so far. is_format: a token
without letter or digit. step_end: where the step is read. content_end: its last token that is not format."""


def items_of(tokenizer: Any, solutions: Sequence[Solution], how: StepFormat) -> list[dict[str, Any]]:
    """What `harvest` takes: token ids with a column per token."""
    known: dict[int, bool] = {}

    def is_format(token: int) -> bool:
        if token not in known:
            special = token in tokenizer.all_special_ids
            known[token] = special or not any(c.isalnum() for c in tokenizer.decode([token]))
        return known[token]

    items = []
    for solution, row in zip(solutions, tokenize(tokenizer, [s.text for s in solutions], how), strict=True):
        step = np.array(row.step)
        form = np.array([is_format(token) for token in row.ids])
        score = np.array([np.nan, *solution.scores])[step]
        good = np.array([True, *(solution.good or [s >= 0.5 for s in solution.scores])])[step]
        starts = np.flatnonzero(np.diff(step, prepend=-1))
        length = np.arange(len(step)) - starts[np.searchsorted(starts, np.arange(len(step)), side="right") - 1] + 1
        ends, content = np.zeros(len(step), bool), np.zeros(len(step), bool)
        ends[row.ends] = True
        for number in range(1, len(solution.steps) + 1):
            own = np.flatnonzero((step == number) & ~form)
            content[own[-1:]] = True
        columns = (score, good, np.full(len(step), solution.problem), step, length, form, ends, content)
        labels = dict(zip(COLUMNS, columns, strict=True))
        items.append({"input_ids": row.ids, "prompt_length": row.prompt_length, **labels})
    return items


def rows_at(data: ActivationDataset, mark: str) -> dict[str, Any]:
    """The rows where the label `mark` is true, with their labels, sorted by solution and step. [rows, d] float32"""
    names = ["score", "good", "problem", "step", "length", "position", "sample_id"]
    labels = data.columns([mark, *names])
    keep = np.flatnonzero(labels[mark])
    keep = keep[np.lexsort((labels["step"][keep], labels["sample_id"][keep]))]
    return {"x": data.take(keep).float(), **{name: labels[name][keep] for name in names}}


def aligned(here: dict[str, Any], there: dict[str, Any], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of two models at the same steps of the same solutions, row by row; the first `most` of them."""
    keys = [rows["sample_id"].astype(np.int64) * 100_000 + rows["step"] for rows in (here, there)]
    _, one, two = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    return here["x"][torch.from_numpy(one[:most])], there["x"][torch.from_numpy(two[:most])]


def shuffled(score: np.ndarray, problem: np.ndarray, seed: int) -> np.ndarray:
    """Every row has the mean score of another problem: nothing of a problem is left in it but which one it is.

    >>> sorted(set(shuffled(np.array([0.0, 1.0, 4.0]), np.array([1, 1, 2]), 0).tolist()))
    [0.5, 4.0]
    """
    _, which = np.unique(problem, return_inverse=True)
    mean = np.bincount(which, score) / np.bincount(which)
    return np.random.default_rng(seed).permutation(mean)[which]


def write(path: Path, solutions: Sequence[Solution]) -> None:
    """Solutions, one a line."""
    lines = [json.dumps(dataclasses.asdict(s), ensure_ascii=False) for s in solutions]
    write_text_atomic(path, "\n".join(lines) + "\n")


def read(path: Path) -> list[Solution]:
    """What `write` wrote."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            found.append(Solution(**row | {name: tuple(row[name]) for name in ("steps", "good", "scores")}))
    return found
