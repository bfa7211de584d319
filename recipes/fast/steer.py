"""Steering by the features that special tokens excite most, measured, beside random features and random directions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubsae.core.sae import SAE
from hubsae.evals.passes import PassBlock, load_state, run_pass, save_state
from hubsae.evals.steering import Direction, directions, dose_response
from hubsae.index.chat import Chat

QUESTIONS = (
    "What causes the seasons on Earth?",
    "Write a short thank-you note to a colleague who helped you.",
    "Explain how a vaccine works to a child.",
    "Give me three ideas for a cheap dinner.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise the story of Romeo and Juliet in two sentences.",
    "How do I ask for a day off politely?",
    "Why is the sky blue?",
    "Name two advantages and two drawbacks of working from home.",
    "How many legs do three spiders have in all? Explain.",
)
JUDGE = (
    "You see a question and an answer. Score the answer from 0 (useless or broken) to 10 (correct, fluent and "
    "helpful). Answer in the form [[n]]."
)


class MaximaByToken:
    """Mean over chats of the largest value of each feature on the tokens of a column: an accumulator of a pass."""

    def __init__(self, name: str, d_sae: int, places: Sequence[str]):
        self.name, self.places = name, list(places)
        self.columns = (*places, "sample_id")
        self.chats: dict[tuple[int, int], torch.Tensor] = {}
        """(place, chat) -> largest value of each feature [d_sae], kept while a chat goes on"""
        self.sums = torch.zeros(len(self.places), d_sae, dtype=torch.float64)
        self.counts = torch.zeros(len(self.places), dtype=torch.int64)

    def add(self, block: PassBlock) -> None:
        """Take in one block."""
        sample, codes = block.labels["sample_id"], block.codes[self.name]
        for place, column in enumerate(self.places):
            rows = np.flatnonzero(block.labels[column])
            picked = codes._replace(indices=codes.indices[rows], values=codes.values[rows])
            for row, values in zip(rows.tolist(), picked.dense().cpu() if len(rows) else (), strict=True):
                key = place, int(sample[row])
                self.chats[key] = torch.maximum(self.chats[key], values) if key in self.chats else values
        last = int(sample[-1])
        self._close([key for key in self.chats if key[1] != last])

    def _close(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            self.sums[key[0]] += self.chats.pop(key)
            self.counts[key[0]] += 1

    def merge(self, other: Any) -> None:
        """Of the rows of another rank."""
        self._close(list(self.chats))
        other._close(list(other.chats))
        self.sums, self.counts = self.sums + other.sums, self.counts + other.counts

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write what was added up, whole or not at all."""
        self._close(list(self.chats))
        return save_state(path, "maxima by token", {"sums": self.sums, "counts": self.counts}, {})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a state that was saved."""
        found, _ = load_state(path, "maxima by token")
        self.sums, self.counts, self.chats = found["sums"], found["counts"], {}

    def result(self) -> torch.Tensor:
        """[places, d_sae]"""
        self._close(list(self.chats))
        return self.sums / self.counts.clamp_min(1)[:, None]


def strongest(sae: SAE, held: Any, places: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each special token, given by where it stands [rows], the feature with the largest mean maximum on it."""
    columns = {f"place_{number}": mask for number, mask in enumerate(places.values())}
    (means,) = run_pass(held, {"sae": sae}, [MaximaByToken("sae", sae.d_sae, list(columns))], columns=columns)
    best = means.max(1)
    return [
        {"token": name, "feature": int(feature), "mean_maximum": float(value)}
        for name, value, feature in zip(places, best.values, best.indices, strict=True)
    ]


def steered(
    model: Any, tokenizer: Any, sae: SAE, features: Sequence[Mapping[str, Any]], ids: Sequence[int], *,
    strengths: Sequence[float], questions: int, controls: int, new_tokens: int, chat: Chat | None, seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """The dose-response of each feature and its controls, and some of the answers.

    Without a judge, `said` is the share of answers that hold a special token; with one, its mean score from 0 to 1.
    """
    wanted = {int(row["feature"]): list(ids) for row in features}
    asked = directions(sae, wanted, controls=controls, seed=seed)
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS[:questions]]
    judge = None if chat is None else Quality(chat)
    found = dose_response(
        model, tokenizer, prompts, asked, strengths, max_new_tokens=new_tokens, judge=judge, seed=seed
    )
    texts = [
        {"direction": d.name, "strength": s, "question": QUESTIONS[i], "answer": text}
        for d in asked if d.kind == "feature"
        for s in (0.0, *found.strengths)
        for i, text in enumerate(found.texts[(d.name, s) if s else ("unsteered", 0.0)])
    ]  # fmt: skip
    return [row.flat() for row in found.rows()], texts


class Quality:
    """A chat model's score of an answer, from 0 to 1; 0 where it gives none. Each answer is judged once."""

    def __init__(self, chat: Chat):
        self.chat, self.known = chat, {}

    def __call__(self, direction: Direction, prompt: str, text: str) -> float:
        """The score."""
        if (prompt, text) not in self.known:
            content = f"Question: {prompt}\n\nAnswer: {text}"
            answer = self.chat([{"role": "system", "content": JUDGE}, {"role": "user", "content": content}])
            score = re.search(r"\[\[\s*(\d+)\s*\]\]", answer)
            self.known[prompt, text] = min(int(score[1]), 10) / 10 if score else 0.0
        return self.known[prompt, text]
