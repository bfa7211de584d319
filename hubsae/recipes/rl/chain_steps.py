"""What the steps of a chain recipe have in common: opening stages, activations and SAEs of a run folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from hubsae.activations import ActivationDataset
from hubsae.core.errors import NotFoundError
from hubsae.core.files import read_json
from hubsae.core.hooks import hook_record
from hubsae.evals import DriftReport, drift
from hubsae.hub.sae import HubSAE
from hubsae.recipes.quiet import quiet
from hubsae.recipes.rl.chain_settings import ChainConfig, ChainSettings, Mode, SAESettings
from hubsae.recipes.rl.problems import PromptStyle, Question
from hubsae.recipes.rl.source import Source
from hubsae.recipes.rl.stages import Checkpoint, parse_checkpoint
from hubsae.recipes.steps import StepContext
from hubsae.train import (
    AuxConfig,
    DeadConfig,
    InitConfig,
    ResampleConfig,
    ScheduleConfig,
    TrainConfig,
)

HARVEST_MODES: dict[Mode, str] = {
    "question": "text", "prompt": "prompt", "prompt+response": "prompt+response", "own": "generate",
}  # fmt: skip
"""Our modes and what `harvest` calls them."""


def calmly(step: Callable[[Any, StepContext], Any]) -> Callable[[Any, StepContext], Any]:
    """A step of a recipe object with `config`: with its number of threads, and without the libraries' chatter."""

    @wraps(step)
    def run(self: Any, ctx: StepContext) -> Any:
        with threads(self.config.threads), matmul(self.config.matmul), quiet():
            return step(self, ctx)

    return run


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with this many torch threads; None leaves them as they are."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def matmul(choice: str) -> Iterator[None]:
    """Fix which product the trainer uses; `auto`, or a choice of the user's own in the environment, is left alone."""
    if choice == "auto" or "HUBSAE_LINEAR" in os.environ:
        yield
        return
    os.environ["HUBSAE_LINEAR"] = choice
    try:
        yield
    finally:
        del os.environ["HUBSAE_LINEAR"]


def pick_device(name: str) -> str:
    """`auto` takes a GPU where there is one.

    >>> pick_device("cpu")
    'cpu'
    """
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def checkpoints(config: ChainConfig, source: Source, rl_folder: Path | None) -> dict[str, Checkpoint]:
    """Every stage of the chain and where its weights are, the base first."""
    base = Checkpoint(config.base_stage, source.model, source.revision)
    base_id = f"{source.model}@{source.revision}" if source.revision else source.model
    found = {config.base_stage: base}
    if config.control_steps:
        return found | dict.fromkeys(config.stage_names(), base)
    for name in config.stage_names()[1:]:
        where = config.stages[name] if config.stages else str((rl_folder or Path()) / "stages" / name)
        found[name] = parse_checkpoint(name, where, base_id)
    return found


def texts_for(mode: Mode, questions: list[Question], style: PromptStyle) -> list[Any]:
    """Problems as `harvest` takes them in a mode."""
    if mode == "question":
        return [q.question for q in questions]
    if mode == "prompt+response":
        return [{"messages": [*style.messages(q.question), answer(q)]} for q in questions]
    return [{"messages": style.messages(q.question)} for q in questions]


def answer(question: Question) -> dict[str, str]:
    """The given answer, as a turn of the conversation."""
    return {"role": "assistant", "content": question.answer}


def open_activations(folder: Path, stage: str, layer: int, split: str) -> ActivationDataset:
    """One stage and layer of a harvested mode."""
    return ActivationDataset.open(folder, f"{stage}.layers.{layer}", split)


def train_config(sae: SAESettings, chain: ChainSettings, layer: int, record: dict[str, Any], seed: int) -> TrainConfig:
    """The published training recipe, with the sizes of this run."""
    resample = None if sae.resample_every is None else ResampleConfig(every_epochs=sae.resample_every)
    return TrainConfig(
        name=f"{chain.name}-layer{layer}",
        architecture="topk",
        expansion=sae.expansion,
        k=chain.k,
        topk_relu=not sae.signed,
        pre_bias="untied",
        init=InitConfig(encoder="torch", decoder="torch", bias="mean"),
        lr=sae.lr,
        schedule=ScheduleConfig(shape="cosine", floor=sae.floor),
        batch_size=sae.batch_size,
        epochs=sae.epochs,
        clip=sae.clip,
        project=False,
        aux=AuxConfig(coefficient=sae.aux, k=sae.aux_k_factor * chain.k, target="full") if sae.aux else None,
        dead=DeadConfig(rule="frequency", frequency=sae.dead_frequency, resample=resample),
        select="best",
        metric="val_mse",
        seed=seed,
        data_seed=seed,
        exports=(),
        record={**record, "hook": {**hook_record(None, layer), **record.get("hook", {})}},
    )


def sae_id(chain: str, stage: str, layer: int) -> str:
    """Where an SAE lies, in the chains' folders and in the release."""
    return f"{chain}/{stage}/layer{layer}"


def load_saes(folders: dict[tuple[str, int], Path], stages: list[str], kind: str = "chain") -> dict[str, list[HubSAE]]:
    """The SAEs of every stage, from the folders of the chain steps by (chain, layer); kind `chain` or `control`."""
    return {stage: [HubSAE.from_pretrained(folder / kind / stage) for folder in folders.values()] for stage in stages}


def drift_of_run(run: Path, config: ChainConfig, on_pass: Any = None) -> DriftReport:
    """The drift of a finished run, with its control where it has one."""
    folders = {(chain.name, layer): run / "chains" / chain.name / f"layer{layer}" for chain, layer in config.members()}
    stages, acts = config.stage_names(), run / "activations" / folder_name(config.harvest.train_on)

    def held_out(stage: str, layer: int | None) -> ActivationDataset:
        assert layer is not None
        return open_activations(acts, config.activation_stage(stage), layer, "validation")

    has_control = all((folder / "control").is_dir() for folder in folders.values())
    return drift(
        load_saes(folders, stages),
        held_out,
        control=load_saes(folders, stages, "control") if has_control else None,
        control_activations=(lambda stage, layer: held_out(config.base_stage, layer)) if has_control else None,
        name=config.name,
        on_pass=on_pass,
    )


def folder_name(mode: Mode) -> str:
    """A mode as a folder name.

    >>> folder_name("prompt+response")
    'prompt-response'
    """
    return mode.replace("+", "-")


def run_fingerprint(run: Path) -> str:
    """Changes when another run's chains do, so that a comparison with it is made anew."""
    record = run / ".steps" / "drift.json"
    if not record.is_file():
        raise NotFoundError(
            f"{run} is no finished run of a chain: it has no drift to compare with",
            hint="run it first, or leave it out of compare",
        )
    return str(read_json(record)["fingerprint"])
