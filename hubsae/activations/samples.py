"""Turn what people have (texts, prompts, chats, token ids) into token sequences that know which part was the prompt.

    text, {"text"}, {"prompt", "response"}, {"messages"}, {"input_ids", "prompt_length"}, (prompt, response), [ids]
        -> Sample(ids, prompt_length)

A prompt and its response are tokenised together and divided by character offsets, because the tokens of a whole are
not always the tokens of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hubsae.core.errors import ConfigError, DataError

Mode = Literal["text", "prompt", "prompt+response", "generate", "packed"]
MODES: tuple[Mode, ...] = ("text", "prompt", "prompt+response", "generate", "packed")
Select = Literal["all", "prompt", "response"]

PROMPT_KEYS = ("prompt", "question", "problem", "instruction", "input")
RESPONSE_KEYS = ("response", "answer", "completion", "output", "solution")
TEXT_KEYS = ("text", "content", "question", "prompt")
MESSAGE_KEYS = ("messages", "conversations", "conversation")


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

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"no mode {self.mode!r}", hint=f"choose from {', '.join(MODES)}")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length {self.max_length} leaves no token")
        if self.mode == "packed" and self.max_length is None:
            raise ConfigError("packed blocks need a length", hint="pass max_length, such as 1024")


def prepare(
    items: Sequence[Any], first_id: int, tokenizer: Any, how: Preparation, score: Callable[[Sample], None] | None = None
) -> list[Sample]:
    """Tokenise one window of items."""
    samples = []
    for offset, item in enumerate(items):
        sample = _one(item, first_id + offset, tokenizer, how)
        if how.max_length is not None and len(sample.ids) > how.max_length:
            sample.ids = sample.ids[: how.max_length]
            sample.prompt_length = min(sample.prompt_length, how.max_length)
            sample.truncated = True
        if score is not None:
            score(sample)
        samples.append(sample)
    return samples


def _one(item: Any, number: int, tokenizer: Any, how: Preparation) -> Sample:
    ids = token_ids(item)
    if ids is not None:
        sample = Sample(number, ids[0], ids[1] if how.mode not in ("text", "packed") or ids[1] else 0, item=item)
        if how.mode in ("prompt", "generate"):
            sample.ids = sample.ids[: sample.prompt_length] if sample.prompt_length else sample.ids
            sample.prompt_length = len(sample.ids)
        return sample
    if tokenizer is None:
        raise ConfigError("texts need a tokenizer", hint="pass tokenizer=, or token ids instead of texts")
    if how.mode in ("text", "packed"):
        text = item if isinstance(item, str) else _field(item, how.text_column, TEXT_KEYS, "text")
        if not isinstance(text, str):
            raise DataError(f"sample {number}: expected a text, found {type(text).__name__}")
        return Sample(number, list(tokenizer(text, add_special_tokens=how.special_tokens)["input_ids"]), 0, item=item)
    messages = conversation(item, how)
    chat = how.chat if how.chat is not None else True
    if how.mode in ("prompt", "generate"):
        text = render_prompt(tokenizer, messages, how) if chat else _plain(messages[:-1] or messages)
        # a template writes the special tokens itself
        ids_ = list(tokenizer(text, add_special_tokens=not chat and how.special_tokens)["input_ids"])
        return Sample(number, ids_, len(ids_), item=item)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"sample {number} has no response",
            hint=f"name its column with response_column=, or use one of {', '.join(RESPONSE_KEYS)}",
        )
    prompt = render_prompt(tokenizer, messages, how) if chat else _plain(messages[:-1])
    whole = _render(tokenizer, messages, how, add_generation_prompt=False) if chat else prompt + messages[-1]["content"]
    shared = _common_prefix(prompt, whole)
    add = not chat and how.special_tokens
    return Sample(number, *_divide(tokenizer, whole, shared, add_special_tokens=add), item=item)


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
        found = [dict(m) for m in item]
    elif isinstance(item, Mapping) and (key := next((k for k in MESSAGE_KEYS if k in item), None)):
        found = [{"role": m.get("role", m.get("from")), "content": m.get("content", m.get("value"))} for m in item[key]]
    else:
        prompt = _field(item, how.prompt_column, PROMPT_KEYS, "prompt")
        found = [dict(m) for m in prompt] if not isinstance(prompt, str) else [{"role": "user", "content": str(prompt)}]
        response = _field(item, how.response_column, RESPONSE_KEYS, "response", required=False)
        if isinstance(response, str):
            found.append({"role": "assistant", "content": response})
        elif isinstance(response, (list, tuple)) and response and isinstance(response[0], Mapping):
            found += [dict(m) for m in response]
    if how.system is not None and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": how.system})
    return found


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


def render_prompt(tokenizer: Any, messages: list[dict[str, str]], how: Preparation) -> str:
    """The prompt as the model sees it before it answers."""
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return _render(tokenizer, before, how, add_generation_prompt=True)


def _render(tokenizer: Any, messages: list[dict[str, str]], how: Preparation, *, add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} has no chat template",
            hint="take the instruct model's tokenizer, or pass chat=False (--raw): texts joined as they are",
        )
    options = dict(how.template_options)
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
    )


def _plain(messages: Iterable[Mapping[str, str]]) -> str:
    return "\n".join(m["content"] for m in messages)


def _common_prefix(a: str, b: str) -> int:
    """Characters both begin with; a template may end its prompt otherwise than it begins the answer."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _divide(tokenizer: Any, text: str, at: int, *, add_special_tokens: bool) -> tuple[list[int], int]:
    """Tokens of `text` and how many of them begin before character `at`."""
    if not getattr(tokenizer, "is_fast", False):
        head = list(tokenizer(text[:at], add_special_tokens=add_special_tokens)["input_ids"])
        return head + list(tokenizer(text[at:], add_special_tokens=False)["input_ids"]), len(head)
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    # a special token that the tokenizer adds spans no text; at the front it belongs to the prompt
    count = next((n for n, (start, stop) in enumerate(offsets) if start >= at and stop > start), len(ids))
    return ids, count


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
