"""A byte-level BPE tokenizer with a ChatML template, trained on the spot; digits stay single tokens.

It has the special tokens of Qwen2: `<|im_end|>` ends a turn (and is EOS), `<|endoftext|>` pads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hubsae.core.extras import require

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Any:
    """Train the tokenizer on `texts`; the same texts give the same tokenizer.

    >>> tokenizer = train_tokenizer(["user", "Ann has 12 apples"] * 4, vocab_size=280)
    >>> tokenizer.decode(tokenizer("Ann has 12").input_ids)
    'Ann has 12'
    """
    tokenizers = require("tokenizers", extra="train")
    transformers = require("transformers", extra="train")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer
