"""Whose turn a token is, and what belongs to the template: on the layouts of ChatML, Llama 3, Gemma and Mistral."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch

from hubsae.activations import harvest
from hubsae.activations.groups import ChatLayout
from hubsae.activations.samples import Preparation, Preparer
from hubsae.core.errors import ConfigError
from hubsae.core.scopes import parse


def prepare(items, first, tokenizer, how):
    return Preparer(tokenizer, how, strict=True).prepare(items, first)[0]


# ruff: noqa: E501
# the templates of SmolLM2, Llama 3, Gemma and Mistral, as their tokenizers carry them
TEMPLATES = {
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
}
CHAT = [
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": " Yes, <b>user</b>\n"},
    {"role": "user", "content": "assistant?"},
    {"role": "assistant", "content": "No"},
]
PARTS = {
    "chatml": [
        ("<|im_start|>system\n", "system", -1, "template"), ("You are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face", "system", -1, ""), ("<|im_end|>\n", "system", -1, "template"),
        ("<|im_start|>user\n", "user", 0, "template"), ("user", "user", 0, ""),
        ("<|im_end|>\n", "user", 0, "template"), ("<|im_start|>assistant\n", "assistant", 1, "template"),
        (" Yes, <b>user</b>\n", "assistant", 1, "said"), ("<|im_end|>\n", "assistant", 1, "template said"),
        ("<|im_start|>user\n", "user", 2, "template"), ("assistant?", "user", 2, ""),
        ("<|im_end|>\n", "user", 2, "template"), ("<|im_start|>assistant\n", "assistant", 3, "template"),
        ("No", "assistant", 3, "said"), ("<|im_end|>\n", "assistant", 3, "template said"),
    ],
    "llama3": [
        ("<s><|start_header_id|>user<|end_header_id|>\n\n", "user", 0, "template"), ("user", "user", 0, ""),
        ("<|eot_id|>", "user", 0, "template"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "assistant", 1, "template"),
        ("Yes, <b>user</b>", "assistant", 1, "said"), ("<|eot_id|>", "assistant", 1, "template said"),
        ("<|start_header_id|>user<|end_header_id|>\n\n", "user", 2, "template"), ("assistant?", "user", 2, ""),
        ("<|eot_id|>", "user", 2, "template"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "assistant", 3, "template"),
        ("No", "assistant", 3, "said"), ("<|eot_id|>", "assistant", 3, "template said"),
    ],
    "gemma": [
        ("<s><start_of_turn>user\n", "user", 0, "template"), ("user", "user", 0, ""),
        ("<end_of_turn>\n", "user", 0, "template"), ("<start_of_turn>model\n", "assistant", 1, "template"),
        ("Yes, <b>user</b>", "assistant", 1, "said"), ("<end_of_turn>\n", "assistant", 1, "template said"),
        ("<start_of_turn>user\n", "user", 2, "template"), ("assistant?", "user", 2, ""),
        ("<end_of_turn>\n", "user", 2, "template"), ("<start_of_turn>model\n", "assistant", 3, "template"),
        ("No", "assistant", 3, "said"), ("<end_of_turn>\n", "assistant", 3, "template said"),
    ],
    "mistral": [
        ("<s>[INST] ", "user", 0, "template"), ("user", "user", 0, ""), (" [/INST]", "user", 0, "template"),
        (" Yes, <b>user</b>\n", "assistant", 1, "said"), ("</s>", "assistant", 1, "template said"),
        ("[INST] ", "user", 2, "template"), ("assistant?", "user", 2, ""), (" [/INST]", "user", 2, "template"),
        ("No", "assistant", 3, "said"), ("</s>", "assistant", 3, "template said"),
    ],
}  # fmt: skip


@pytest.fixture
def with_template(tokenizer: Any) -> Any:
    import copy

    def make(name: str) -> Any:
        other = copy.deepcopy(tokenizer)
        other.chat_template = TEMPLATES[name]
        other.bos_token, other.eos_token = "<s>", "</s>"
        return other

    return make


def parts_of(text: str, groups: dict[str, np.ndarray]) -> list[tuple]:
    """The text in stretches of the same labels, one label per character."""
    words = [
        ("template " * bool(t) + "said" * bool(a)).strip()
        for t, a in zip(groups["is_template"], groups["is_assistant"], strict=True)
    ]
    rows = list(zip(text, groups["role"], groups["turn"].tolist(), words, strict=True))
    return [("".join(r[0] for r in run), *key) for key, run in groupby(rows, key=lambda r: r[1:])]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("ask", [False, True])
def test_every_character_of_a_chat_has_its_turn_and_its_side(with_template, name, ask):
    tokenizer = with_template(name)
    chat = CHAT[:3] if ask else CHAT
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
    expected = PARTS[name]
    if ask:  # the answer is not there yet; its head is, where the template has one
        expected = expected[: next(i for i, part in enumerate(expected) if part[1:] == ("assistant", 3, "said"))]
    found = ChatLayout(tokenizer).label(chat, text, [(i, i + 1) for i in range(len(text))], ask=ask)
    assert found is not None
    assert parts_of(text, found) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_that_looks_like_the_template_stays_content(with_template, name):
    tokenizer = with_template(name)
    chat = [{"role": "user", "content": c} if i % 2 == 0 else {"role": "assistant", "content": c}
            for i, c in enumerate(["<|im_end|>\n<|im_start|>user\n", "<|eot_id|>", "[INST] user [/INST]", "</s>"])]  # fmt: skip
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    found = ChatLayout(tokenizer).label(chat, text, [(i, i + 1) for i in range(len(text))])
    assert found is not None
    inside = [t for t, r, n, w in parts_of(text, found) if "template" not in w and n >= 0]
    assert [t.strip() for t in inside] == [m["content"].strip() for m in chat]


def test_a_template_that_changes_what_was_said_is_followed(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] }}</end>{% endfor %}"
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>hm</think>b"},
            {"role": "user", "content": "c"}]  # fmt: skip
    text = other.apply_chat_template(chat, tokenize=False)
    found = ChatLayout(other).label(chat, text, [(i, i + 1) for i in range(len(text))])
    assert found is not None
    assert [t for t, _, _, w in parts_of(text, found) if "template" not in w] == ["a", "b", "c"]


def test_harvest_writes_the_groups_and_select_takes_every_assistant_turn(tmp_path, tiny_model, tokenizer):
    options = {"tokenizer": tokenizer, "mode": "prompt+response", "dtype": "float32", "progress": False}
    every = harvest(tiny_model, [{"messages": CHAT}], [1], out=tmp_path / "a", **options)["layers.1"]
    labels = every.columns()
    said = tokenizer.decode(labels["token_id"][labels["is_assistant"] & ~labels["is_template"]])
    assert said == " Yes, <b>user</b>\nNo"
    # position 0 is itself a delimiter of the template, and told apart from the others
    assert parse("special & not position_0").mask(labels).sum() == parse("special").mask(labels).sum() - 1
    roles = tokenizer.decode(labels["token_id"][parse("template & not special").mask(labels)])
    assert roles.split() == ["user", "assistant", "user", "assistant"]
    some = harvest(tiny_model, [{"messages": CHAT}], [1], out=tmp_path / "b", select="assistant", **options)["layers.1"]
    assert torch.equal(every.read_all()[torch.from_numpy(labels["is_assistant"])], some.read_all())


def test_excluded_groups_are_not_stored(tmp_path, tiny_model, tokenizer):
    options = {"tokenizer": tokenizer, "mode": "prompt+response", "dtype": "float32", "progress": False}
    every = harvest(tiny_model, [{"messages": CHAT}], [1], out=tmp_path / "a", **options)["layers.1"]
    left = harvest(
        tiny_model, [{"messages": CHAT}], [1], out=tmp_path / "b", exclude=["position_0", "template"], **options
    )["layers.1"]
    keep = parse("not position_0 & not template").mask(every.columns())
    assert torch.equal(every.read_all()[torch.from_numpy(keep)], left.read_all())
    assert left.info["exclude"] == ["position_0", "template"]
    with pytest.raises(ConfigError, match="training leaves them out"):
        harvest(tiny_model, [{"messages": CHAT}], [1], out=tmp_path / "c", exclude=["massive"], **options)
    with pytest.raises(ConfigError, match="'is_template'"):
        harvest(tiny_model, ["text"], [1], out=tmp_path / "d", tokenizer=tokenizer, exclude=["template"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_splice_sees_the_tokens_and_groups_that_a_harvest_writes(with_template, name):
    from hubsae.evals.texts import encode_texts

    tokenizer = with_template(name)
    sample = prepare([{"messages": CHAT}], 0, tokenizer, Preparation("prompt+response"))[0]
    found = encode_texts([{"messages": CHAT}], tokenizer)[0][0]
    assert found.ids.tolist() == sample.ids
    assert found.is_response is not None and int((~found.is_response).sum()) == sample.prompt_length
    for column, values in sample.columns.items():
        assert (found.labels[column] == values).all()
    assert not {"role", "turn", "is_template", "is_assistant", "is_special", "position"} - set(found.labels)


def test_chats_of_sharegpt_are_understood(tokenizer):
    item = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
    sample = prepare([item], 0, tokenizer, Preparation("prompt+response"))[0]
    assert tokenizer.decode(sample.ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"


def test_a_generated_answer_is_the_assistants(tmp_path, tiny_model, tokenizer):
    found = harvest(
        tiny_model, ["Ann has 12"], [1], out=tmp_path, tokenizer=tokenizer, mode="generate",
        generation={"max_new_tokens": 5, "do_sample": False}, progress=False,
    )["layers.1"].columns()  # fmt: skip
    assert (found["is_assistant"] == ~found["is_prompt"]).all()
    assert set(found["turn"][found["is_assistant"]]) == {1} and set(found["role"]) == {"user", "assistant"}
