"""Texts for a splice evaluation: token ids, and which of them are the response."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubsae.activations.batching import token_budget_batches
from hubsae.activations.capture import padded
from hubsae.activations.samples import Mode, Preparation, Preparer, conversation
from hubsae.core.errors import DataError
from hubsae.core.files import read_json
from hubsae.core.text import MESSAGE_KEYS, PROMPT_KEYS, RESPONSE_KEYS


@dataclass
class Tokens:
    """One text."""

    ids: Tensor
    """[length] int64, without padding"""
    is_response: Tensor | None
    """[length] bool; None where prompt and response are not told apart"""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """[length] each: what else is known of the tokens, such as is_special or role"""


class Batch(NamedTuple):
    """Texts of similar length, padded on the right: the first `lengths[i]` tokens of a row are real."""

    ids: Tensor
    """[texts, longest]"""
    mask: Tensor
    """[texts, longest] bool"""
    labels: dict[str, np.ndarray]
    """[texts, longest] each, of the names that every text has; scopes look at them"""
    which: Tensor
    """[texts] index of each row in the whole list"""


def encode_texts(texts: Any, tokenizer: Any = None, *, max_length: int | None = None) -> tuple[list[Tokens], int]:
    """Token ids of texts of any accepted kind, and how many were cut at `max_length`.

    A text is a string; a pair (prompt, response); a mapping with `prompt` and `response` (or other names that a harvest
    knows), with chat `messages`, or with `input_ids` (and `attention_mask`, `is_prompt`); or a list or tensor of ids.
    A 2-D tensor, or what a tokenizer returned, is taken row by row.

    >>> encoded, cut = encode_texts([[5, 6, 7], [8, 9]], max_length=2)
    >>> [t.ids.tolist() for t in encoded], cut
    ([[5, 6], [8, 9]], 1)
    """
    out: list[Tokens] = []
    cut = 0
    special = getattr(tokenizer, "all_special_ids", None)
    for number, text in enumerate(_each(texts)):
        tokens = _encode(text, number, tokenizer)
        if max_length is not None and tokens.ids.numel() > max_length:
            cut += 1
            response = tokens.is_response
            tokens.ids = tokens.ids[:max_length]
            tokens.is_response = None if response is None else response[:max_length]
            tokens.labels = {name: column[:max_length] for name, column in tokens.labels.items()}
        tokens.labels = {**_labels(tokens, special), **tokens.labels}
        out.append(tokens)
    if not out:
        raise DataError("no texts to evaluate")
    return out, cut


def _labels(tokens: Tokens, special: Sequence[int] | None) -> dict[str, np.ndarray]:
    ids = tokens.ids.numpy()
    known = {"position": np.arange(len(ids)), "token_id": ids}
    if special is not None:
        known["is_special"] = np.isin(ids, list(special))
    if tokens.is_response is not None:
        known["is_prompt"] = ~tokens.is_response.numpy()
    return known


def _each(texts: Any) -> Iterable[Any]:
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, Tensor):
        return list(texts) if texts.ndim == 2 else [texts]
    # a tokenizer's BatchEncoding is a UserDict and not a dict
    if "input_ids" in texts if isinstance(texts, Mapping) or hasattr(texts, "keys") else False:
        ids = torch.as_tensor(texts["input_ids"])
        if ids.ndim == 1:
            return [dict(texts)]
        keys = [k for k in ("input_ids", "attention_mask", "is_prompt") if k in texts]
        return [{k: torch.as_tensor(texts[k])[i] for k in keys} for i in range(ids.shape[0])]
    return texts


def _encode(text: Any, number: int, tokenizer: Any) -> Tokens:
    """A text as a harvest makes it: strings and pairs as they are, messages through the chat template."""
    keys: Mapping[str, Any] = text if isinstance(text, Mapping) else {}
    if "input_ids" in keys:
        return _encode_ids(text)
    listed = isinstance(text, Sequence) and not isinstance(text, str)
    if isinstance(text, Tensor) or (listed and all(isinstance(item, int) for item in text)):
        return Tokens(torch.as_tensor(text, dtype=torch.int64).reshape(-1).cpu(), None)
    if not keys and not isinstance(text, (str, tuple, list)):
        raise DataError(
            f"cannot read a text from {type(text).__name__}",
            hint="pass strings, (prompt, response) pairs, mappings with prompt and response, or token ids",
        )
    if tokenizer is None:
        raise DataError("texts given as strings need a tokenizer", hint="pass tokenizer=, or token ids")
    chat = any(isinstance(keys[key], (list, tuple)) for key in (*MESSAGE_KEYS, *PROMPT_KEYS) if key in keys)
    chat = chat or (listed and isinstance(text[0], Mapping))
    paired = all(any(key in keys for key in known) for known in (PROMPT_KEYS, RESPONSE_KEYS))
    bare = not chat and (isinstance(text, str) or ("text" in keys and not paired))
    preparer = _preparer(tokenizer, "text" if bare else "prompt+response", chat)
    answered = not bare
    if chat:
        messages = conversation(text, preparer.how)
        if not messages:
            raise DataError(f"text {number} is an empty chat", hint="leave it out")
        if any(not isinstance(message.get(key), str) for message in messages for key in ("role", "content")):
            raise DataError(f"text {number} has a message without role or content", hint="leave it out")
        sample = preparer.chat(messages, number)
        answered = messages[-1]["role"] == "assistant" and len(messages) > 1
    else:
        sample = preparer.prepare([text], number)[0][0]
    response = torch.arange(len(sample.ids)) >= sample.prompt_length if answered else None
    return Tokens(torch.tensor(sample.ids, dtype=torch.int64), response, dict(sample.columns))


def _encode_ids(text: Mapping[str, Any]) -> Tokens:
    ids = torch.as_tensor(text["input_ids"]).reshape(-1).long().cpu()
    mask = text.get("attention_mask")
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool().cpu()
    prompt = text.get("is_prompt")
    response = None if prompt is None else ~torch.as_tensor(prompt).bool().cpu()[keep]
    known = ("input_ids", "attention_mask", "is_prompt")
    more = {name: np.asarray(column) for name, column in text.items() if name not in known}
    labels = {name: column[keep.numpy()] for name, column in more.items() if column.shape == tuple(keep.shape)}
    return Tokens(ids[keep], response, labels)


@lru_cache(maxsize=6)
def _preparer(tokenizer: Any, mode: Mode, chat: bool) -> Preparer:
    """Kept, because it knows the layouts of the chats it has seen."""
    return Preparer(tokenizer, Preparation(mode, chat=chat), strict=True)


def batches(texts: Sequence[Tokens], batch_tokens: int) -> list[Batch]:
    """Texts sorted by length into padded batches of at most `batch_tokens` places each; empty ones are left out."""
    groups = token_budget_batches([t.ids.numel() for t in texts], batch_tokens)
    return [_pad([texts[i] for i in group], group) for group in groups]


def _pad(texts: list[Tokens], which: list[int]) -> Batch:
    # the pad id is never looked at: its positions are masked for attention, loss and splice alike
    ids, mask = padded([t.ids.tolist() for t in texts])
    names = [name for name in texts[0].labels if all(name in text.labels for text in texts)]
    labels = {name: np.zeros(tuple(mask.shape), texts[0].labels[name].dtype) for name in names}
    for row, text in enumerate(texts):
        n = text.ids.numel()
        for name in names:
            if text.labels[name].dtype.kind in "US":
                labels[name] = labels[name].astype(object)
            labels[name][row, :n] = text.labels[name]
    return Batch(ids, mask, labels, torch.tensor(which))


def read_texts(path: str | Path) -> list[Any]:
    """Texts of a file: one per line of a .txt, one JSON value per line of a .jsonl, a list in a .json."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} does not exist", hint="give a .txt, .jsonl or .json file")
    if file.suffix == ".txt":
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if file.suffix == ".json":
        found = read_json(file)
        if not isinstance(found, list):
            raise DataError(f"{file}: expected a list of texts, found {type(found).__name__}")
        return found
    if file.suffix == ".jsonl":
        out = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                try:
                    out.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{file}, line {number}: not JSON ({error})") from error
        return out
    raise DataError(f"cannot read texts from {file.suffix or file.name}", hint="give a .txt, .jsonl or .json file")
