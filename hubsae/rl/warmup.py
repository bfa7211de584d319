"""A short supervised warm-up on the answer format, for a base model that a reward would otherwise never reach.

A policy that never once writes `#### number` gets no reward to learn from. A few steps on given answers teach it the
form; what it then learns of the matter is left to reinforcement learning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubsae.core.errors import DataError
from hubsae.core.files import write_csv_atomic
from hubsae.core.quiet import quiet
from hubsae.core.settings import Settings
from hubsae.rl.policy import load_weights
from hubsae.rl.problems import PromptStyle, Question


class WarmUp(Settings):
    """Supervised steps before reinforcement learning; all weights, constant rate."""

    steps: int = 20
    batch: int = 8
    lr: float = 2e-5
    max_tokens: int = 320
    """Longer problems are left out."""


class AnswerBatch(NamedTuple):
    """Prompts with answers, right-padded; each [sequences, tokens]."""

    ids: Tensor
    mask: Tensor
    weights: Tensor
    """How much each token counts in the loss."""


def answer_batch(
    pairs: Sequence[tuple[list[int], list[int]]], pad: int, prompt_weight: float = 0.0, device: Any = "cpu"
) -> AnswerBatch:
    """Token ids of (prompt, answer) as one batch; answers count 1, prompts `prompt_weight`.

    >>> answer_batch([([5, 6], [7]), ([5], [8, 9])], pad=0).weights.tolist()
    [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), pad)
    mask, weights = torch.zeros(len(pairs), width, dtype=torch.long), torch.zeros(len(pairs), width)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        weights[row, : len(prompt)] = prompt_weight
        weights[row, len(prompt) : end] = 1.0
    return AnswerBatch(ids.to(device), mask.to(device), weights.to(device))


def answer_loss(model: Any, batch: AnswerBatch) -> Tensor:
    """Weighted cross-entropy of the next token."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    return (each * batch.weights[:, 1:].flatten()).sum() / batch.weights[:, 1:].sum()


def warm_up(
    settings: WarmUp,
    folder: Path,
    *,
    model: str | Path,
    tokenizer: Any,
    questions: Sequence[Question],
    style: PromptStyle,
    seed: int = 0,
    revision: str | None = None,
    device: Any = "cpu",
    progress: Callable[..., None] | None = None,
) -> list[dict[str, float]]:
    """Teach a model to answer as the questions do; leaves a checkpoint in `folder/model`, returns the losses."""
    prompts = tokenizer([style.render(tokenizer, q.question) for q in questions], add_special_tokens=False).input_ids
    answers = tokenizer([q.answer + tokenizer.eos_token for q in questions], add_special_tokens=False).input_ids
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(p) + len(a) <= settings.max_tokens]
    if len(pairs) < settings.batch:
        raise DataError(
            f"{len(pairs)} of {len(questions)} problems fit in {settings.max_tokens} tokens with their answers",
            hint="raise warmup.max_tokens",
        )
    policy = load_weights(model, revision=revision, device=device).train()
    rng = random.Random(f"warm-up-{seed}")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0)
    losses: list[dict[str, float]] = []
    for step in range(1, settings.steps + 1):
        batch = answer_batch(rng.sample(pairs, settings.batch), tokenizer.pad_token_id, device=device)
        loss = answer_loss(policy, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append({"step": step, "loss": round(float(loss.detach()), 6)})
        if progress is not None:
            progress(step, settings.steps, f"loss {losses[-1]['loss']:.3f}")
    with quiet():
        policy.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_csv_atomic(folder / "warmup.csv", losses)
    return losses
