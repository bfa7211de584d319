"""A probe goes to the Hub beside its SAE and comes back alone, checked."""

from __future__ import annotations

import pytest
import torch

from hubsae import HubSAE, Release, SAEConfig, load_probe, push
from hubsae.core.errors import NotFoundError
from hubsae.evals.probes import Probe
from hubsae.localhub import LocalHub


def test_a_pushed_probe_is_loaded_without_the_weights_of_its_sae(hub: LocalHub, tmp_path):
    release = Release.create(tmp_path / "r", name="r", base_model="a/b")
    for layer in (1, 2):
        sae = HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2), seed=layer)
        sae.metadata.hook.layer = layer
        release.add(sae, f"layer{layer}")
    written = Probe(torch.arange(16).double(), 0.25, {"target": "score", "problems": 40})
    written.save(release.folder("layer2"))
    release.refresh()
    push(release.path, "me/probed", check_saelens=False)
    start = len(hub.requests)
    found = load_probe("me/probed", layer=2)
    fetched = [path for _, path, _ in hub.requests[start:] if "safetensors" in path]
    assert fetched and all(path.endswith("layer2/probe.safetensors") for path in fetched)
    assert torch.equal(found.weights, written.weights) and (found.bias, found.record) == (0.25, written.record)
    assert torch.equal(load_probe(release.path, "layer2").weights, written.weights)
    with pytest.raises(NotFoundError, match="no probe beside layer1") as error:
        load_probe("me/probed", "layer1")
    assert "layer2" in str(error.value.hint)
