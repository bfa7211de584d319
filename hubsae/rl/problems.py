"""Problems as the reinforcement-learning loop takes them: prompt tokens, gold, and the gold that is rewarded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubsae.core.errors import DataError
from hubsae.core.extras import require
from hubsae.core.parquet import arrow, write_table
from hubsae.rl.scorers import gold_of


@dataclass(frozen=True)
class Question:
    """A problem in the layout of GSM8K."""

    question: str
    answer: str


@dataclass(frozen=True)
class PromptStyle:
    """How a question becomes a conversation."""

    system: str = ""
    suffix: str = ""
    """Added after the question, after one space."""

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation that asks `question`.

        >>> PromptStyle(suffix="Answer briefly.").messages("1+1?")
        [{'role': 'user', 'content': '1+1? Answer briefly.'}]
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        user = f"{question} {self.suffix}" if self.suffix else question
        return [*system, {"role": "user", "content": user}]

    def render(self, tokenizer: Any, question: str) -> str:
        """The conversation as text, ending where the answer begins."""
        return tokenizer.apply_chat_template(self.messages(question), add_generation_prompt=True, tokenize=False)


@dataclass(frozen=True)
class Prompt:
    """A rendered problem."""

    ids: list[int]
    gold: str
    rewarded: str
    """What the reward compares with: the gold, or another problem's in the shuffled control."""


def load_questions(source: str | Path, split: str, *, revision: str | None = None) -> list[Question]:
    """Questions and answers of a GSM8K-layout dataset: a Hub dataset, or a folder in its layout."""
    datasets = require("datasets", extra="train")
    data = datasets.load_dataset(str(source), "main", split=split, revision=revision)
    missing = {"question", "answer"} - set(data.column_names)
    if missing:
        raise DataError(
            f"{source} ({split}) has the columns {data.column_names}, not question and answer",
            hint="use a dataset in the layout of openai/gsm8k",
        )
    return [Question(row["question"], row["answer"]) for row in data]


def make_prompts(
    tokenizer: Any,
    questions: Sequence[Question],
    style: PromptStyle,
    *,
    max_prompt: int,
    shuffle_gold_seed: int | None = None,
) -> list[Prompt]:
    """Render the questions; those longer than `max_prompt` tokens are left out, as verl does."""
    texts = [style.render(tokenizer, q.question) for q in questions]
    ids = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    kept = [(row, gold_of(q.answer)) for row, q in zip(ids, questions, strict=True) if len(row) <= max_prompt]
    if not kept:
        raise DataError(
            f"none of {len(questions)} problems fits in {max_prompt} prompt tokens", hint="raise rl.max_prompt"
        )
    golds = [gold for _, gold in kept]
    rewarded = list(golds)
    if shuffle_gold_seed is not None:
        random.Random(shuffle_gold_seed).shuffle(rewarded)
    return [Prompt(row, gold, reward) for (row, gold), reward in zip(kept, rewarded, strict=True)]


def write_verl_parquet(
    path: str | Path, questions: Sequence[Question], style: PromptStyle, *, split: str = "train"
) -> Path:
    """Write questions as the Parquet file that verl's PPO trainer reads, with the gold its reward functions get.

    >>> import tempfile
    >>> write_verl_parquet(Path(tempfile.mkdtemp()) / "train.parquet", [Question("1+1?", "#### 2")], PromptStyle()).name
    'train.parquet'
    """
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": style.messages(q.question),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": gold_of(q.answer)},
            "extra_info": {"split": split, "index": number, "question": q.question, "answer": q.answer},
        }
        for number, q in enumerate(questions)
    ]
    return write_table(Path(path), arrow().Table.from_pylist(rows), compression="snappy")


def batch_of_step(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Which problems step `step` (from 1) uses: epochs in a seeded order, the incomplete last batch dropped.

    A function of its arguments only, so that a resumed run needs no loader state.

    >>> sorted(batch_of_step(6, 3, 1, seed=0) + batch_of_step(6, 3, 2, seed=0))
    [0, 1, 2, 3, 4, 5]
    """
    per_epoch = count // batch
    if per_epoch == 0:
        raise DataError(f"{count} problems do not fill one batch of {batch}", hint="lower rl.prompts")
    epoch, place = divmod(step - 1, per_epoch)
    order = list(range(count))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order[place * batch : (place + 1) * batch]
