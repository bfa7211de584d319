"""What a run will take, for `--dry-run`: memory, time and disk of a setting, counted from its sizes.

SAEs of published models by the roofline of `hubsae.train.estimate`, those of worlds by a short trial; the model's
passes by the rates of `hubsae.recipes.cost`.
"""

from __future__ import annotations

import torch

from hubsae.recipes.cost import CPU, forward, machine_of
from hubsae.recipes.steps import Estimate
from hubsae.recipes.subject import ModelSettings
from hubsae.train.estimate import estimate

from .cells import train_configs
from .published import DIMENSIONS, Setting
from .settings import LABELS, Config

PLACE = {"activations": {}}


def estimates(config: Config) -> dict[str, Estimate]:
    """Estimates by step name.

    >>> from hubsae.recipes.registry import find_recipe
    >>> found = estimates(find_recipe("fast").config("full"))
    >>> found["train/fast"].what.split(" SAEs")[0], found["train/fast"].seconds > 3600
    ('FAST: 18', True)
    """
    t, m, data = config.train, config.model, config.data
    on = machine_of(m)
    every = [estimate(c, m.d_model, t.tokens, torch.device(on.device)) for c in train_configs(config, "fast", PLACE)]
    pass_ = forward(m, data.layer) / on.flops
    model, buffer = m.parameters * on.weight, 2 * t.buffer_rows * m.d_model * on.weight
    seconds = pass_ * (t.tokens + 2 * t.buffer_rows)
    seconds += sum((e.seconds or 0.0) if on is CPU else e.h200_seconds for e in every)
    states, weights = sum(e.state_bytes for e in every), sum(4 * e.parameters for e in every)
    memory = model + buffer + states + max(e.step_bytes for e in every)
    widths = sorted({e.d_sae for e in every})
    what = f"{len(every)} SAEs of {' and '.join(f'{w:,}' for w in widths)} latents on {t.tokens:,} tokens, {on.name}"
    many, held = len(t.methods) * len(every), config.measure.tokens
    disk = model + 4000 * (data.most_chats + data.most_texts)
    texts = f"{m.label}; {data.most_chats:,} chats and {data.most_texts:,} texts at most"
    found = {"corpus": Estimate(texts, disk, int(data.dedup_megabytes * 2**20))}
    for method in t.methods:
        # two states lie on disk while it runs, and are gone when it ends
        found[f"train/{method}"] = Estimate(f"{LABELS[method]}: {what}", weights, memory, seconds, t.states * states)
    spliced = config.measure.texts * config.measure.text_length * (len(t.methods) * len(t.kinds) + 3)
    encoded = 4 * held * sum(e.d_in * e.d_sae for e in every) * len(t.methods)
    read, how = config.interpret, config.steer
    return found | {
        "heldout": Estimate(f"about {held:,} tokens of test chats", 2 * m.d_model * held, model,
                            pass_ * held),
        "measure": Estimate(f"{many} SAEs", memory=model + (4 << 30),
                            seconds=(encoded + 2 * forward(m) * spliced) / on.flops),
        "interpret": Estimate(f"{read.features} features of {len(t.methods) * len(read.kinds)} SAEs", memory=model),
        "steer": Estimate(f"{how.questions} questions, {len(how.strengths)} strengths", memory=model),
        "release": Estimate(f"{many} SAEs", disk=len(t.methods) * weights),
    }  # fmt: skip


def of_setting(config: Config, setting: Setting) -> dict[str, float | str]:
    """One of the 40 published settings, with the sweep of a config: what its three methods take in all."""
    d, layers, parameters = DIMENSIONS[setting.model]
    model = ModelSettings(id=setting.model, d_model=d, layers=layers, parameters=parameters)
    data = config.data.model_copy(update={"layer": setting.layer})
    train = config.train.model_copy(update={"expansions": (float(setting.expansion),)})
    steps = estimates(config.model_copy(update={"model": model, "data": data, "train": train}))
    states = steps["train/fast"].moved // train.states
    return {
        **setting._asdict(),
        "latents": d * setting.expansion,
        "memory GB": round(max(e.memory for e in steps.values()) / 1e9, 1),
        "hours": round(sum(e.seconds for e in steps.values()) / 3600, 1),
        "disk GB": round((sum(e.disk for e in steps.values()) + 2 * states) / 1e9, 1),
    }
