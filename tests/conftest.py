"""The quick tiny world, built once and kept between test runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def cache_root(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("hubsae"))  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def world_cache(cache_root: Path) -> Path:
    return cache_root / "tiny"


@pytest.fixture(scope="session")
def quick_world(world_cache: Path) -> Any:
    from hubsae.recipes.tiny import tiny_world

    return tiny_world("quick", cache=world_cache)
