"""What a model loses when its activations at a hook point are replaced by an SAE's reconstruction.

Every text runs clean, with the SAE, with one mean vector, and with zeros. Losses are summed over predicted
tokens (never averaged over batches), a token belongs to the scope of the token that is predicted, padding is
neither replaced nor counted nor shown to the SAE, and the interval resamples whole texts.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hubsae.core.errors import ConfigError, DataError, HookError
from hubsae.core.files import write_csv_atomic
from hubsae.core.hooks import HookPoint, edit_hook, read_hook
from hubsae.core.intervene import hook_of
from hubsae.core.metadata import Metric
from hubsae.core.sae import HubSAE
from hubsae.evals import bootstrap
from hubsae.evals.definitions import INTERVAL, Measure, to_metrics
from hubsae.evals.texts import Batch, Tokens, batches, encode_texts

Scope = Literal["all", "prompt", "response"]
Edit = Callable[[Tensor, Tensor], Tensor]
"""(hidden [batch, seq, d], which positions to replace [batch, seq]) -> hidden"""

# Log-probabilities are computed for this many logits at a time.
LOGITS_AT_ONCE = 1 << 24
# Below this a difference of two cross-entropies is rounding and no ratio is taken of it.
NO_EFFECT = 1e-9


@dataclass(frozen=True)
class SpliceResult:
    """Cross-entropy and KL with the activations replaced, by scope."""

    name: str
    hook: str
    scope: str
    """Scope that `value` uses when none is named."""
    measures: list[Measure]
    per_text: list[dict[str, Any]]
    """One row per text and scope: predicted tokens and the summed losses."""
    n_texts: int
    n_skipped: int
    """Texts without a predicted token: empty, all padding, or a single token."""
    n_truncated: int
    replaced: str
    """Which positions were replaced, in words."""

    def get(self, metric: str, scope: str | None = None) -> Measure:
        """A measure by name, in the scope asked for."""
        wanted = scope or self.scope
        for measure in self.measures:
            if measure.name == metric and measure.scope == wanted:
                return measure
        raise DataError(
            f"no {metric!r} in scope {wanted!r}",
            hint=f"scopes: {', '.join(sorted({m.scope for m in self.measures}))}; "
            f"metrics: {', '.join(sorted({m.name for m in self.measures}))}",
        )

    def value(self, metric: str, scope: str | None = None) -> float | None:
        """The value of a measure; None where it is not defined."""
        return self.get(metric, scope).value

    def metrics(self) -> list[Metric]:
        """Entries for metadata.json."""
        return to_metrics(self.measures)

    def rows(self) -> list[dict[str, Any]]:
        """A tidy table: one line per metric and scope."""
        return [
            m.row(sae=self.name, hook=self.hook, replaced=self.replaced, n_texts=self.n_texts) for m in self.measures
        ]

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write splice.csv and splice_per_text.csv into a folder."""
        root = Path(folder)
        return [
            write_csv_atomic(root / "splice.csv", self.rows()),
            write_csv_atomic(root / "splice_per_text.csv", self.per_text),
        ]


def splice(
    model: nn.Module,
    tokenizer: Any,
    sae: HubSAE,
    hook_point: Any,
    texts: Any,
    *,
    scope: Scope = "all",
    name: str | None = None,
    **options: Any,
) -> SpliceResult:
    """Evaluate one SAE inside a transformers decoder model; `splice_many` has the options.

    `tokenizer` may be None where texts are token ids; `hook_point` None takes the one in the SAE's metadata.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hubsae.core.config import SAEConfig
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
    ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2))
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=16, d_sae=64, k=8))
    >>> result = splice(model, None, sae, "layers.0", torch.randint(0, 50, (8, 12)))
    >>> result.get("delta_ce").n_tokens
    88
    """
    label = name or sae.metadata.id or "sae"
    return splice_many(model, tokenizer, {label: (sae, hook_point)}, texts, scope=scope, **options)[label]


def splice_many(
    model: nn.Module,
    tokenizer: Any,
    saes: Mapping[str, HubSAE | tuple[HubSAE, Any]],
    texts: Any,
    *,
    scope: Scope = "all",
    replace: Literal["real", "scope"] = "real",
    keep_position_0: bool = False,
    mean: Tensor | Mapping[str, Tensor] | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    cache_chunk: int | None = None,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = bootstrap.SEED,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, SpliceResult]:
    """Evaluate SAEs one at a time on the same texts; the clean and the ablated runs are shared.

    - `scope`: scope of `result.value(...)`; all scopes the texts allow are reported anyway.
    - `replace`: "real" replaces every real token, "scope" only those inside `scope`.
    - `keep_position_0`: leave the first token of every text as it is.
    - `mean`: the vector (or one per hook name) of the mean ablation; otherwise the mean over the replaced
      positions of these texts.
    - `cache_chunk`: feed this many tokens at a time through a KV cache, as generation does; None runs each
      text in one go. Both give the same numbers up to rounding.
    """
    pairs = {
        label: (item, hook_of(item, None)) if isinstance(item, HubSAE) else (item[0], hook_of(item[0], item[1]))
        for label, item in saes.items()
    }
    if not pairs:
        raise DataError("no SAEs to evaluate")
    encoded, cut = encode_texts(texts, tokenizer, max_length=max_length)
    _check(model, pairs, encoded)
    if scope != "all" and any(t.is_response is None for t in encoded):
        raise DataError(
            f"scope {scope!r} needs to know which tokens are the response",
            hint="give texts as (prompt, response) pairs, as messages, or as input_ids with is_prompt",
        )
    vocabulary = _vocabulary(model) or 1 << 15
    budget = batch_tokens or max(64, min(1 << 13, (1 << 27) // vocabulary))
    runner = _Runner(model, cache_chunk, scope if replace == "scope" else None, keep_position_0)
    with _evaluating(model):
        work = batches(encoded, budget)
        if not work:
            raise DataError("no text has a real token", hint="every row is empty or padding")
        means = _means(runner, {hook for _, hook in pairs.values()}, work, mean)
        sums = _run(runner, pairs, means, work, len(encoded), on_batch)
    where = "every real token" if replace == "real" else f"tokens of the {scope}"
    where += " except position 0" if keep_position_0 else ""
    return {
        label: _result(label, hook, scope, sums, encoded, cut, where, resamples, seed)
        for label, (_, hook) in pairs.items()
    }


# ---- running the model -------------------------------------------------------------------------------------


class _Stop(Exception):
    """Raised inside a forward once the activations have been seen; the rest of the model is not needed."""


class _Runner:
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _means(
    runner: _Runner, hooks: set[HookPoint], work: list[Batch], given: Tensor | Mapping[str, Tensor] | None
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


def _replace_by_sae(sae: HubSAE) -> Edit:
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


class _SumsByText:
    """Summed losses [texts, 2] per kind of run; column 0 predicts prompt tokens, column 1 response tokens."""

    def __init__(self, texts: int):
        self.texts = texts
        self.n = np.zeros((texts, 2))
        self.by: dict[Any, np.ndarray] = {}

    def of(self, key: Any) -> np.ndarray:
        return self.by.setdefault(key, np.zeros((self.texts, 2)))


def _run(
    runner: _Runner,
    pairs: Mapping[str, tuple[HubSAE, HookPoint]],
    means: Mapping[HookPoint, Tensor],
    work: list[Batch],
    texts: int,
    on_batch: Callable[[int], None] | None,
) -> _SumsByText:
    sums = _SumsByText(texts)
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


# ---- checks ------------------------------------------------------------------------------------------------


def _vocabulary(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    table = get() if get is not None else None
    weight = getattr(table, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _check(model: nn.Module, pairs: Mapping[str, tuple[HubSAE, HookPoint]], texts: list[Tokens]) -> None:
    if not hasattr(model, "get_input_embeddings"):
        raise ConfigError(
            f"{type(model).__name__} is not a transformers model", hint="load it with AutoModelForCausalLM"
        )
    vocabulary = _vocabulary(model)
    largest = max((int(t.ids.max()) for t in texts if t.ids.numel()), default=-1)
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            f"a text has token id {largest}, the model's vocabulary has {vocabulary}",
            hint="is this the tokenizer of this model?",
        )
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    model_id = getattr(config, "_name_or_path", "") or ""
    for label, (sae, hook) in pairs.items():
        hook.module_path(model)
        if isinstance(width, int) and width != sae.d_in:
            raise HookError(
                f"the model's activations have width {width}, SAE {label!r} takes {sae.d_in}",
                hint=f"its metadata says it was trained on {sae.metadata.base_model.id or 'an unknown model'}",
            )
        info = sae.metadata.base_model
        trained = getattr(info, "vocab_size", None)
        if isinstance(trained, int) and vocabulary is not None and trained != vocabulary:
            raise ConfigError(
                f"SAE {label!r} was trained on a model with a vocabulary of {trained}, this one has {vocabulary}",
                hint=f"its metadata names {info.id or 'no model'}; load that model and its tokenizer",
            )
        if info.id and model_id and not os.path.exists(model_id) and info.id.lower() != model_id.lower():
            warnings.warn(f"SAE {label!r} was trained on {info.id}, the model is {model_id}", stacklevel=4)


# ---- reading the sums off ----------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[int, ...]] = {"all": (0, 1), "prompt": (0,), "response": (1,)}


def _result(
    label: str,
    hook: HookPoint,
    scope: str,
    sums: _SumsByText,
    texts: list[Tokens],
    cut: int,
    replaced: str,
    resamples: int,
    seed: int,
) -> SpliceResult:
    labelled = all(t.is_response is not None for t in texts)
    series = {
        "n": sums.n,
        "ce_clean": sums.of("clean"),
        **{f"ce_{run}": sums.of((run, hook, "ce")) for run in ("mean", "zero")},
        **{f"kl_{run}": sums.of((run, hook, "kl")) for run in ("mean", "zero")},
        "ce_sae": sums.of(("sae", label, "ce")),
        "kl": sums.of(("sae", label, "kl")),
    }
    measures: list[Measure] = []
    per_text: list[dict[str, Any]] = []
    for name in ("all", "prompt", "response") if labelled else ("all",):
        table = {key: values[:, COLUMNS[name]].sum(1) for key, values in series.items()}
        used = np.flatnonzero(table["n"] > 0)
        if not used.size:
            if name == scope:
                raise DataError(
                    f"no predicted token in scope {scope!r}", hint="texts need at least two tokens, one of them in it"
                )
            continue
        measures += _scope_measures(name, {k: v[used] for k, v in table.items()}, resamples, seed)
        per_text += [
            {"text": int(i), "scope": name, **{key: float(values[i]) for key, values in table.items()}} for i in used
        ]
    total = sums.n.sum(1)
    return SpliceResult(
        name=label,
        hook=hook.name,
        scope=scope,
        measures=measures,
        per_text=per_text,
        n_texts=int((total > 0).sum()),
        n_skipped=int((total == 0).sum()),
        n_truncated=cut,
        replaced=replaced,
    )


def _scope_measures(scope: str, table: dict[str, np.ndarray], resamples: int, seed: int) -> list[Measure]:
    keys = list(table)
    sums = np.stack([table[key] for key in keys], axis=1)
    total = dict(zip(keys, sums.sum(0), strict=True))
    units = sums.shape[0]
    drawn = dict(zip(keys, (bootstrap.weights(units, resamples, seed) @ sums).T, strict=True))
    kind = f"{INTERVAL} over {units} texts"
    n = int(total["n"])
    out: list[Measure] = []

    def put(metric: str, of: Callable[[Mapping[str, Any]], Any], against: str | None = None) -> None:
        if against is not None and abs(total[against] - total["ce_clean"]) <= NO_EFFECT * n:
            note = f"{against} equals ce_clean: the ablation has no effect to recover from"
            out.append(Measure(metric, None, scope, n, None, None, note))
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            interval = bootstrap.percentile_interval(of(drawn)) if units > 1 else None
        out.append(Measure(metric, float(of(total)), scope, n, interval, kind if interval else None))

    for metric in ("ce_clean", "ce_sae", "ce_mean", "ce_zero", "kl", "kl_mean", "kl_zero"):
        put(metric, lambda s, m=metric: s[m] / s["n"])
    put("delta_ce", lambda s: (s["ce_sae"] - s["ce_clean"]) / s["n"])
    for run in ("mean", "zero"):
        ablated = f"ce_{run}"
        put(
            f"frac_recovered_{run}",
            lambda s, a=ablated: (s[a] - s["ce_sae"]) / (s[a] - s["ce_clean"]),
            against=ablated,
        )
    return out
