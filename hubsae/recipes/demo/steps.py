"""The demo's work, as steps of a run folder: a model that learns, its activations, a chain of SAEs, a release.

    world -> policy -> activations -> chain -> release

A second run finds the steps finished; a run that was stopped continues with the step it was in.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubsae.formats import native
from hubsae.recipes.steps import Step, StepContext

TEXT_SEED = 11


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does."""

    world: str
    save_steps: tuple[int, int]
    """Steps of reinforcement learning whose checkpoints become stages, beside the base."""
    layers: tuple[int, ...]
    problems: int
    d_sae: int
    k: int
    epochs: int

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return (BASE_STAGE, *(f"ppo_step{step}" for step in self.save_steps))


BASE_STAGE = "instruct_base"
BASE_MODEL = "tiny-world"
"""What the record names as base model; the checkpoint itself is made on this machine."""

SIZES = {
    "demo": DemoSize("tiny", (10, 30), (1, 3), 1000, 512, 8, 6),
    "fast": DemoSize("quick", (3, 8), (1, 3), 300, 256, 8, 4),
}


def steps(size: DemoSize) -> list[Step]:
    """The steps of a demo of this size."""
    places = {"stages": size.stages, "layers": size.layers}
    sae = {"d_sae": size.d_sae, "k": size.k, "epochs": size.epochs}
    return [
        Step("world", world, settings={"size": size.world}),
        Step("policy", policy, settings={"save_steps": size.save_steps}, needs=("world",), resumes=True),
        Step(
            "activations",
            activations,
            settings={**places, "problems": size.problems},
            needs=("world", "policy"),
            resumes=True,
        ),
        Step("chain", chain, settings={**places, **sae}, needs=("activations",), resumes=True),
        Step("release", release, settings=places, needs=("activations", "chain")),
    ]


def commands(size: DemoSize) -> dict[str, str]:
    """What a person would type to do the same as each step, by step name."""
    layers = ",".join(map(str, size.layers))
    return {
        "policy": "hubsae recipe run rl_chain --config strict      # this and the next three steps, at length",
        "activations": f"hubsae harvest --model CHECKPOINT --dataset openai/gsm8k --layers {layers} "
        "--mode prompt+response --out activations/",
        "chain": "hubsae train CONFIG.yaml",
        "release": "hubsae package saes/ --out release/ --base-model ORG/MODEL\n"
        "hubsae drift release/ --activations activations/",
    }


def outcome(step: str, result: Any) -> str:
    """What came of a step, in a few words; empty where there is nothing to say."""
    if step == "policy":
        first, last = result["reward_first"], result["reward_last"]
        return f"answers that satisfy it: {first:.0%} at the start, {last:.0%} at the end"
    if step == "activations":
        return f"{result['rows']:,} tokens per stage"
    if step == "chain":
        return f"{result['saes']} SAEs"
    return f"{len(result['plots'])} plots, a card" if step == "release" else ""


def world(ctx: StepContext) -> dict[str, Any]:
    """A tiny Qwen2 model that learns to answer word problems in several styles."""
    from hubsae.recipes.tiny import tiny_world

    found = tiny_world(ctx.settings["size"], progress=ctx.progress)
    return {"folder": str(found.folder), "size": ctx.settings["size"]}


def policy(ctx: StepContext) -> dict[str, Any]:
    """Reinforcement learning under the strict reward: `#### number`, exactly."""
    from hubsae.recipes.report import read_csv
    from hubsae.recipes.rl.short import short_run

    tiny = open_world(ctx.result("world"))
    stages = short_run(tiny, ctx.folder, save_steps=ctx.settings["save_steps"], progress=ctx.progress)
    rewards = [float(row["score_strict"]) for row in read_csv(ctx.folder / "metrics.csv")]
    edge = max(1, len(rewards) // 5)
    return {
        "stages": list(stages),
        "reward_first": sum(rewards[:edge]) / edge,
        "reward_last": sum(rewards[-edge:]) / edge,
    }


def load_stage(tiny: Any, folder: Path, stage: str) -> Any:
    """The model at one stage; `folder` is that of the step `policy`."""
    from hubsae.recipes.quiet import quiet
    from hubsae.recipes.rl.stages import parse_checkpoint

    base = str(tiny.model_path)
    with quiet():
        return parse_checkpoint(stage, base if stage == BASE_STAGE else str(folder / "stages" / stage), base).load()


def activations(ctx: StepContext) -> dict[str, Any]:
    """Residual stream of every stage, at two layers, on the same problems and answers."""
    from hubsae.activations import harvest

    settings = ctx.settings
    tiny = open_world(ctx.result("world"))
    texts = problem_texts(tiny, settings["problems"])
    for number, stage in enumerate(settings["stages"]):
        ctx.progress(number, len(settings["stages"]), stage)
        model = load_stage(tiny, ctx.path("policy"), stage)
        harvest(
            model, texts, list(settings["layers"]), out=ctx.folder, tokenizer=tiny.tokenizer,
            mode="prompt+response", stage=stage, validation_fraction=0.1, progress=False,
            source={"text_dataset": "word problems made by rule", "model": BASE_MODEL},
        )  # fmt: skip
    first = opened(ctx.folder, settings["stages"][0], settings["layers"][0], "train")
    return {"stages": settings["stages"], "problems": len(texts), "rows": first.n_rows}


def open_world(result: dict[str, Any]) -> Any:
    """The tiny world that the step `world` made; built again if its cache was emptied."""
    from hubsae.recipes.tiny import tiny_world

    return tiny_world(result["size"])


def problem_texts(tiny: Any, count: int) -> list[dict[str, str]]:
    """Problems with answers in the styles the model was taught, the same for every stage."""
    import random

    from hubsae.recipes.tiny_problems import draw_style, styled_answer

    rng = random.Random(TEXT_SEED)
    return [
        {"prompt": problem.question, "response": styled_answer(problem, draw_style(rng))}
        for problem in tiny.train_problems[:count]
    ]


def chain(ctx: StepContext) -> dict[str, Any]:
    """One chain of SAEs per layer, each stage warm-started from the one before."""
    from hubsae.core.hooks import hook_record
    from hubsae.train import ScheduleConfig, TrainConfig, train_chain

    settings, data = ctx.settings, ctx.path("activations")
    for number, layer in enumerate(settings["layers"]):
        ctx.progress(number, len(settings["layers"]), f"layer {layer}")
        config = TrainConfig(
            name=f"layer{layer}", d_sae=settings["d_sae"], k=settings["k"], epochs=settings["epochs"],
            batch_size=512, lr=1e-3, schedule=ScheduleConfig(shape="cosine", floor=0.1),
            record={
                "base_model": {"id": BASE_MODEL},
                "hook": hook_record(None, layer) | {"context_size": 512, "prepend_bos": False},
                "activations": {"mode": "prompt+response", "text_dataset": "word problems made by rule"},
            },
        )  # fmt: skip
        trained = train_chain(
            config,
            {stage: opened(data, stage, layer, "train") for stage in settings["stages"]},
            val={stage: opened(data, stage, layer, "validation") for stage in settings["stages"]},
            out=ctx.folder / "training" / f"layer{layer}",
            control=False,
            quiet=True,
        )
        for stage in trained.stages:
            stage.sae.metadata.base_model.stage = stage.stage
            stage.sae.metadata.base_model.step = (
                int(stage.stage.removeprefix("ppo_step")) if "ppo" in stage.stage else 0
            )
            native.write(stage.sae, ctx.folder / sae_id(stage.stage, layer))
    shutil.rmtree(ctx.folder / "training")
    return {"saes": len(settings["layers"]) * len(settings["stages"])}


def release(ctx: StepContext) -> dict[str, Any]:
    """Package the chain with its metrics, its drift and its card."""
    from hubsae.core.files import write_text_atomic
    from hubsae.evals import drift, reconstruction
    from hubsae.evals.record import record_drift, record_metrics
    from hubsae.formats import Release
    from hubsae.hub.card import card_of_release, render_card
    from hubsae.hub.sae import HubSAE

    settings, data = ctx.settings, ctx.path("activations")
    made = Release.create(ctx.folder, name="hubsae-demo", base_model=BASE_MODEL, license="apache-2.0")
    saes: dict[str, list[HubSAE]] = {}
    pairs = [(stage, layer) for stage in settings["stages"] for layer in settings["layers"]]
    for number, (stage, layer) in enumerate(pairs):
        name = sae_id(stage, layer)
        ctx.progress(number, len(pairs), name)
        sae = HubSAE.from_pretrained(ctx.path("chain") / name)
        saes.setdefault(stage, []).append(sae)
        made.add(sae, name)
        measured = reconstruction({name: sae}, opened(data, stage, layer, "validation"))
        record_metrics(made, {name: measured[name].metrics()})
    held_out = {(stage, layer): opened(data, stage, layer, "validation") for stage, layer in pairs}
    record_drift(made, drift(saes, held_out, name="demo"))
    card = render_card(card_of_release(made.path, "local/hubsae-demo"))
    write_text_atomic(made.path / "README.md", card.text)
    return {"saes": len(made), "plots": [plot.name for plot in made.plots]}


def sae_id(stage: str, layer: int) -> str:
    """Where an SAE lies in the release."""
    return f"saes/{stage}/layer{layer}"


def opened(folder: Path, stage: str, layer: int, split: str) -> Any:
    """Activations of one stage and layer."""
    from hubsae.activations import ActivationDataset

    return ActivationDataset.open(folder, f"{stage}.layers.{layer}", split)
