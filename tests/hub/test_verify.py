"""`hubsae verify`: one flipped bit is found, wherever it lies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hubsae import HubSAE, TrainConfig, push
from hubsae.activations import ActivationWriter
from hubsae.core.errors import NotFoundError
from hubsae.formats import Release
from hubsae.hub.client import HubClient
from hubsae.hub.verify import verify
from hubsae.localhub import LocalHub
from hubsae.train import train
from tests.hub.conftest import ABOUT


def flip(path: Path) -> None:
    """One bit in the middle, with size and time as they were."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def release(folder: Path, one: HubSAE) -> Path:
    made = Release.create(folder, name="r", base_model="a/b")
    made.add(one, "layer6")
    made.add_results("numbers", [{"a": 1}])
    return made.folder("layer6") / "sae_weights.safetensors"


def activations(folder: Path, one: HubSAE) -> Path:
    with ActivationWriter(folder, d=8, config="layers.6") as writer:
        writer.write(torch.randn(4096, 8), sample_id=0, position=list(range(4096)))
    return next(folder.rglob("*.parquet"))


def training(folder: Path, one: HubSAE) -> Path:
    config = TrainConfig(d_sae=32, k=4, batch_size=64, checkpoint_every=2)
    train(config, torch.randn(512, 8), out=folder, quiet=True)
    return sorted(folder.glob("state/step_*"))[-1] / "cell0.safetensors"


@pytest.mark.parametrize("make", [release, activations, training])
def test_a_flipped_bit_in_a_folder(make: Callable[[Path, HubSAE], Path], one: HubSAE, tmp_path: Path):
    target = make(tmp_path / "x", one)
    found = verify(tmp_path / "x")
    assert found.whole and found.files >= 1 and found.kinds == [make.__name__]
    flip(target)
    found = verify(tmp_path / "x")
    assert not found.whole and target.name in found.problems[0]


def test_a_flipped_bit_in_the_cache_is_found_and_removed(hub: LocalHub, seeds: Path):
    push(seeds, "me/verified", **ABOUT)
    good = HubSAE.from_pretrained("me/verified", layer=6, stage="ppo_step10").W_dec.clone()  # not the mapped file
    assert verify("me/verified").whole
    client = HubClient()
    snapshot = client.cached_snapshot("me/verified", client.head("me/verified"))
    flip((snapshot / "saes_k64/ppo_step10/layer6/sae_weights.safetensors").resolve())
    flip((snapshot / "config.json").resolve())
    found = verify("me/verified")
    assert sorted(p.partition(":")[0].rpartition("/")[2] for p in found.problems) == [
        "config.json", "sae_weights.safetensors",
    ]  # fmt: skip
    assert not verify("me/verified", remove=True).whole
    again = HubSAE.from_pretrained("me/verified", layer=6, stage="ppo_step10")
    assert torch.equal(again.W_dec, good) and verify("me/verified").whole


def test_what_is_not_there_is_said(hub: LocalHub):
    with pytest.raises(NotFoundError, match="holds nothing of it"):
        verify("me/never-loaded")
