"""Where a chain's stages, texts and SAEs are, and how one of its SAEs is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hubsae.activations import ActivationDataset
from hubsae.core.errors import NotFoundError
from hubsae.core.files import read_json
from hubsae.core.hooks import hook_record
from hubsae.evals import DriftReport, drift
from hubsae.hub.sae import HubSAE
from hubsae.recipes.standard import Activations, Shelf
from hubsae.recipes.subject import Subject
from hubsae.rl.problems import PromptStyle, Question
from hubsae.rl.stages import Checkpoint, parse_checkpoint
from hubsae.train import (
    AuxConfig,
    DeadConfig,
    InitConfig,
    ResampleConfig,
    ScheduleConfig,
    TrainConfig,
)

from .settings import ChainConfig, Member, Mode, SAESettings, harvest_step

HARVEST_MODES: dict[Mode, str] = {
    "question": "text", "prompt": "prompt", "prompt+response": "prompt+response", "own": "generate",
}  # fmt: skip
"""Our modes and what `harvest` calls them."""


def checkpoints(config: ChainConfig, source: Subject, rl_folder: Path | None) -> dict[str, Checkpoint]:
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


def train_config(sae: SAESettings, member: Member, record: dict[str, Any], seed: int) -> TrainConfig:
    """The published training recipe, with the sizes of this run."""
    chain, layer = member.chain, member.layer
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
        exclude=sae.exclude,
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


def saes_of(run: Path, member: Member, kind: str = "chain") -> Shelf:
    """The SAEs of a member by stage, in a run folder; kind `chain` or `control`."""
    return Shelf(run / member.step / kind)


def drift_of_run(run: Path, config: ChainConfig, on_pass: Any = None) -> DriftReport:
    """The drift of a finished run, with its control where it has one."""
    members, stages = config.members(), config.stage_names()
    activations = Activations(run / harvest_step(config.harvest.train_on))

    def saes(kind: str) -> dict[str, list[HubSAE]]:
        return {stage: [saes_of(run, member, kind).get(stage) for member in members] for stage in stages}

    def held_out(stage: str, layer: int | None) -> ActivationDataset:
        assert layer is not None
        return activations.open(layer, "validation", config.activation_stage(stage))

    has_control = all(saes_of(run, member, "control").folder.is_dir() for member in members)
    return drift(
        saes("chain"),
        held_out,
        control=saes("control") if has_control else None,
        control_activations=(lambda stage, layer: held_out(config.base_stage, layer)) if has_control else None,
        name=config.name,
        on_pass=on_pass,
    )


def run_fingerprint(run: Path) -> str:
    """Changes when another run's chains do, so that a comparison with it is made anew."""
    record = run / ".steps" / "drift.json"
    if not record.is_file():
        raise NotFoundError(
            f"{run} is no finished run of a chain: it has no drift to compare with",
            hint="run it first, or leave it out of compare",
        )
    return str(read_json(record)["fingerprint"])
