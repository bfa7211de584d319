"""What each step will cost, for `--dry-run`: bytes, hours and traffic from the settings alone.

Hours are of one H200, none of them measured on one; a small profile's hours say nothing of a laptop.
"""

from __future__ import annotations

from hubsae.recipes import cost
from hubsae.recipes.steps import Estimate
from hubsae.train.estimate import H200_BYTES, H200_FLOPS, H200_LAUNCHES

from .settings import Config


def estimates(c: Config) -> dict[str, Estimate]:
    """Estimates by step name.

    >>> from hubsae.recipes.registry import find_recipe
    >>> found = estimates(find_recipe("qwen3_release").config("full"))
    >>> found["train"].what
    '536,940,544 parameters, 70,000 steps of 32,768 tokens = 2,293,760,000, 8.18 passes'
    """
    d, n, data, s = c.model.d_model, c.d_sae, c.data, c.sae
    parameters = 2 * n * d + n + d
    tokens, held = data.max_tokens, int(data.max_tokens * data.validation_fraction)
    steps = s.tokens // s.batch_size
    rows, weights = 2 * d * tokens, 4 * parameters
    forward = cost.forward(c.model, data.layer) / cost.GPU.flops
    encode = 2 * d * n / H200_FLOPS
    step = 6 * d * n * s.batch_size / H200_FLOPS + (24 * 2 * n * d + 6 * s.batch_size * s.k * d) / H200_BYTES
    trained = steps * max(H200_LAUNCHES, step)
    saved = weights * (1 + len(c.exports)) * (s.keep_best + 1)
    state = 3 * weights
    texts = c.measure.texts * c.measure.text_length * (s.keep_best + 1)
    written = (1 + 2 * c.steering.controls) * c.steering.features * len(c.steering.strengths) * c.steering.prompts
    cells = len(c.dead.variants) * len(c.dead.seeds)
    passes = 0 if c.live.on else s.tokens / tokens
    return {
        "subject": Estimate(c.model.label, disk=4 * c.model.parameters, moved=4 * c.model.parameters),
        "activations": Estimate(
            f"layer {data.layer}, {tokens:,} tokens of width {d:,}", rows, 2 * c.model.parameters,
            tokens * forward + rows / cost.DISK, rows,
        ),
        "train": Estimate(
            f"{parameters:,} parameters, {steps:,} steps of {s.batch_size:,} tokens = {steps * s.batch_size:,}, "
            f"{s.tokens / tokens:.2f} passes", 2 * state + weights * s.keep_best,
            4 * weights + (s.prefetch + 1) * s.window_bytes,
            max(trained, passes * rows / cost.DISK) if passes else trained + s.tokens * forward,
            int(passes * rows + steps // s.save_every * (state + weights)),
        ),
        "checkpoints": Estimate(
            f"{s.keep_best} best and the last, each as a release with {len(c.exports)} exports", saved,
            3 * weights + 2 * c.model.parameters, saved / cost.DISK, 2 * saved,
        ),
        "measure": Estimate(
            f"{s.keep_best + 1} checkpoints on {held:,} tokens, the loss on {c.measure.texts} conversations", 0,
            2 * weights, held * encode * (s.keep_best + 1) + 4 * texts * forward, 2 * d * held,
        ),
        "index": Estimate(
            f"{tokens - held:,} activation records, top {c.index.top} of {n:,} features", 2_000 * n, 2 * weights,
            tokens * encode + rows / cost.DISK, rows,
        ),
        "steering": Estimate(
            f"{written:,} continuations of {c.steering.new_tokens} tokens", 0, 2 * c.model.parameters,
            written * c.steering.new_tokens * 4 * forward,
        ),
        "dead": Estimate(
            f"{cells} SAEs on {c.dead.tokens:,} tokens each, as many at once as fit", cells * weights, 4 * weights,
            cells * c.dead.tokens / s.batch_size * max(H200_LAUNCHES, step), 2 * d * c.dead.tokens,
        ),
        "release": Estimate("the checkpoint, its numbers, index and pages", weights * (1 + len(c.exports)),
                            moved=weights * (1 + len(c.exports))),
        "report": Estimate("what was published beside what was measured"),
    }  # fmt: skip
