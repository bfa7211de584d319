"""Run a model with the activations at a hook point replaced: whole texts or through a KV cache, padding untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hubsae.activations.capture import capture
from hubsae.core.errors import ConfigError, DataError, HookError
from hubsae.core.hooks import HookPoint, edit_hook, read_hook
from hubsae.core.progress import Task
from hubsae.core.sae import SAE
from hubsae.core.scopes import NORM, Scope
from hubsae.evals.texts import Batch

Edit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [batch, seq, d], which positions to replace [batch, seq], what the SAE reads [batch, seq, d_in]) -> hidden"""
# Log-probabilities are computed for this many logits at a time.
LOGITS_AT_ONCE = 1 << 22


class Spot(NamedTuple):
    """A hook point, the tokens that are replaced there, and where what replaces them is read: there, or elsewhere."""

    hook: HookPoint
    scope: Scope
    read: HookPoint

    @property
    def name(self) -> str:
        """The hook point in words, of a transcoder both."""
        return self.hook.name if self.read == self.hook else f"{self.read.name} -> {self.hook.name}"


class Runner:
    """Forwards of one model, whole or through a KV cache, with the activations edited on the way."""

    def __init__(self, model: nn.Module, chunk: int | None):
        if chunk is not None and chunk < 1:
            raise ConfigError(f"cache_chunk must be at least 1, found {chunk}")
        self.model = model
        self.chunk = chunk
        embeddings = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        self.device = next(embeddings.parameters()).device

    def logits(
        self, batch: Batch, spot: Spot | None = None, edit: Edit | None = None, where: Tensor | None = None
    ) -> Tensor:
        """Logits [texts, longest, vocabulary] with `edit` applied at the spot to the positions `where`."""
        if spot is None or edit is None or where is None:
            return self._forward(batch, lambda start, end: None)
        span = slice(0, 0)
        given: list[Tensor] = []

        def move(start: int, end: int) -> None:
            nonlocal span
            span = slice(start, end)

        def change(hidden: Tensor, _: dict[str, Any]) -> Tensor:
            here = where[:, span].to(hidden.device)
            if hidden.shape[:2] != here.shape:
                raise HookError(
                    f"activations at {spot.hook.name} are {tuple(hidden.shape[:2])}, the batch is {tuple(here.shape)}"
                )
            if spot.read == spot.hook:
                return edit(hidden, here, hidden)
            if not given:
                raise HookError(f"{spot.hook.name} came before {spot.read.name}, which it is predicted from")
            return edit(hidden, here, given.pop())

        with ExitStack() as stack:
            if spot.read != spot.hook:
                stack.enter_context(read_hook(self.model, spot.read, given.append))
            stack.enter_context(edit_hook(self.model, spot.hook, change))
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
                input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
            )
            cache = answer.past_key_values
            out.append(answer.logits)
        return torch.cat(out, dim=1)

    def norms(self, batch: Batch, hooks: Iterable[HookPoint]) -> tuple[Tensor, dict[HookPoint, np.ndarray]]:
        """Logits of the untouched model, and the norms [texts, longest] of the activations at hook points."""
        seen: dict[HookPoint, list[Tensor]] = {hook: [] for hook in hooks}
        with ExitStack() as stack:
            for hook, parts in seen.items():
                see = lambda hidden, parts=parts: parts.append(hidden.float().norm(dim=-1).cpu())  # noqa: E731
                stack.enter_context(read_hook(self.model, hook, see))
            logits = self.logits(batch)
        return logits, {hook: torch.cat(parts, dim=1).numpy() for hook, parts in seen.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def mask_of(scope: Scope, batch: Batch, norms: np.ndarray | None = None) -> Tensor:
    """Which real tokens of a batch belong to a scope. [texts, longest] bool"""
    shape = batch.mask.shape
    labels = batch.labels if norms is None else {**batch.labels, NORM: norms}
    flat = {name: column.reshape(-1) for name, column in labels.items()}
    return torch.from_numpy(scope.mask(flat, batch.mask.numel())).reshape(shape) & batch.mask


def means_at(
    model: nn.Module, spots: Iterable[Spot], work: list[Batch], given: Tensor | Mapping[str, Tensor] | None
) -> dict[Spot, Tensor]:
    """The vector of the mean ablation at each spot: as given, or the mean over the replaced positions of the texts."""
    out: dict[Spot, Tensor] = {}
    sums: dict[Spot, tuple[Tensor, int]] = {}
    for spot in sorted(spots, key=lambda spot: (spot.hook, spot.read, spot.scope.name)):
        vector = given.get(spot.hook.name) if isinstance(given, Mapping) else given
        if vector is not None:
            out[spot] = vector
        else:
            sums[spot] = torch.zeros(()), 0
    for batch in work if sums else ():
        hooks = dict.fromkeys(hook for spot in sums for hook in (spot.hook, spot.read))
        found = capture(model, batch.ids, batch.mask, list(hooks))
        for spot, (total, n) in sums.items():
            rows = found[spot.hook.name]  # [real tokens, d]
            norms = np.zeros(tuple(batch.mask.shape), dtype=np.float32)
            norms[batch.mask.numpy()] = found[spot.read.name].float().norm(dim=1).cpu().numpy()
            chosen = rows[mask_of(spot.scope, batch, norms)[batch.mask].to(rows.device)]
            sums[spot] = total.to(rows.device) + chosen.double().sum(0), n + len(chosen)
    for spot, (total, n) in sums.items():
        if not n:
            raise DataError("no position is replaced", hint="no token of these texts is in the scope that is")
        out[spot] = total / n
    for spot, vector in out.items():
        if not bool(torch.isfinite(vector).all()):
            raise DataError(
                f"the activations at {spot.hook.name} hold NaN or infinity", hint="check the model's weights"
            )
    return out


def _replace_by_sae(sae: SAE) -> Edit:
    def edit(hidden: Tensor, where: Tensor, given: Tensor) -> Tensor:
        out = hidden.clone()
        # only real tokens reach the SAE: a batch rule must not rank padding
        out[where] = sae(given[where].to(sae.device)).to(hidden)
        return out

    return edit


def _replace_by_vector(vector: Tensor) -> Edit:
    def edit(hidden: Tensor, where: Tensor, _: Tensor) -> Tensor:
        return torch.where(where[..., None], vector.to(hidden), hidden)

    return edit


class SumsByText:
    """Summed losses per text, by (what was run, scope of the predicted token)."""

    def __init__(self, texts: int):
        self.texts = texts
        self.by: dict[Any, np.ndarray] = {}

    def add(self, key: Any, text: np.ndarray, values: np.ndarray | float) -> None:
        """Add values [tokens] to the texts they belong to."""
        np.add.at(self.of(key), text, values)

    def of(self, key: Any) -> np.ndarray:
        """[texts]"""
        return self.by.setdefault(key, np.zeros(self.texts))


def run_all(
    runner: Runner,
    pairs: Mapping[str, tuple[SAE, Spot]],
    means: Mapping[Spot, Tensor],
    work: list[Batch],
    texts: int,
    scopes: Sequence[Scope],
    task: Task,
) -> SumsByText:
    """Losses of the clean run, the ablations at each spot and every SAE, by text and by scope of what is predicted."""
    sums = SumsByText(texts)
    edits: dict[Any, tuple[Spot, Edit]] = {}
    for spot, vector in means.items():
        edits["mean", spot] = (spot, _replace_by_vector(vector))
        edits["zero", spot] = (spot, _replace_by_vector(torch.zeros_like(vector)))
    for label, (sae, spot) in pairs.items():
        edits["sae", label] = (spot, _replace_by_sae(sae))
    hooks = dict.fromkeys(spot.read for spot in means)
    for batch in work:
        text, place = batch.mask[:, 1:].nonzero(as_tuple=True)
        which = batch.which[text].numpy()
        targets = batch.ids[text, place + 1]
        logits, norms = runner.norms(batch, hooks)
        clean = logits[text.to(logits.device), place.to(logits.device)]
        del logits
        # a token belongs to the scope of the token that is predicted; norms are those where the SAE reads
        inside = {
            (hook, scope.name): mask_of(scope, batch, norms[hook])[text, place + 1].numpy()
            for hook in hooks
            for scope in scopes
        }

        def put(
            key: Any, hook: HookPoint, values: np.ndarray | float, which: Any = which, inside: Any = inside
        ) -> None:
            for scope in scopes:
                keep = inside[hook, scope.name]
                chosen = values[keep] if isinstance(values, np.ndarray) else values
                sums.add((key, scope.name), which[keep], chosen)

        nll, _ = _losses(clean, None, targets)
        for hook in hooks:
            put(("n", hook), hook, 1.0)
            put(("clean", hook), hook, nll)
        for key, (spot, edit) in edits.items():
            logits = runner.logits(batch, spot, edit, mask_of(spot.scope, batch, norms[spot.read]))
            nll, kl = _losses(logits[text.to(logits.device), place.to(logits.device)], clean, targets)
            del logits
            if not (np.isfinite(nll).all() and np.isfinite(kl).all()):
                raise DataError(
                    f"the loss is NaN or infinite in the {key[0]} run at {spot.name}",
                    hint="check the SAE's weights, and the model's dtype: float16 overflows where bfloat16 does not",
                )
            put((*key, "ce"), spot.read, nll)
            put((*key, "kl"), spot.read, kl)
        task.advance(len(batch.which))
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
