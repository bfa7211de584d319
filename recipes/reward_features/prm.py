"""A process reward model made from a language model: two labels at the end of each step, on solutions made by rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubsae.activations.capture import padded
from hubsae.core.extras import require
from hubsae.core.files import write_csv_atomic
from hubsae.core.quiet import quiet
from hubsae.rl.policy import without_dropout
from hubsae.rl.steps import StepFormat, StepReward, StepTokens, tokenize

from . import scores
from .errors import KINDS, Solution
from .settings import PRMSettings

WINDOW = 8
"""Batches among which solutions are sorted by length."""


def train_prm(
    settings: PRMSettings, folder: Path, model: str, tokenizer: Any, solutions: Sequence[Solution], how: StepFormat,
    *, seed: int = 0, device: Any = "cpu", revision: str | None = None, progress: Callable[..., None] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train a token classifier, leave it in `folder/model`, and return the losses."""
    transformers = require("transformers", extra="train")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = transformers.AutoModelForTokenClassification.from_pretrained(
            model, revision=revision, num_labels=2, dtype=torch.float32
        )
        learner = _trainable(without_dropout(net), settings, int(net.config.num_hidden_layers)).to(device).train()
    rows = tokenize(tokenizer, [s.text for s in solutions], how)
    steps = max(1, round(settings.epochs * len(rows) / settings.batch))
    weights = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=0.01)
    losses: list[dict[str, float]] = []
    for step, chosen in enumerate(_batches([len(r.ids) for r in rows], settings.batch, steps, seed)):
        for group in optimizer.param_groups:  # a twentieth of warm-up, then down to nothing
            group["lr"] = settings.lr * min((step + 1) / max(steps / 20, 1), 1 - step / steps)
        ids, mask, labels = _batch([rows[i] for i in chosen], [solutions[i] for i in chosen])
        logits = learner(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten().to(device), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append({"step": step + 1, "loss": round(float(loss.detach()), 5)})
        if progress is not None:
            progress(step + 1, steps, f"loss {losses[-1]['loss']:.3f}")
    merged = learner.merge_and_unload() if settings.lora else learner
    with quiet():
        merged.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    write_csv_atomic(folder / "training.csv", losses)
    return losses


def step_auc(reward: StepReward, solutions: Sequence[Solution]) -> list[dict[str, Any]]:
    """How well scores tell right steps from wrong ones: all wrong ones, and those of each kind of error."""
    found = np.concatenate(reward.score([s.text for s in solutions]))
    good = np.concatenate([np.array(s.good) for s in solutions])
    problem = np.repeat([s.problem for s in solutions], [len(s.steps) for s in solutions])
    kind = np.repeat([s.kind for s in solutions], [len(s.steps) for s in solutions])
    rows = []
    for name in ("all", *KINDS):
        keep = good | (kind == name) if name != "all" else np.ones(len(good), bool)
        if not (~good[keep]).any():
            continue
        measured = scores.auc(found[keep], good[keep], problem[keep])
        rows.append({"errors": name, "wrong_steps": int((~good[keep]).sum()), **measured.columns("auc")})
    return rows


def _trainable(net: Any, settings: PRMSettings, layers: int) -> Any:
    """An adapter on the upper layers, or those layers themselves; the head always."""
    if settings.lora is not None:
        peft = require("peft", extra="train")
        upper = list(range(settings.from_layer, layers))
        return peft.get_peft_model(net, peft.LoraConfig(
            r=settings.lora, lora_alpha=2 * settings.lora, lora_dropout=0.0, task_type="TOKEN_CLS",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            layers_to_transform=upper, layers_pattern="layers", modules_to_save=["score"],
        ))  # fmt: skip
    if settings.from_layer:
        for name, parameter in net.named_parameters():
            number = next((int(part) for part in name.split(".") if part.isdigit()), -1)
            upper = number >= settings.from_layer or name.startswith("score") or ".norm." in name
            parameter.requires_grad_(upper)
    return net


def _batches(lengths: Sequence[int], size: int, steps: int, seed: int) -> list[list[int]]:
    """Batches of solutions of like length, in random order."""
    rng, found = random.Random(f"prm-{seed}"), []
    while len(found) < steps:
        order = rng.sample(range(len(lengths)), len(lengths))
        for first in range(0, len(order), size * WINDOW):
            window = sorted(order[first : first + size * WINDOW], key=lambda i: lengths[i])
            parts = [window[i : i + size] for i in range(0, len(window), size)]
            found += rng.sample(parts, len(parts))
    return found[:steps]


def _batch(rows: Sequence[StepTokens], solutions: Sequence[Solution]) -> tuple[torch.Tensor, ...]:
    ids, mask = padded([row.ids for row in rows])
    labels = torch.full_like(ids, -100)
    for at, (row, solution) in enumerate(zip(rows, solutions, strict=True)):
        labels[at, row.ends] = torch.tensor(solution.good).long()
    return ids, mask.long(), labels
