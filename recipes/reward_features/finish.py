"""What follows the measurements: PPO against a probe, the index with scores in its labels, the release with probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubsae.core.files import read_csv
from hubsae.evals.probes import Probe
from hubsae.formats import Release
from hubsae.hub.sae import HubSAE
from hubsae.index import labels
from hubsae.index.build import Settings, index_activations
from hubsae.index.features import FeatureIndex
from hubsae.index.files import mark
from hubsae.recipes.standard import add_pages, package
from hubsae.recipes.subject import Subject
from hubsae.rl.ppo import PPO
from hubsae.rl.problems import PromptStyle, make_prompts
from hubsae.rl.steps import StepReward

from .settings import Config


def against(
    reward: StepReward, subject: Subject, config: Config, folder: Path, device: Any, progress: Any
) -> dict[str, Any]:
    """PPO of the base model; reward and accuracy of its samples in the first and last fifth of the steps."""
    rl = config.rl
    assert rl is not None
    tokenizer, style = subject.tokenizer(), PromptStyle(config.data.system)
    train, test = (make_prompts(tokenizer, questions, style, max_prompt=rl.max_prompt)
                   for questions in (subject.problems(), subject.problems("test")[: rl.test_problems]))  # fmt: skip
    PPO(
        rl, folder, model=subject.model, revision=subject.revision, tokenizer=tokenizer, train=train, test=test,
        seed=config.seed, device=device, name=subject.label, reward=reward.responses,
    ).run(progress)  # fmt: skip
    rows, held = read_csv(folder / "metrics.csv"), read_csv(folder / "accuracy.csv")
    fifth = max(1, len(rows) // 5)
    found: dict[str, Any] = {"held_out": [float(held[i]["flexible"]) for i in (0, -1)]}
    for name in ("reward", "score_strict", "score_flexible", "length"):
        found[name] = [float(np.mean([float(r[name]) for r in some])) for some in (rows[:fifth], rows[-fifth:])]
    return found


def index(
    folder: Path, layer: int, sae: HubSAE, rows: Any, carriers: Sequence[Mapping[str, str]], tokenizer: Any, top: int
) -> str:
    """The reverse index of one SAE; each feature that carries the score has that in its label. The folder's name."""
    sae.metadata.id = f"reward/layer{layer}"
    saes = {sae.metadata.id: sae}
    (made,) = index_activations(saes, rows, folder, Settings(top=top), tokenizer=tokenizer, show=False)
    found = []
    for row in carriers:
        effect, where = float(row["effect"]), row["score_where_it_fires"]
        text = f"score {float(where):.2f} where it fires; " if where else ""
        text += f"{'raises' if effect > 0 else 'lowers'} the reward by {abs(effect):.3g}"
        text += f"; without it R² loses {float(row['drop']):.2g}"
        found.append(labels.Label(int(row["feature"]), text, "hubsae", "ridge probe", effect))
    labels.write(made, found)
    return made.name


def contexts(folder: Path, names: Mapping[str, str], probes: Path) -> dict[tuple[int, int], str]:
    """Where the carriers fire, by layer and feature."""
    carriers, found = read_csv(probes / "carriers.csv"), {}
    for layer, name in names.items():
        opened = FeatureIndex.open(folder / name)
        for row in (r for r in carriers if r["layer"] == layer):
            prompts = opened[int(row["feature"])].prompts[:2]
            found[int(layer), int(row["feature"])] = " | ".join(mark(e.tokens, e.center) for e in prompts)
    return found


def release(
    folder: Path, name: str, saes: Mapping[tuple[str, int], tuple[HubSAE, Probe]], tables: Mapping[str, Any],
    models: Mapping[str, str], indexes: Path, subject: Subject, loaders: Mapping[str, Callable[[], Any]],
) -> dict[str, Any]:  # fmt: skip
    """SAEs by model and layer, a probe beside each, the tables, the pages, the card over all of it."""
    ids = {(of, layer): f"{of}/layer{layer}" for of, layer in saes}
    package(folder, {ids[where]: (lambda s=sae: s) for where, (sae, _) in saes.items()}, name=name,
            base_model=models["reward"], tables=tables, card="release", subject=subject, stages=loaders)  # fmt: skip
    made = Release.open(folder)
    for (of, layer), (_, probe) in saes.items():
        about = {"sae": ids[of, layer], "model": models[of], "score_of": models["reward"], "layer": layer}
        Probe(probe.weights, probe.bias, probe.record | about).save(made.folder(ids[of, layer]))
    return {"ids": add_pages(folder, indexes, name).ids}
