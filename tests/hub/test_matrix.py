"""Publish and load against {Xet, LFS} x {CDN, none}: every kind of repo, then offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubsae import HubSAE, push
from hubsae.hub.client import HubClient
from hubsae.hub.errors import AccessError, OfflineError, RepoNotFoundError
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder, titles

WANTED = {"layer": 12, "stage": "ppo_step10"}


@pytest.fixture(params=[(True, False), (True, True), (False, False), (False, True)],
                ids=["xet", "xet+cdn", "lfs", "lfs+cdn"])  # fmt: skip
def world(
    request: pytest.FixtureRequest, hubs: Callable[..., LocalHub], use: Callable[..., None]
) -> Iterator[LocalHub]:
    xet, cdn = request.param
    running = hubs(xet=xet, cdn=cdn)
    use(running, xet=xet)
    yield running
    running.clear_faults()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return seed_folder(tmp_path / "saes")


def loads(repo: str, **options: object) -> None:
    assert HubSAE.from_pretrained(repo, **WANTED, **options).d_sae == 64


def test_new_then_existing(world: LocalHub, source: Path):
    assert push(source, "me/plain", **ABOUT).committed
    loads("me/plain")
    seed_folder(source, (6,), ("ppo_step10",), seed=2)
    assert push(source, "me/plain", **ABOUT).committed
    loads("me/plain")
    assert len(titles("me/plain")) == 3


def test_private(world: LocalHub, source: Path, use: Callable[..., None]):
    push(source, "me/secret", private=True, **ABOUT)
    loads("me/secret")
    with pytest.raises(RepoNotFoundError, match="no repo me/secret"):
        loads("me/secret", token="hf_other", force_download=True)


def test_gated(world: LocalHub, source: Path):
    push(source, "me/gated", **ABOUT)
    HubClient().api.update_repo_settings("me/gated", gated="manual")
    loads("me/gated", force_download=True)
    with pytest.raises(AccessError, match="gated"):
        loads("me/gated", token="hf_other", force_download=True)


def test_pull_request(world: LocalHub, source: Path):
    push(source, "me/pulled", **ABOUT)
    seed_folder(source, (12,), ("ppo_step10",), seed=2)
    result = push(source, "me/pulled", pr=True, **ABOUT)
    assert len(titles("me/pulled")) == 2
    loads("me/pulled", revision="refs/pr/1")
    HubClient().api.merge_pull_request("me/pulled", 1)
    assert result.published is not None and result.published.revision == "refs/pr/1"
    assert not push(source, "me/pulled", **ABOUT).committed, "main holds it after the merge"


def test_tag_and_other_branch(world: LocalHub, source: Path):
    push(source, "me/branched", revision="dev", tag="v1", **ABOUT)
    loads("me/branched@v1")
    loads("me/branched", revision="dev")
    assert titles("me/branched") == ["initial commit"]


def test_renamed(world: LocalHub, source: Path):
    push(source, "me/before", **ABOUT)
    HubClient().api.move_repo("me/before", "me/after")
    loads("me/before")
    seed_folder(source, (12,), ("ppo_step10",), seed=2)
    result = push(source, "me/before", **ABOUT)
    assert result.plan.repo_id == "me/after" and any("now called me/after" in note for note in result.plan.notes)
    loads("me/after")


def test_offline_afterwards(world: LocalHub, source: Path, monkeypatch: pytest.MonkeyPatch):
    push(source, "me/cached", **ABOUT)
    loads("me/cached")
    requests = len(world.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loads("me/cached")
    with pytest.raises(OfflineError, match=r"layer6.*is not in the cache"):
        HubSAE.from_pretrained("me/cached", layer=6, stage="ppo_step10")
    assert len(world.requests) == requests
