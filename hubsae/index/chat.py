"""Chat models that can be asked one question: behind an OpenAI-compatible server, or in this process.

`each_once` asks about many features and keeps every answer, so that a run that was stopped goes on behind the last one.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hubsae.activations.generation import end_ids, generate, pad_id
from hubsae.activations.models import load_model, load_tokenizer
from hubsae.core.errors import HubSAEError
from hubsae.core.progress import progress

Message = dict[str, str]
Chat = Callable[[list[Message]], str]


class ChatError(HubSAEError):
    """A chat model did not answer. What was finished before is kept."""


@dataclass(frozen=True)
class ServerChat:
    """A model behind an OpenAI-compatible address, such as `http://127.0.0.1:8000/v1` of vLLM or llama.cpp."""

    url: str
    model: str
    key: str | None = None
    max_tokens: int = 200
    timeout: float = 120.0
    tries: int = 4

    def __call__(self, messages: list[Message]) -> str:
        """The answer to a conversation; asks again after 429, 5xx and cut lines."""
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        for left in reversed(range(self.tries)):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as why:
                if not left or (why.code < 500 and why.code != 429):
                    raise ChatError(f"{self.url}: {why.code} {why.reason}", hint="run it again to go on") from why
            except (OSError, ValueError, KeyError, IndexError, TypeError) as why:
                if not left:
                    raise ChatError(f"{self.url}: {why}", hint="run it again to go on") from why
            time.sleep(0.25 * 2 ** (self.tries - left))
        raise AssertionError("unreachable")


class LocalChat:
    """A model of transformers in this process, decoding greedily."""

    def __init__(self, model: str, *, device: str | None = None, max_tokens: int = 200):
        self.model_id, self.max_tokens = model, max_tokens
        self.tokenizer, self.model = load_tokenizer(model), load_model(model, device=device)
        self.ends = end_ids(self.model, self.tokenizer)

    def __call__(self, messages: list[Message]) -> str:
        """The answer to a conversation."""
        asked = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(next(self.model.parameters()).device)
        pad = pad_id(self.tokenizer, self.ends)
        with torch.inference_mode():
            out = generate(
                self.model, asked["input_ids"], asked["attention_mask"], self.ends, pad,
                max_new_tokens=self.max_tokens, do_sample=False,
            )  # fmt: skip
        return self.tokenizer.decode(out[0], skip_special_tokens=True)


Answers = dict[int, dict[str, Any]]


def each_once(
    journal: Path, settings: str, features: Sequence[int], ask: Callable[[int, Answers], dict[str, Any]], what: str,
    show: bool | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What `ask` says of each feature, given what is known of the others; a line of the journal each.

    Lines of other settings are passed over, and one that a crash cut off.
    """
    done: Answers = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and row.get("settings") == settings:
                done[row["feature"]] = row
    with progress(what, len(features), "features", show=show) as task, journal.open("a", encoding="utf-8") as kept:
        for feature in features:
            if feature not in done:
                done[feature] = ask(feature, done)
                # a line that a crash cut off ends here
                kept.write(f"\n{json.dumps(done[feature], ensure_ascii=False)}\n")
                kept.flush()
            task.advance()
    return [done[feature] for feature in features]
