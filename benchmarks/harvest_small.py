"""A harvest of the small world's model against the plain loop, in CPU seconds, taken in turns on one thread.

    python benchmarks/harvest_small.py [CHATS]        needs the extra `small`

The plain loop is what people write: `AutoModelForCausalLM` with `output_hidden_states=True`, batches of eight chats in
the order they come. The harvest writes three layers to disk as well. CPU time is the fair figure on a machine with
other load.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch

from hubsae.activations import harvest
from hubsae.activations.capture import padded
from hubsae.activations.samples import Preparation, Preparer
from hubsae.recipes.small import small_world

LAYERS, LENGTH, TURNS = [8, 15, 22], 512, 3


def plain(model: Any, sequences: list[list[int]]) -> None:
    """Batches of eight, all hidden states, three of them kept."""
    with torch.no_grad():
        for first in range(0, len(sequences), 8):
            ids, mask = padded(sequences[first : first + 8])
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            _ = [states[layer + 1][mask].half() for layer in LAYERS]


def main(count: int) -> None:
    """Print tokens per CPU second of both, and the ratio, for each turn."""
    torch.set_num_threads(1)
    world = small_world()
    chats = world.train_chats[: count * TURNS]
    preparer = Preparer(world.tokenizer, Preparation("prompt+response", LENGTH))
    for turn in range(TURNS):
        part = chats[turn * count : (turn + 1) * count]
        samples, _ = preparer.prepare(part, 0)
        tokens = sum(len(s.ids) for s in samples)
        with tempfile.TemporaryDirectory() as out:
            began = time.process_time()
            harvest(
                world.model, part, LAYERS, out=out, tokenizer=world.tokenizer, mode="prompt+response",
                max_length=LENGTH, progress=False,
            )  # fmt: skip
            ours = tokens / (time.process_time() - began)
        began = time.process_time()
        plain(world.model, [s.ids for s in samples])
        theirs = tokens / (time.process_time() - began)
        print(
            f"{tokens} tokens: harvest {ours:.0f}, plain {theirs:.0f} tokens per CPU second, {ours / theirs:.2f} times"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
