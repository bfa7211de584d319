"""Features turned up: which, on what, and how often their word is said beside random features and directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hubsae.core.sae import SAE
from hubsae.evals import steering
from hubsae.evals.steering import UNSTEERED, SteeringResult
from hubsae.index.features import FeatureIndex

from .settings import SteeringSettings

LEAST_PURITY, LEAST_WORD = 0.8, 4


def steered(
    model: Any, tokenizer: Any, sae: SAE, index: FeatureIndex, chats: Sequence[Any], how: SteeringSettings, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Tables: every dose and its response, a verdict per feature, some of the texts; and how many prompts it rests on.

    `chats` are conversations whose first questions are asked.
    """
    words = words_of(index, how.features, sae.W_dec.detach().norm(dim=1).tolist())
    peaks = index.metrics["max"].to_pylist()
    chosen = steering.directions(
        sae, {f: steering.tokens_of(tokenizer, [word]) for f, word in words.items()}, controls=how.controls,
        maxima={f: peaks[f] for f in words}, pool=[f for f, peak in enumerate(peaks) if peak > 0], seed=seed,
    )  # fmt: skip
    result = steering.dose_response(
        model, tokenizer, questions(chats, tokenizer, how.prompts, how.prompt_length), chosen, how.strengths,
        max_new_tokens=how.new_tokens, rows_at_once=how.rows_at_once, seed=seed,
    )  # fmt: skip
    named = {f"feature {f}": word for f, word in words.items()}
    tables = {
        "dose_response": [row.flat() for row in result.rows()],
        "steering": [{"feature": r.feature, "word": named[r.feature], **r._asdict()} for r in result.reliability()],
        "steered_texts": examples(result, named),
    }
    return tables, len(result.prompts)


def words_of(index: FeatureIndex, count: int, norms: Sequence[float]) -> dict[int, str]:
    """Features that fire on one whole word, with the word: those that add most at their strongest, one per word.

    `norms` are those of the decoder rows. Where too few fire so, features whose strongest token is anything follow.
    """
    known = {name: index.metrics[name].to_pylist() for name in ("purity", "count", "top_token", "max")}
    readable = index.readable() or [f for f, n in enumerate(known["count"]) if n]

    def rank(feature: int) -> tuple[bool, float]:
        token = known["top_token"][feature] or ""
        pure = (known["purity"][feature] or 0) >= LEAST_PURITY
        whole = token.startswith(" ") and token.strip().isalpha() and len(token.strip()) >= LEAST_WORD
        return not (pure and whole), -known["max"][feature] * norms[feature]

    found: dict[str, int] = {}
    for feature in sorted(readable, key=rank):
        word = (known["top_token"][feature] or "").strip().lower()
        if word and known["max"][feature] > 0 and len(found) < count:
            found.setdefault(word, feature)
    return {feature: word for word, feature in found.items()}


def questions(chats: Sequence[Any], tokenizer: Any, count: int, longest: int) -> list[Any]:
    """First questions of conversations that are short enough to be asked many times."""
    found = []
    for chat in chats:
        asked = next((m for m in chat["messages"] if m.get("role", m.get("from")) in ("user", "human")), None)
        text = "" if asked is None else asked.get("content", asked.get("value", ""))
        if text and len(tokenizer(text)["input_ids"]) <= longest:
            found.append([{"role": "user", "content": text}])
        if len(found) == count:
            break
    return found


def examples(result: SteeringResult, words: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was written to the first prompt: unsteered, and under each feature at each strength."""
    rows = []
    for name, word in words.items():
        before = {"feature": name, "word": word, "prompt": result.prompts[0]}
        rows.append({**before, "strength": 0.0, "text": result.texts[UNSTEERED, 0.0][0]})
        rows += [{**before, "strength": s, "text": result.texts[name, s][0]} for s in result.strengths]
    return rows
