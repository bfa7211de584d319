"""The quick tiny world, built once and kept between test runs, and the smallest chain that is still a chain."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubsae.recipes.registry import PreparedRun, prepare

SMALL_CHAIN = [
    "model.size=quick",
    "rl.steps=4",
    "rl.save_steps=[2, 4]",
    "rl.prompts=8",
    "rl.responses=2",
    "rl.minibatches=2",
    "rl.micro_batch=16",
    "rl.state_every=1",
    "rl.test_every=4",
    "rl.test_problems=32",
    "rl.max_response=16",
    "harvest.problems=60",
    "harvest.max_new_tokens=16",
    "harvest.layers=[1, 3]",
    "sae.chains=[{name: saes_k8, k: 8, layers: [1, 3]}]",
    "sae.epochs=2",
    "sae.resample_every=null",
    "sae.batch_size=128",
    "evaluation.accuracy_problems=32",
    "evaluation.splice_texts=8",
]


@pytest.fixture(scope="session")
def small_overrides() -> list[str]:
    """The settings of the smallest chain."""
    return SMALL_CHAIN


@pytest.fixture(scope="session")
def small_chain() -> Callable[..., PreparedRun]:
    """Prepare the rl_chain recipe at its smallest."""

    def make(out: Path, variant: str = "strict", *more: str) -> PreparedRun:
        rl = [] if variant == "control" else [o for o in SMALL_CHAIN if o.startswith("rl.")]
        others = [o for o in SMALL_CHAIN if not o.startswith("rl.")]
        return prepare("rl_chain", variant=variant, overrides=[*rl, *others, *more], out=out)

    return make


@pytest.fixture(scope="session")
def strict_run(small_chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = small_chain(tmp_path_factory.mktemp("runs") / "strict")
    run.execute()
    return run.run.path


@pytest.fixture(autouse=True, scope="session")
def _worlds_from_the_cache(cache_root: Path) -> Any:
    before = os.environ.get("HUBSAE_CACHE")
    os.environ["HUBSAE_CACHE"] = str(cache_root)
    yield
    if before is None:
        del os.environ["HUBSAE_CACHE"]
    else:
        os.environ["HUBSAE_CACHE"] = before
