"""Running hubs, seed-like folders and a clean client for the tests of publishing and loading."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hubsae import localhub
from hubsae.core.config import SAEConfig
from hubsae.hub.sae import HubSAE
from hubsae.localhub.settings import Token

# read by hf_xet when its session starts, hence before any test
os.environ.setdefault("HF_XET_CACHE", tempfile.mkdtemp(prefix="hubsae-xet-"))
os.environ.setdefault("HF_XET_CLIENT_RETRY_BASE_DELAY", "20ms")
os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_DURATION", "2s")

TOKENS = ["me=hf_me", "other=hf_other", "reader=hf_reader:read"]
ABOUT = {
    "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
    "hook": "model.layers.{layer}",
    "license": "apache-2.0",
    "check_saelens": False,
}


@pytest.fixture(scope="session")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., localhub.LocalHub]]:
    """Hubs by their switches; each is started once."""
    running: dict[tuple, tuple] = {}

    def get(**switches: bool) -> localhub.LocalHub:
        key = tuple(sorted(switches.items()))
        if key not in running:
            context = localhub.running(
                root=tmp_path_factory.mktemp("hub"), tokens=[Token.parse(t) for t in TOKENS], **switches
            )
            running[key] = (context, context.__enter__())
        return running[key][1]

    yield get
    for context, _ in running.values():
        context.__exit__(None, None, None)


@pytest.fixture
def hub(hubs: Callable[..., localhub.LocalHub], use: Callable[..., None]) -> Iterator[localhub.LocalHub]:
    """A hub with Xet, as its first user."""
    running = hubs()
    use(running)
    yield running
    running.clear_faults()


@pytest.fixture
def lfs_hub(hubs: Callable[..., localhub.LocalHub], use: Callable[..., None]) -> Iterator[localhub.LocalHub]:
    """A hub without Xet, and a client that does not try it."""
    running = hubs(xet=False)
    use(running, xet=False)
    yield running
    running.clear_faults()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Turn this process to a hub: endpoint, token, caches of its own, hardly any waiting."""

    def turn(running: localhub.LocalHub, *, xet: bool = True, token: str = "hf_me") -> None:
        from huggingface_hub import constants

        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setenv("HUBSAE_RETRY_BASE", "0.01")
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)

    return turn


def seed_folder(
    folder: Path,
    layers: tuple[int, ...] = (6, 12),
    stages: tuple[str, ...] = ("instruct_base", "ppo_step10"),
    *,
    d_in: int = 16,
    d_sae: int = 64,
    k: int = 4,
    seed: int = 0,
) -> Path:
    """A folder as the RL chains were published: wrapped state dicts, no ReLU, decoder without b_pre."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for stage in stages:
            decoder = torch.randn(d_sae, d_in, generator=generator)
            decoder /= decoder.norm(dim=1, keepdim=True)
            state = {
                "b_pre": torch.randn(d_in, generator=generator) * 0.1,
                "encoder.weight": decoder.clone(),
                "encoder.bias": torch.zeros(d_sae),
                "decoder.weight": decoder.t().contiguous(),
                "decoder.bias": torch.randn(d_in, generator=generator) * 0.1,
            }
            config = {"d_model": d_in, "d_sae": d_sae, "k": k, "source": "acts.pt", "seed": 0}
            torch.save({"state_dict": state, "config": config}, folder / f"sae_{stage}_layer{layer}.pt")
    return folder


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Four SAEs: two layers, two stages."""
    return seed_folder(tmp_path / "saes_k64")


@pytest.fixture
def one() -> HubSAE:
    """A small TopK SAE that SAELens can express."""
    sae = HubSAE.random(SAEConfig(architecture="topk", d_in=16, d_sae=64, k=4), seed=3)
    sae.metadata.base_model.id = "Qwen/Qwen2.5-0.5B-Instruct"
    sae.metadata.hook.layer = 6
    sae.metadata.hook.module_path = "model.layers.6"
    sae.metadata.hook.transformer_lens = "blocks.6.hook_resid_post"
    return sae


def titles(repo: str, revision: str | None = None) -> list[str]:
    """Titles of the commits, newest first."""
    from hubsae.hub.client import HubClient

    return [commit.title for commit in HubClient().api.list_repo_commits(repo, revision=revision)]
