"""Turn what people have (texts, prompts, chats, token ids) into token sequences that know which part was the prompt.

    text, {"text"}, {"prompt", "response"}, {"messages"}, {"input_ids", "prompt_length"}, (prompt, response), [ids]
        -> Sample(ids, prompt_length)

A prompt and its response are tokenised together and divided by character offsets, because the tokens of a whole are
not always the tokens of its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from hubsae.activations.groups import COLUMNS, ChatLayout, no_groups
from hubsae.core.errors import ConfigError, DataError
from hubsae.core.extras import require
from hubsae.core.scopes import Scope
from hubsae.core.text import MESSAGE_KEYS, PROMPT_KEYS, RESPONSE_KEYS, TEXT_KEYS

Mode = Literal["text", "prompt", "prompt+response", "generate", "packed"]
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""Names of ShareGPT for the roles that templates know."""
MODES: tuple[Mode, ...] = ("text", "prompt", "prompt+response", "generate", "packed")
Select = Literal["all", "prompt", "response", "assistant"]


@dataclass
class Sample:
    """One sequence to run the model on."""

    id: int
    ids: list[int]
    prompt_length: int
    """Tokens that belong to the prompt, the first ones."""
    truncated: bool = False
    item: Any = None
    """What it was made from, for scorers."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Values of extra columns: one for the sample, or one per token."""

    def labels(self, special: np.ndarray | None = None, extra: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """The label columns [tokens]: the four every dataset has, `is_special` where known, and the `extra` ones.

        `special` are the ids of special tokens, sorted.
        """
        rows = len(self.ids)
        position = np.arange(rows)
        found = {
            "token_id": np.asarray(self.ids, dtype=np.int64),
            "position": position,
            "sample_id": np.full(rows, self.id),
            "is_prompt": position < self.prompt_length,
        }
        if special is not None:
            # np.isin sorts both sides, which takes longer than all else here
            at = np.searchsorted(special, found["token_id"])
            found["is_special"] = np.append(special, -1)[at] == found["token_id"]
        for name in extra:
            value = self.columns[name]
            found[name] = value if isinstance(value, np.ndarray) else np.full(rows, value)
        return found

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.ids = self.ids[:length]
        self.prompt_length = min(self.prompt_length, length)
        self.columns = {k: v[:length] if isinstance(v, np.ndarray) else v for k, v in self.columns.items()}


class BadSample(NamedTuple):
    """A sample that cannot be used."""

    id: int
    why: str


def kept_rows(labels: Mapping[str, np.ndarray], select: Select, exclude: Scope) -> np.ndarray:
    """Which tokens [tokens] of a sample are stored."""
    keep = exclude.mask(labels, rows=len(labels["token_id"]))
    if select == "assistant":
        return keep & labels["is_assistant"]
    return keep if select == "all" else keep & (labels["is_prompt"] == (select == "prompt"))


@dataclass(frozen=True)
class Preparation:
    """How items become samples."""

    mode: Mode = "text"
    max_length: int | None = None
    chat: bool | None = None
    """Use the tokenizer's chat template; None: yes in the prompt modes."""
    system: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    text_column: str | None = None
    special_tokens: bool = True
    """Let the tokenizer add its own (BOS, say) to raw text."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    separate: bool = True
    """packed: put the tokenizer's end of text behind each text."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"no mode {self.mode!r}", hint=f"choose from {', '.join(MODES)}")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length {self.max_length} leaves no token")
        if self.mode == "packed" and self.max_length is None:
            raise ConfigError("packed blocks need a length", hint="pass max_length, such as 1024")

    @property
    def chats(self) -> bool:
        """Whether texts go through the chat template."""
        return self.mode not in ("text", "packed") and self.chat is not False


class Preparer:
    """Turns items into samples; what cannot be used is set aside by name, or stops the run where `strict`."""

    def __init__(self, tokenizer: Any, how: Preparation, *, strict: bool = False):
        self.tokenizer, self.how, self.strict = tokenizer, how, strict
        self.layout = ChatLayout(tokenizer, how.template_options) if how.chats and tokenizer is not None else None
        self.used = 0

    @property
    def columns(self) -> dict[str, str]:
        """Names and types of the label columns that the samples carry beside the usual four."""
        return dict(COLUMNS) if self.layout is not None else {}

    def prepare(self, items: Sequence[Any], first_id: int) -> tuple[list[Sample], list[BadSample]]:
        """One window of items, numbered from `first_id`."""
        samples, bad, first_error = [], [], None
        for number, item in enumerate(items, start=first_id):
            try:
                sample = self._one(item, number)
            except DataError as error:
                if self.strict:
                    raise
                first_error = first_error or error
                bad.append(BadSample(number, error.message.removeprefix(f"sample {number} ")))
                continue
            if self.how.max_length is not None and len(sample.ids) > self.how.max_length:
                sample.cut(self.how.max_length)
                sample.truncated = True
            samples.append(sample)
        self.used += len(samples)
        if first_error is not None and not self.used:
            raise first_error  # nothing fits: it is not the sample that is wrong
        return samples, bad

    def _one(self, item: Any, number: int) -> Sample:
        how, tokenizer = self.how, self.tokenizer
        ids = token_ids(item)
        if ids is not None:
            sample = Sample(number, ids[0], ids[1] if how.mode not in ("text", "packed") or ids[1] else 0, item=item)
            if how.mode in ("prompt", "generate"):
                sample.ids = sample.ids[: sample.prompt_length] if sample.prompt_length else sample.ids
                sample.prompt_length = len(sample.ids)
            return self._labelled(sample)
        if tokenizer is None:
            raise ConfigError("texts need a tokenizer", hint="pass tokenizer=, or token ids instead of texts")
        if how.mode in ("text", "packed"):
            text = item if isinstance(item, str) else _field(item, how.text_column, TEXT_KEYS, "text")
            if not isinstance(text, str):
                raise DataError(f"sample {number} holds {type(text).__name__} where a text should be")
            return Sample(
                number, list(tokenizer(text, add_special_tokens=how.special_tokens)["input_ids"]), 0, item=item
            )
        messages = conversation(item, how)
        if not messages:
            raise DataError(f"sample {number} is an empty chat")
        if any(not isinstance(m["content"], str) or not isinstance(m["role"], str) for m in messages):
            raise DataError(f"sample {number} has a message without text or role")
        if how.mode in ("prompt", "generate"):
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            if not asked:
                raise DataError(f"sample {number} has no prompt")
            text = self._render(asked, number, ask=True) if how.chats else _plain(asked)
            found, offsets = _tokens(tokenizer, text, not how.chats and how.special_tokens)  # a template writes its own
            sample = Sample(number, found, len(found), item=item)
            return self._labelled(sample, asked, text, offsets, ask=True)
        if messages[-1]["role"] != "assistant":
            if any(m["role"] == "assistant" for m in messages) or len(messages) > 1:
                raise DataError(f"sample {number} ends with a turn of {messages[-1]['role']}: there is no response")
            raise DataError(
                f"sample {number} has no response",
                hint=f"name its column with response_column=, or use one of {', '.join(RESPONSE_KEYS)}; "
                "mode='prompt' takes prompts alone",
            )
        if not messages[:-1]:
            raise DataError(f"sample {number} has no prompt")
        if how.chats:
            return self.chat(messages, number, item)
        prompt = _plain(messages[:-1])
        found, count, _ = divide(tokenizer, prompt + messages[-1]["content"], len(prompt), add=how.special_tokens)
        return Sample(number, found, count, item=item)

    def chat(self, messages: Sequence[Mapping[str, str]], number: int = 0, item: Any = None) -> Sample:
        """A whole chat as it stands, with its groups of tokens; its prompt is what precedes the last answer."""
        text = self._render(messages, number, ask=False)
        answered = messages[-1]["role"] == "assistant" and len(messages) > 1
        prompt = self._render(messages[:-1], number, ask=True) if answered else text
        # a template may end its prompt otherwise than it begins the answer
        found, count, offsets = divide(self.tokenizer, text, _common_prefix(prompt, text), add=False)
        return self._labelled(Sample(number, found, count, item=item), messages, text, offsets)

    def _labelled(
        self,
        sample: Sample,
        messages: Sequence[Mapping[str, str]] = (),
        text: str = "",
        offsets: list[tuple[int, int]] | None = None,
        *,
        ask: bool = False,
    ) -> Sample:
        """The sample with its groups of tokens; where they cannot be told, its tokens are of no turn."""
        if self.layout is not None:
            groups = self.layout.label(messages, text, offsets, ask=ask) if offsets else None
            sample.columns |= groups or no_groups(len(sample.ids))
        return sample

    def _render(self, messages: Sequence[Mapping[str, str]], number: int, *, ask: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            raise ConfigError(
                f"the tokenizer {name} has no chat template",
                hint="take the instruct model's tokenizer, or pass chat=False (--raw): texts joined as they are",
            )
        jinja2 = require("jinja2", extra="train")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, **dict(self.how.template_options)
            )
        except jinja2.TemplateError as error:  # roles that it does not take, say
            raise DataError(f"sample {number} is refused by the chat template: {error}") from error


def token_ids(item: Any) -> tuple[list[int], int] | None:
    """Ids and prompt length of an item that is tokenised already, else None."""
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            return None
        ids = [int(i) for i in item["input_ids"]]
        return ids, int(item.get("prompt_length", item.get("prompt_len", 0)) or 0)
    if isinstance(item, (str, bytes)):
        return None
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], int) and not isinstance(item[0], (int, str)):
        return [int(i) for i in item[0]], item[1]
    if hasattr(item, "tolist") or (
        isinstance(item, Sequence) and len(item) and all(isinstance(i, int) for i in item[:8])
    ):
        values: Any = item.tolist() if hasattr(item, "tolist") else item  # pyright: ignore[reportAttributeAccessIssue]
        return [int(i) for i in values], 0
    return None


def conversation(item: Any, how: Preparation) -> list[dict[str, str]]:
    """The messages of an item; the last one is the assistant's where there is a response."""
    if isinstance(item, str):
        found = [{"role": "user", "content": item}]
    elif isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(p, str) for p in item):
        found = [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
    elif isinstance(item, (tuple, list)) and item and isinstance(item[0], Mapping):
        found = [dict(m) if "role" in m else _message(m) for m in item]
    elif isinstance(item, Mapping) and (
        key := next((k for k in MESSAGE_KEYS if k in item and not isinstance(item[k], str)), None)
    ):
        found = [_message(m) for m in item[key] or []]
    else:
        prompt = _field(item, how.prompt_column, PROMPT_KEYS, "prompt")
        found = [dict(m) for m in prompt] if not isinstance(prompt, str) else [{"role": "user", "content": str(prompt)}]
        response = _field(item, how.response_column, RESPONSE_KEYS, "response", required=False)
        if isinstance(response, str):
            found.append({"role": "assistant", "content": response})
        elif isinstance(response, (list, tuple)) and response and isinstance(response[0], Mapping):
            found += [dict(m) for m in response]
    if how.system is not None and found and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": how.system})
    return found


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT's, or a message as it is."""
    role = turn.get("role", turn.get("from"))
    return {"role": ROLES.get(role, role), "content": turn.get("content", turn.get("value"))}


def _field(item: Any, wanted: str | None, names: Sequence[str], what: str, *, required: bool = True) -> Any:
    if not isinstance(item, Mapping):
        raise DataError(f"cannot find a {what} in {type(item).__name__}")
    if wanted is not None and wanted in item:
        return item[wanted]
    if wanted is None and (name := next((n for n in names if n in item), None)) is not None:
        return item[name]
    if not required and wanted is None:
        return None
    raise DataError(
        f"the data has no column {wanted!r}" if wanted else f"cannot tell which column holds the {what}",
        hint=f"its columns are {', '.join(map(str, item))}; name one with {what}_column=",
    )


def _plain(messages: Iterable[Mapping[str, str]]) -> str:
    return "\n".join(m["content"] for m in messages)


def _common_prefix(a: str, b: str) -> int:
    """Characters both begin with; a template may end its prompt otherwise than it begins the answer."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tokens(tokenizer: Any, text: str, add: bool) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Token ids and the characters each spans, where the tokenizer can say that."""
    if not getattr(tokenizer, "is_fast", False):
        return list(tokenizer(text, add_special_tokens=add)["input_ids"]), None
    found = tokenizer(text, add_special_tokens=add, return_offsets_mapping=True)
    return list(found["input_ids"]), list(found["offset_mapping"])


def divide(tokenizer: Any, text: str, at: int, *, add: bool) -> tuple[list[int], int, list[tuple[int, int]] | None]:
    """Tokens of `text`, how many of them begin before character `at`, and what each spans where that is known."""
    ids, offsets = _tokens(tokenizer, text if getattr(tokenizer, "is_fast", False) else text[:at], add)
    if offsets is None:
        return ids + list(tokenizer(text[at:], add_special_tokens=False)["input_ids"]), len(ids), None
    # a special token that the tokenizer adds spans no text; at the front it belongs to the prompt
    count = next((n for n, (start, stop) in enumerate(offsets) if start >= at and stop > start), len(ids))
    return ids, count, offsets


def pack(samples: Iterable[Sample], block: int, separator: int | None) -> Iterator[list[int]]:
    """Blocks of exactly `block` tokens out of a stream of samples; the last, shorter one comes too."""
    held: list[int] = []
    for sample in samples:
        held += sample.ids + ([separator] if separator is not None else [])
        while len(held) >= block:
            yield held[:block]
            held = held[block:]
    if held:
        yield held
