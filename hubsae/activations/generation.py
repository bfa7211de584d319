"""Let the model answer prompts, in batches whose result does not depend on ranks or restarts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hubsae.activations.batching import batches_of
from hubsae.activations.capture import padded
from hubsae.activations.groups import no_groups
from hubsae.activations.samples import Sample
from hubsae.core.errors import ConfigError, nearest
from hubsae.core.extras import require

DEFAULTS: dict[str, Any] = {"max_new_tokens": 256, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def generate_responses(
    model: nn.Module, samples: Sequence[Sample], tokenizer: Any, *, options: Mapping[str, Any], seed: int, budget: int
) -> list[Sample]:
    """The samples with the model's response behind each prompt, up to and including the first end token."""
    settings = {**DEFAULTS, **options}
    ends = end_ids(model, tokenizer)
    pad = pad_id(tokenizer, ends)
    if not settings["do_sample"]:
        settings = {name: value for name, value in settings.items() if name not in ("temperature", "top_p", "top_k")}
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
                    out = generate(model, ids.to(device), mask.to(device), ends, pad, **settings)
            for sample, row in zip(part, answers(out, ends), strict=True):
                columns = _lengthened(sample.columns, row, ends)
                answered[sample.id] = replace(sample, ids=sample.ids + row, columns=columns)
    return [answered.get(sample.id, sample) for sample in samples]


def generate(model: Any, ids: Tensor, mask: Tensor, ends: Sequence[int], pad: int, **settings: Any) -> Tensor:
    """What the model writes behind prompts that are padded on the left. [prompts, new tokens]

    The settings are said whole: `generate` would fill what is unset from the checkpoint's own defaults, and those of
    instruct models (top_k 20, repetition penalty 1.05) make another distribution.
    """
    transformers = require("transformers", extra="train")
    # its class takes any keyword, and what it does not know has no effect
    known = [name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")]
    if unknown := [name for name in settings if name not in known]:
        raise ConfigError(
            f"generation has no option {unknown[0]!r}", hint=f"nearest: {nearest(unknown[0], sorted(known))}"
        )
    common: dict[str, Any] = {"eos_token_id": list(ends) or None, "pad_token_id": pad}
    wanted = transformers.GenerationConfig(**{"repetition_penalty": 1.0, **settings, **common})
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, base.generation_config = base.generation_config, transformers.GenerationConfig(**common)
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=wanted)
    finally:
        base.generation_config = own
    return out[:, ids.shape[1] :]


def answers(written: Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Each row up to and including its first end token."""
    rows = written.tolist()
    stops = [next((n + 1 for n, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


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


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a response, by the model's generation settings and its tokenizer."""
    if not hasattr(model, "generate"):
        raise ConfigError(
            f"{type(model).__name__} cannot generate", hint="load the causal language model, not its backbone"
        )
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = list(found) if isinstance(found, (list, tuple)) else [found]
    return sorted({*own, getattr(tokenizer, "eos_token_id", None)} - {None})


def pad_id(tokenizer: Any, ends: Sequence[int]) -> int:
    """The token to pad with: the tokenizer's own, else one that ends a response."""
    return next((i for i in (getattr(tokenizer, "pad_token_id", None), *ends) if i is not None), 0)


def _seed(seed: int, sample: int) -> int:
    return (seed * 1_000_003 + sample * 7_919 + 17) % (1 << 31)
