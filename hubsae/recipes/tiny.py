"""The tiny world: a Qwen2-architecture model that has learned to solve word problems, made on the spot, offline.

    rules -> problems -> tokenizer -> model -> supervised warm-up -> stages on disk

It stands in for a real model and real data wherever a recipe, the demo or a test needs them: the model folder is an
ordinary transformers checkpoint, the problems have the layout of GSM8K, and every stage of the warm-up is kept, so
that there are real checkpoints to compare. Made of nothing but a seed, it is the same every time on one machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hubsae.core.errors import ConfigError
from hubsae.core.extras import require
from hubsae.core.files import write_csv_atomic
from hubsae.core.quiet import quiet
from hubsae.recipes.tiny_problems import Problem, draw_style, make_problems, styled_answer
from hubsae.recipes.tiny_tokenizer import train_tokenizer
from hubsae.recipes.worlds import World, build_once, cache_root, prompt_ids, write_record
from hubsae.rl.warmup import AnswerBatch, answer_batch, answer_loss

FORMAT = 1
"""Raised when the same config would no longer give the same world."""

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, text)`."""


@dataclass(frozen=True)
class TinyConfig:
    """Everything a tiny world depends on."""

    size: str = "tiny"
    seed: int = 0
    hidden: int = 64
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 192
    vocab: int = 416
    train_problems: int = 6000
    test_problems: int = 512
    largest: int = 12
    """Largest number in a question."""
    two_step: float = 0.5
    """Share of problems with two operations."""
    steps: int = 600
    batch: int = 64
    lr: float = 3e-3
    prompt_weight: float = 0.1
    """Weight of the loss on prompt tokens; above 0, so that cross-entropy on prompts means something."""
    keep_steps: tuple[int, ...] = (0, 100, 300, 600)
    """Warm-up steps whose checkpoints are kept as stages."""

    def key(self) -> str:
        """A short hash of the config and of what else decides the numbers."""
        about = {"format": FORMAT, "torch": torch.__version__, **asdict(self)}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


# measured on one core: "tiny" takes 78 CPU seconds and ends with 13 % of held-out answers right for a strict scorer
# and 68 % right when the last number counts; "quick" takes 11 and ends with 16 % and 52 %
SIZES = {
    "tiny": TinyConfig(),
    "quick": TinyConfig(
        size="quick", ffn=128, train_problems=1500, test_problems=256, largest=6, two_step=0.0,
        steps=200, batch=32, lr=6e-3, keep_steps=(0, 40, 100, 200),
    ),
}  # fmt: skip


class TinyWorld(World):
    """A model, its tokenizer, its problems and the checkpoints of its warm-up.

    >>> world = tiny_world("quick")                                     # doctest: +SKIP
    >>> world.tokenizer.decode(world.prompt_ids(world.test_problems[0]))  # doctest: +SKIP
    '<|im_start|>user\\nKim has 4 cards and gets 3 more. How many cards now?<|im_end|>\\n<|im_start|>assistant\\n'
    """

    base_model = None

    def __init__(self, config: TinyConfig, folder: Path, train: list[Problem], test: list[Problem]):
        self.config, self.folder = config, folder
        self.model_id = f"local/hubsae-{config.size}"
        self.train_problems, self.test_problems = train, test
        self.train_chats, self.test_chats = ([_chat(p) for p in problems] for problems in (train, test))
        self.train_texts, self.test_texts = (
            [{"text": f"{p.question}\n{p.answer}"} for p in problems] for problems in (train, test)
        )

    @property
    def stages(self) -> dict[str, Path]:
        """Checkpoint folders of the warm-up, by name (`sft_step0`, ...), in order of training."""
        return {f"sft_step{step}": self.folder / "stages" / f"sft_step{step}" for step in self.config.keep_steps}

    @property
    def provenance(self) -> dict[str, Any]:
        """Everything is made by rule, from the seed."""
        return {"made by": "hubsae", "license": "apache-2.0", **asdict(self.config)}


def _chat(problem: Problem) -> dict[str, Any]:
    turns = (("user", problem.question), ("assistant", problem.answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def tiny_world(
    size: str = "tiny",
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> TinyWorld:
    """Build the tiny world of `size` ("tiny", or "quick" for tests), or open it from the cache.

    `changes` replace fields of the `TinyConfig`. Where the cache cannot be written, the world is built in a
    temporary folder.

    >>> tiny_world("quick").stages["sft_step0"].name    # doctest: +SKIP
    'sft_step0'
    """
    if size not in SIZES:
        raise ConfigError(f"no tiny world of size {size!r}", hint=f"sizes: {', '.join(SIZES)}")
    config = replace(SIZES[size], seed=seed, **changes)
    if config.steps not in config.keep_steps:
        config = replace(config, keep_steps=(*(s for s in config.keep_steps if s < config.steps), config.steps))
    root = Path(cache) if cache is not None else cache_root() / "tiny"
    folder = root / f"{config.size}-seed{config.seed}-{config.key()}"
    folder = build_once(folder, lambda building: _build(config, building, progress))
    return TinyWorld(config, folder, *_problems(config))


@contextmanager
def single_thread() -> Iterator[None]:
    """Run with one torch thread: for models this small more threads only cost (3 to 14 times on a busy machine)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _problems(config: TinyConfig) -> tuple[list[Problem], list[Problem]]:
    every = make_problems(
        config.train_problems + config.test_problems,
        seed=config.seed, largest=config.largest, two_step=config.two_step,
    )  # fmt: skip
    return every[: config.train_problems], every[config.train_problems :]


def _build(config: TinyConfig, folder: Path, progress: Progress | None) -> None:
    """Make the world in `folder`; `world.json` is written last and says that it is whole."""
    train, _ = _problems(config)
    rng = random.Random(f"warm-up-{config.seed}")
    sample = [f"user\n{p.question}\nassistant\n{styled_answer(p, draw_style(rng))}\n" for p in train[:2000]]
    tokenizer = train_tokenizer(sample, vocab_size=config.vocab)
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _new_model(config, tokenizer)
        losses = _warm_up(config, model, tokenizer, train, rng, folder / "stages", progress)
    write_csv_atomic(folder / "warmup.csv", losses)
    write_record(folder, {"format": FORMAT, "torch": torch.__version__, **asdict(config)})


def _new_model(config: TinyConfig, tokenizer: Any) -> Any:
    transformers = require("transformers", extra="train")
    shape = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.Qwen2ForCausalLM(shape)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _warm_up(
    config: TinyConfig,
    model: Any,
    tokenizer: Any,
    problems: list[Problem],
    rng: random.Random,
    stages: Path,
    progress: Progress | None,
) -> list[dict[str, float]]:
    """Teach the model to answer in every style; returns the loss of every tenth step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01, fused=True)
    warm = max(config.steps // 20, 1)
    losses = []
    model.train()
    for step in range(config.steps + 1):
        if step in config.keep_steps:
            with quiet():
                model.save_pretrained(stages / f"sft_step{step}")
            tokenizer.save_pretrained(stages / f"sft_step{step}")
        if step == config.steps:
            break
        # linear warm-up, then linear decay to a twentieth
        share = min((step + 1) / warm, 1 - 0.95 * max(step - warm, 0) / max(config.steps - warm, 1))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * share
        loss = answer_loss(model, _batch(config, tokenizer, rng.sample(problems, config.batch), rng))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 or step == config.steps - 1:
            losses.append({"step": step, "loss": round(float(loss.detach()), 6)})
        if progress is not None:
            progress(step + 1, config.steps, "supervised warm-up of the tiny model")
    return losses


def _batch(config: TinyConfig, tokenizer: Any, problems: list[Problem], rng: random.Random) -> AnswerBatch:
    """Prompt and answer of each problem, in a style drawn for it."""
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    styled = [styled_answer(problem, draw_style(rng)) + tokenizer.eos_token for problem in problems]
    answers = tokenizer(styled, add_special_tokens=False).input_ids
    return answer_batch(list(zip(prompts, answers, strict=True)), tokenizer.pad_token_id, config.prompt_weight)
