"""What a model loses when its activations at a hook point are replaced by an SAE's reconstruction.

A transcoder reads at its input and replaces at its output; the ablations are those of the output.

Every text runs clean, with the SAE, with one mean vector, and with zeros. Losses are summed over predicted
tokens (never averaged over batches), a token belongs to the scope of the token that is predicted, padding is
neither replaced nor counted nor shown to the SAE, tokens that the SAE's training left out are left alone, and the
interval resamples whole texts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from hubsae.core.errors import ConfigError, DataError, HookError
from hubsae.core.files import write_csv_atomic
from hubsae.core.hooks import HookPoint
from hubsae.core.intervene import hook_of, hook_out_of
from hubsae.core.progress import progress
from hubsae.core.sae import SAE
from hubsae.core.scopes import NORM, parse
from hubsae.evals import bootstrap
from hubsae.evals.definitions import INTERVAL, Measure, Measures
from hubsae.evals.places import check_place
from hubsae.evals.running import Runner, Spot, SumsByText, evaluating, means_at, run_all
from hubsae.evals.texts import Tokens, batches, encode_texts

# Below this a difference of two cross-entropies is rounding and no ratio is taken of it.
NO_EFFECT = 1e-9


@dataclass(frozen=True)
class SpliceResult(Measures):
    """Cross-entropy and KL with the activations replaced, by scope."""

    name: str
    hook: str
    scope: str
    """Taken where none is named."""
    measures: list[Measure]
    per_text: list[dict[str, Any]]
    """One row per text and scope: predicted tokens and the summed losses."""
    n_texts: int
    n_skipped: int
    """Texts without a predicted token: empty, all padding, or a single token."""
    n_truncated: int
    replaced: str
    """Which tokens were replaced: a scope. Padding never is."""

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
    sae: SAE,
    hook_point: Any,
    texts: Any,
    *,
    scope: str | None = None,
    name: str | None = None,
    **options: Any,
) -> SpliceResult:
    """Evaluate one SAE inside a transformers decoder model; `splice_many` has the options.

    `tokenizer` may be None where texts are token ids; `hook_point` None takes the one in the SAE's metadata. A
    transcoder's is a pair, of its input and of its output.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hubsae import HubSAE, SAEConfig
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
    saes: Mapping[str, SAE | tuple[SAE, Any]],
    texts: Any,
    *,
    scope: str | None = None,
    replace: str | None = None,
    scopes: Sequence[str] = (),
    mean: Tensor | Mapping[str, Tensor] | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    cache_chunk: int | None = None,
    seed: int = bootstrap.SEED,
    force: bool = False,
    show: bool | None = False,
) -> dict[str, SpliceResult]:
    """Evaluate SAEs one at a time on the same texts; the clean and the ablated runs are shared.

    - `scope`: scope of `result.value(...)`; otherwise the SAE's own, by its record. All, prompt and response (where
      they are told apart), each SAE's own and those in `scopes` are reported anyway. A token belongs to the scope of
      the token that is predicted.
    - `replace`: the scope of the tokens that are replaced; otherwise those that the SAE is for, by its record: what its
      training left out is left alone. "all" replaces every real token.
    - `mean`: the vector (or one per hook name) of the mean ablation; otherwise the mean over the replaced
      positions of these texts.
    - `cache_chunk`: feed this many tokens at a time through a KV cache, as generation does; None runs each
      text in one go. Both give the same numbers up to rounding.
    - `force`: run an SAE at another layer, or in another model, than its record names.
    """
    pairs = {label: _placed(*((item, None) if isinstance(item, SAE) else item)) for label, item in saes.items()}
    if not pairs:
        raise DataError("no SAEs to evaluate")
    encoded, cut = encode_texts(texts, tokenizer, max_length=max_length)
    _check(model, pairs, encoded, force)
    spots, shown = {}, {}
    for label, (sae, read, hook) in pairs.items():
        bound = sae.metadata.training.massive_above
        own = parse(sae.metadata.own_scope, bound)
        spots[label] = Spot(hook, own if replace is None else parse(replace, bound), read)
        shown[label] = own if scope is None else parse(scope, bound)
    bounds = {sae.metadata.training.massive_above for sae, *_ in pairs.values()}
    known = set.intersection(*(set(t.labels) for t in encoded)) | {NORM}
    usual = [s for s in (parse("all"), parse("prompt"), parse("response")) if set(s.columns) <= known]
    asked = [*shown.values(), *(spot.scope for spot in spots.values()), *(parse(s, next(iter(bounds))) for s in scopes)]
    for one in asked:
        missing = [c for c in one.columns if c not in known]
        if "is_prompt" in missing:
            raise DataError(
                f"scope {one.name!r} needs to know which tokens are the response",
                hint="give texts as (prompt, response) pairs, as messages, or as input_ids with is_prompt",
            )
        if missing:
            raise DataError(
                f"scope {one.name!r} needs {missing[0]!r} of every token, which these texts do not have",
                hint="give texts as input_ids with that column; or choose another scope and replace=",
            )
    wanted = list({one.name: one for one in [*usual, *asked]}.values())
    budget = batch_tokens or max(64, min(1 << 13, (1 << 24) // (_vocabulary(model) or 1 << 15)))
    runner = Runner(model, cache_chunk)
    with evaluating(model), progress(f"splicing {len(pairs)} SAEs", len(encoded), "texts", show=show) as task:
        work = batches(encoded, budget)
        if not work:
            raise DataError("no text has a real token", hint="every row is empty or padding")
        means = means_at(model, set(spots.values()), work, mean)
        placed = {label: (sae, spots[label]) for label, (sae, *_) in pairs.items()}
        sums = run_all(runner, placed, means, work, len(encoded), wanted, task)
    return {
        label: _result(label, spot, shown[label].name, [w.name for w in wanted], sums, cut, seed)
        for label, spot in spots.items()
    }


# ---- checks ------------------------------------------------------------------------------------------------


def _vocabulary(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    table = get() if get is not None else None
    weight = getattr(table, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _placed(sae: SAE, hook: Any) -> tuple[SAE, HookPoint, HookPoint]:
    """An SAE, where it reads, and where its reconstruction goes."""
    if not sae.config.is_transcoder:
        return sae, hook_of(sae, hook), hook_of(sae, hook)
    read, out = hook if isinstance(hook, (tuple, list)) else (hook, None)
    return sae, hook_of(sae, read), hook_out_of(sae, out)


def _check(
    model: nn.Module, pairs: Mapping[str, tuple[SAE, HookPoint, HookPoint]], texts: list[Tokens], force: bool
) -> None:
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
    for label, (sae, read, hook) in pairs.items():
        for point in (read, hook):
            point.module_path(model)
        wrong = next((d for d in (sae.d_in, sae.config.width_out) if d != width), None)
        if isinstance(width, int) and wrong is not None:
            raise HookError(
                f"the model's activations have width {width}, SAE {label!r} takes {wrong}",
                hint=f"its metadata says it was trained on {sae.metadata.base_model.id or 'an unknown model'}",
            )
        info = sae.metadata.base_model
        trained = getattr(info, "vocab_size", None)
        if isinstance(trained, int) and vocabulary is not None and trained != vocabulary:
            raise ConfigError(
                f"SAE {label!r} was trained on a model with a vocabulary of {trained}, this one has {vocabulary}",
                hint=f"its metadata names {info.id or 'no model'}; load that model and its tokenizer",
            )
        if not force:
            check_place(label, sae, read, model_id, hook if sae.config.is_transcoder else None)


# ---- reading the sums off ----------------------------------------------------------------------------------


def _result(
    label: str, spot: Spot, scope: str, names: Sequence[str], sums: SumsByText, cut: int, seed: int
) -> SpliceResult:
    keys = {"n": ("n", spot.read), "ce_clean": ("clean", spot.read)}
    for run in ("mean", "zero"):
        keys |= {f"ce_{run}": (run, spot, "ce"), f"kl_{run}": (run, spot, "kl")}
    keys |= {"ce_sae": ("sae", label, "ce"), "kl": ("sae", label, "kl")}
    measures: list[Measure] = []
    per_text: list[dict[str, Any]] = []
    for name in names:
        table = {column: sums.of((key, name)) for column, key in keys.items()}
        used = np.flatnonzero(table["n"] > 0)
        if not used.size:
            if name == scope:
                raise DataError(
                    f"no predicted token in scope {scope!r}", hint="texts need at least two tokens, one of them in it"
                )
            continue
        measures += _scope_measures(name, {k: v[used] for k, v in table.items()}, seed)
        per_text += [
            {"text": int(i), "scope": name, **{key: float(values[i]) for key, values in table.items()}} for i in used
        ]
    total = sums.of((("n", spot.read), "all"))
    return SpliceResult(
        name=label,
        hook=spot.name,
        scope=scope,
        measures=measures,
        per_text=per_text,
        n_texts=int((total > 0).sum()),
        n_skipped=int((total == 0).sum()),
        n_truncated=cut,
        replaced=spot.scope.name,
    )


def _scope_measures(scope: str, table: dict[str, np.ndarray], seed: int) -> list[Measure]:
    keys = list(table)
    sums = np.stack([table[key] for key in keys], axis=1)
    total = dict(zip(keys, sums.sum(0), strict=True))
    units = sums.shape[0]
    drawn = dict(zip(keys, (bootstrap.weights(units, seed=seed) @ sums).T, strict=True))
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
            f"frac_recovered_{run}", lambda s, a=ablated: (s[a] - s["ce_sae"]) / (s[a] - s["ce_clean"]), against=ablated
        )
    return out
