"""Run a model with the activations at a hook point replaced: whole texts or through a KV cache, padding untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hubsae.core.errors import ConfigError, DataError, HookError
from hubsae.core.hooks import HookPoint, edit_hook, read_hook
from hubsae.core.sae import SAE
from hubsae.evals.texts import Batch

Edit = Callable[[Tensor, Tensor], Tensor]
"""(hidden [batch, seq, d], which positions to replace [batch, seq]) -> hidden"""
# Log-probabilities are computed for this many logits at a time.
LOGITS_AT_ONCE = 1 << 24


class _Stop(Exception):
    """Raised inside a forward once the activations have been seen; the rest of the model is not needed."""


class Runner:
    """Forwards of one model, whole or through a KV cache, with the activations edited on the way."""

    def __init__(self, model: nn.Module, chunk: int | None, only: str | None, keep_first: bool):
        if chunk is not None and chunk < 1:
            raise ConfigError(f"cache_chunk must be at least 1, found {chunk}")
        self.model = model
        self.chunk = chunk
        self.only = only
        self.keep_first = keep_first
        embeddings = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        self.device = next(embeddings.parameters()).device

    def positions(self, batch: Batch) -> Tensor:
        """Which positions are replaced [texts, longest]."""
        where = batch.mask.clone()
        if self.only == "response":
            where &= batch.is_response
        elif self.only == "prompt":
            where &= ~batch.is_response
        if self.keep_first:
            where[:, 0] = False
        return where

    def logits(self, batch: Batch, hook: HookPoint | None = None, edit: Edit | None = None) -> Tensor:
        """Logits [texts, longest, vocabulary] with `edit` applied at the hook point."""
        if hook is None or edit is None:
            return self._forward(batch, lambda start, end: None)
        where = self.positions(batch)
        span = slice(0, 0)

        def move(start: int, end: int) -> None:
            nonlocal span
            span = slice(start, end)

        def change(hidden: Tensor, _: dict[str, Any]) -> Tensor:
            here = where[:, span].to(hidden.device)
            if hidden.shape[:2] != here.shape:
                raise HookError(
                    f"activations at {hook.name} are {tuple(hidden.shape[:2])}, the batch is {tuple(here.shape)}"
                )
            return edit(hidden, here)

        with edit_hook(self.model, hook, change):
            return self._forward(batch, move)

    def _forward(self, batch: Batch, move: Callable[[int, int], None]) -> Tensor:
        ids, mask = batch.ids.to(self.device), batch.mask.to(self.device).long()
        length = ids.shape[1]
        if self.chunk is None:
            move(0, length)
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        cache, out = None, []
        for start in range(0, length, self.chunk):
            end = min(start + self.chunk, length)
            move(start, end)
            answer = self.model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = answer.past_key_values
            out.append(answer.logits)
        return torch.cat(out, dim=1)

    def hidden(self, batch: Batch, hook: HookPoint) -> Tensor:
        """Activations [replaced positions, d] at a hook point; the model stops there."""
        seen: list[Tensor] = []

        def see(hidden: Tensor) -> None:
            seen.append(hidden[self.positions(batch).to(hidden.device)])
            raise _Stop

        try:
            with read_hook(self.model, hook, see):
                self.model(
                    input_ids=batch.ids.to(self.device),
                    attention_mask=batch.mask.to(self.device).long(),
                    use_cache=False,
                )
        except _Stop:
            return seen[0]
        raise HookError(f"the model never reached {hook.name}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def means_at(
    runner: Runner, hooks: set[HookPoint], work: list[Batch], given: Tensor | Mapping[str, Tensor] | None
) -> dict[HookPoint, Tensor]:
    out: dict[HookPoint, Tensor] = {}
    for hook in sorted(hooks):
        vector = given.get(hook.name) if isinstance(given, Mapping) else given
        if vector is None:
            total, n = torch.zeros(()), 0
            for batch in work:
                hidden = runner.hidden(batch, hook)
                total = total.to(hidden.device) + hidden.double().sum(0)
                n += hidden.shape[0]
            if not n:
                raise DataError("no position is replaced", hint="texts of one token and keep_position_0?")
            vector = total / n
        if not bool(torch.isfinite(vector).all()):
            raise DataError(f"the activations at {hook.name} hold NaN or infinity", hint="check the model's weights")
        out[hook] = vector
    return out


def _replace_by_sae(sae: SAE) -> Edit:
    def edit(hidden: Tensor, where: Tensor) -> Tensor:
        real = hidden[where]
        out = hidden.clone()
        # only real tokens reach the SAE: a batch rule must not rank padding
        out[where] = sae(real.to(sae.device)).to(hidden)
        return out

    return edit


def _replace_by_vector(vector: Tensor) -> Edit:
    def edit(hidden: Tensor, where: Tensor) -> Tensor:
        return torch.where(where[..., None], vector.to(hidden), hidden)

    return edit


class SumsByText:
    """Summed losses [texts, 2] per kind of run; column 0 predicts prompt tokens, column 1 response tokens."""

    def __init__(self, texts: int):
        self.texts = texts
        self.n = np.zeros((texts, 2))
        self.by: dict[Any, np.ndarray] = {}

    def of(self, key: Any) -> np.ndarray:
        return self.by.setdefault(key, np.zeros((self.texts, 2)))


def run_all(
    runner: Runner,
    pairs: Mapping[str, tuple[SAE, HookPoint]],
    means: Mapping[HookPoint, Tensor],
    work: list[Batch],
    texts: int,
    on_batch: Callable[[int], None] | None,
) -> SumsByText:
    sums = SumsByText(texts)
    edits: dict[Any, tuple[HookPoint, Edit]] = {}
    for hook in means:
        edits["mean", hook] = (hook, _replace_by_vector(means[hook]))
        edits["zero", hook] = (hook, _replace_by_vector(torch.zeros_like(means[hook])))
    for label, (sae, hook) in pairs.items():
        edits["sae", label] = (hook, _replace_by_sae(sae))
    for batch in work:
        predicts = batch.mask[:, 1:]
        text, place = predicts.nonzero(as_tuple=True)
        column = batch.is_response[text, place + 1].long()
        index = (batch.which[text].numpy(), column.numpy())
        np.add.at(sums.n, index, 1)
        targets = batch.ids[text, place + 1]
        clean = runner.logits(batch)
        clean = clean[text.to(clean.device), place.to(clean.device)]
        nll, _ = _losses(clean, None, targets)
        np.add.at(sums.of("clean"), index, nll)
        for key, (hook, edit) in edits.items():
            logits = runner.logits(batch, hook, edit)
            nll, kl = _losses(logits[text.to(logits.device), place.to(logits.device)], clean, targets)
            if not (np.isfinite(nll).all() and np.isfinite(kl).all()):
                raise DataError(
                    f"the loss is NaN or infinite in the {key[0]} run at {hook.name}",
                    hint="check the SAE's weights, and the model's dtype: float16 overflows where bfloat16 does not",
                )
            np.add.at(sums.of((*key, "ce")), index, nll)
            np.add.at(sums.of((*key, "kl")), index, kl)
        if on_batch is not None:
            on_batch(len(batch.which))
    return sums


def _losses(logits: Tensor, clean: Tensor | None, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per predicted token, in float64: −log p(target), and KL(clean ‖ this) where `clean` is given."""
    nll, kl = [], []
    step = max(1, LOGITS_AT_ONCE // max(logits.shape[-1], 1))
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        log_p = logits[rows].double().log_softmax(-1)
        nll.append(-log_p.gather(1, targets[rows, None].to(log_p.device))[:, 0].cpu())
        if clean is not None:
            log_q = clean[rows].double().log_softmax(-1)
            # a token with clean probability 0 contributes nothing, whatever the other says
            kl.append((log_q.exp() * (log_q - log_p)).nan_to_num(nan=0.0).sum(1).cpu())
    return torch.cat(nll).numpy() if nll else np.zeros(0), torch.cat(kl).numpy() if kl else np.zeros(0)
