"""Sampling responses, and reading log-probabilities and values of given responses.

Prompts are padded on the left, responses on the right, so that all responses begin at the same column:

    [pad pad prompt prompt | response eos pad]
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hubsae.activations.capture import padded
from hubsae.activations.generation import end_ids, generate
from hubsae.rl.objectives import position_ids, response_mask, token_log_probs


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy decoding."""
    micro_batch: int = 256
    """Sequences generated at a time."""


@dataclass(frozen=True)
class Rollout:
    """A batch of prompts with their responses."""

    tokens: Tensor
    """[sequences, prompt width + response width]"""
    mask: Tensor
    """1 for real tokens of prompt and response; same shape."""
    prompt_width: int
    response_mask: Tensor
    """[sequences, response width]"""

    @property
    def response(self) -> Tensor:
        """Response tokens [sequences, response width]."""
        return self.tokens[:, self.prompt_width :]

    @property
    def lengths(self) -> Tensor:
        """Response lengths, EOS included [sequences]."""
        return self.response_mask.sum(1)

    def rows(self, index: Tensor | slice) -> Rollout:
        """Some of the sequences."""
        return Rollout(self.tokens[index], self.mask[index], self.prompt_width, self.response_mask[index])

    def texts(self, tokenizer: Any) -> list[str]:
        """The responses as text, without special tokens."""
        return [
            tokenizer.decode(row[keep.bool()].tolist(), skip_special_tokens=True)
            for row, keep in zip(self.response, self.response_mask, strict=True)
        ]


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> Rollout:
    """One response per prompt. The same seed gives the same responses; the caller's random state is left alone."""
    device, pad = next(model.parameters()).device, tokenizer.pad_token_id
    eos = end_ids(model, tokenizer)
    greedy = sampling.temperature == 0
    how: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    if not greedy:
        how["temperature"] = sampling.temperature
    was_training = model.training
    model.eval()
    ids, mask = padded(prompts, left=True, pad=pad)
    ids, mask = ids.to(device), mask.to(device).long()
    parts: list[Tensor] = []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), sampling.micro_batch):
                rows = slice(start, start + sampling.micro_batch)
                parts.append(
                    generate(model, ids[rows], mask[rows], eos, pad, max_new_tokens=sampling.max_new_tokens, **how)
                )
    finally:
        model.train(was_training)
    width = max(part.shape[1] for part in parts)
    response = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=pad) for part in parts])
    real = response_mask(response, eos)
    response = torch.where(real.bool(), response, pad)
    return Rollout(torch.cat([ids, response], 1), torch.cat([mask, real], 1), ids.shape[1], real)


def log_probs_of(model: Any, rollout: Rollout, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens and entropies, each [sequences, response width].

    The logits that predict response token i stand one column before it, so columns
    `prompt_width - 1` to the last but one are read.
    """
    width = rollout.response_mask.shape[1]
    out = model(
        input_ids=rollout.tokens,
        attention_mask=rollout.mask,
        position_ids=position_ids(rollout.mask),
        logits_to_keep=width + 1,
        use_cache=False,
    )
    return token_log_probs(out.logits[:, :-1], rollout.response, temperature or 1.0)


def values_of(critic: Any, rollout: Rollout) -> Tensor:
    """The critic's value before each response token [sequences, response width]: same columns as the logits."""
    width = rollout.response_mask.shape[1]
    return critic(rollout.tokens, rollout.mask, position_ids(rollout.mask))[:, -width - 1 : -1]


def autocast(device: torch.device, dtype: str) -> Any:
    """Mixed precision for forwards where `dtype` is not float32; weights stay float32 either way."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))
