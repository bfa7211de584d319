"""Tiny models, a tokenizer with a chat template, and activation folders for the tests of activations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest_activations import make_qwen


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Results are compared bit for bit between processes, which needs the same order of summation in all."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from hubsae.recipes.tiny_tokenizer import train_tokenizer

    return train_tokenizer(["user assistant system", "Ann has 12 apples and eats 3 of them"] * 8, vocab_size=290)


@pytest.fixture(scope="session")
def tiny_model() -> torch.nn.Module:
    """A Qwen2 model of four layers, random."""
    return make_qwen()


@pytest.fixture(scope="session")
def token_data() -> list[dict[str, Any]]:
    """Samples of 1 to 60 tokens, the first third of each a prompt."""
    rng = np.random.default_rng(0)
    return [
        {"input_ids": rng.integers(3, 290, n).tolist(), "prompt_length": n // 3}
        for n in rng.integers(1, 60, 150).tolist()
    ]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Write `rows` vectors of `d` in samples of 50; the folder and the vectors in the order they were written."""

    def write(rows: int = 3000, d: int = 16, name: str = "acts", **options: Any) -> tuple[Path, torch.Tensor]:
        from hubsae.activations import ActivationWriter

        torch.manual_seed(1)
        x = torch.randn(rows, d) * 3
        x[::50] *= 40
        out = tmp_path / name
        sample, position = np.arange(rows) // 50, np.arange(rows) % 50
        with ActivationWriter(out, d=d, config="layers.6", **options) as writer:
            for start in range(0, rows, 500):
                at = slice(start, start + 500)
                token = np.arange(rows)[at] % 97
                writer.write(x[at], token, position[at], sample[at], position[at] < 10)
        return out, x

    return write
