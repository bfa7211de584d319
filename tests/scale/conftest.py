"""A tiny world on disk for jobs, and what they leave when they are done in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders by name: a model, texts, activations and a release."""
    from worlds import make_activations, make_model, make_release, make_texts

    torch.set_num_threads(1)  # bytes are compared between processes, which needs the same order of summation in all
    root = tmp_path_factory.mktemp("world")
    return {
        "model": make_model(root / "model"),
        "texts": make_texts(root / "texts.txt"),
        "activations": make_activations(root / "acts"),
        "release": make_release(root / "release"),
    }
