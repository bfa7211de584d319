"""The quick tiny world, built once and kept between test runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubsae.recipes.tiny import TinyWorld, tiny_world


@pytest.fixture(scope="session")
def world_cache(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("hubsae-tiny"))  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def quick_world(world_cache: Path) -> TinyWorld:
    return tiny_world("quick", cache=world_cache)
