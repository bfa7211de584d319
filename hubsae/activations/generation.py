"""Let the model answer prompts, in batches whose result does not depend on ranks or restarts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hubsae.activations.batching import batches_of
from hubsae.activations.capture import padded
from hubsae.activations.groups import no_groups
from hubsae.activations.samples import Sample
from hubsae.core.errors import ConfigError

DEFAULTS: dict[str, Any] = {"max_new_tokens": 256, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def generate_responses(
    model: nn.Module, samples: Sequence[Sample], tokenizer: Any, *, options: Mapping[str, Any], seed: int, budget: int
) -> list[Sample]:
    """The samples with the model's response behind each prompt, up to and including the first end token."""
    settings = {**DEFAULTS, **options}
    ends = end_ids(model, tokenizer)
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = pad if pad is not None else (ends[0] if ends else 0)
    device = next(model.parameters()).device
    answered: dict[int, Sample] = {}
    longest = int(settings["max_new_tokens"])
    # the cache grows while the answers do, so the budget counts them as well
    for batch in batches_of(samples, max(1, budget)):
        width = max(1, budget // (len(batch[0].ids) + longest))
        for first in range(0, len(batch), width):
            part = batch[first : first + width]
            ids, mask = padded([s.ids for s in part], left=True, pad=pad)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(_seed(seed, part[0].id))
                with torch.inference_mode():
                    out = model.generate(  # pyright: ignore[reportCallIssue]
                        input_ids=ids.to(device),
                        attention_mask=mask.to(device),
                        pad_token_id=pad,
                        eos_token_id=ends or None,
                        **settings,
                    )
            for sample, row in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
                stop = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
                answered[sample.id] = replace(
                    sample, ids=sample.ids + row[:stop], columns=_lengthened(sample.columns, row[:stop], ends)
                )
    return [answered.get(sample.id, sample) for sample in samples]


def _lengthened(columns: Mapping[str, Any], answer: list[int], ends: list[int]) -> dict[str, Any]:
    """Groups of tokens, the answer's own behind those of the prompt."""
    if "turn" not in columns:
        return dict(columns)
    more = no_groups(len(answer))
    more["role"][:] = "assistant"
    more["turn"][:] = columns["turn"][-1] if len(columns["turn"]) else 0  # the prompt ends in the answer's head
    more["is_assistant"][:] = True
    more["is_template"][:] = np.isin(answer, ends)
    return {k: np.concatenate([v, more[k]]) if k in more else v for k, v in columns.items()}


def end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a response, by the model's generation settings or its tokenizer."""
    if not hasattr(model, "generate"):
        raise ConfigError(
            f"{type(model).__name__} cannot generate", hint="load the causal language model, not its backbone"
        )
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    return [] if found is None else [int(i) for i in (found if isinstance(found, (list, tuple)) else [found])]


def _seed(seed: int, sample: int) -> int:
    return (seed * 1_000_003 + sample * 7_919 + 17) % (1 << 31)
