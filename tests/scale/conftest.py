"""A tiny world on disk for jobs; its activations are several small parts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from worlds import make_activations, make_model, make_release, make_texts, small_parts


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders by name: a model, texts, activations and a release."""
    torch.set_num_threads(1)  # bytes are compared between processes, which needs the same order of summation in all
    root = tmp_path_factory.mktemp("world")
    return {
        "model": make_model(root / "model"),
        "texts": make_texts(root / "texts.txt"),
        "activations": make_activations(root / "acts"),
        "release": make_release(root / "release"),
    }


@pytest.fixture(autouse=True)
def _parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one block, and what other processes need to find the jobs of these tests."""
    from hubsae.evals import passes

    monkeypatch.setattr(passes, "PART_BLOCKS", passes.PART_BLOCKS)  # put back behind each test
    small_parts()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
