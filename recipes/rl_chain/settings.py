"""Settings of a chain recipe: which model, data, reward, stages, activations, SAEs and measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from hubsae.core.scopes import excluding
from hubsae.core.settings import Settings
from hubsae.recipes.standard import PublishSettings
from hubsae.recipes.subject import DataSettings, ModelSettings
from hubsae.rl.config import RLConfig
from hubsae.rl.problems import PromptStyle
from hubsae.rl.warmup import WarmUp

Mode = Literal["question", "prompt", "prompt+response", "own"]
"""question: its bare text; prompt: rendered with the chat template; prompt+response: with the given answer;
own: with the response that the stage's model gives."""


def harvest_step(mode: Mode) -> str:
    """The step that takes the activations of a mode.

    >>> harvest_step("prompt+response")
    'activations/prompt-response'
    """
    return f"activations/{mode.replace('+', '-')}"


class ChainData(DataSettings):
    """Problems in the layout of GSM8K, and how one is asked."""

    system: str = ""
    suffix: str = ""

    def style(self) -> PromptStyle:
        """How a question becomes a conversation."""
        return PromptStyle(self.system, self.suffix)


class HarvestSettings(Settings):
    """Which activations are taken from every stage."""

    modes: tuple[Mode, ...] = ("question",)
    train_on: Mode = "question"
    layers: tuple[int, ...] = (6, 12, 18, 23)
    problems: int | None = None
    """None takes every training problem."""
    max_length: int = 512
    max_new_tokens: int = 512
    model_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """float32 keeps small updates; float16 is what the published activations were taken in."""
    dtype: Literal["float16", "float32"] = "float16"
    """How vectors are stored."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    split_by: Literal["sample", "token", "tail"] = "sample"
    """sample keeps a prompt on one side; token is what some of the published tables used, and it leaks."""
    batch_tokens: int | None = None

    @model_validator(mode="after")
    def _train_on_is_harvested(self) -> HarvestSettings:
        if self.train_on not in self.modes:
            raise ValueError(f"harvest.train_on={self.train_on} is not among harvest.modes={list(self.modes)}")
        return self


class ChainSettings(Settings):
    """One family of SAEs: its folder in the release, its k, its layers."""

    name: str
    k: int = Field(ge=1)
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Member:
    """One family of SAEs at one layer: an SAE per stage."""

    chain: ChainSettings
    layer: int

    @property
    def step(self) -> str:
        """The step that trains it."""
        return f"chains/{self.chain.name}/layer{self.layer}"

    def id(self, stage: str) -> str:
        """The id of its SAE of one stage, in the release."""
        return f"{self.chain.name}/{stage}/layer{self.layer}"

    @property
    def columns(self) -> dict[str, Any]:
        """What tables say of it."""
        return {"chain": self.chain.name, "layer": self.layer, "k": self.chain.k}


class SAESettings(Settings):
    """How the SAEs are trained; the defaults are the published recipe."""

    chains: tuple[ChainSettings, ...]
    expansion: int = 8
    lr: float = 1e-4
    floor: float = 0.1
    """Last learning rate, as a share of lr (cosine)."""
    batch_size: int = 512
    epochs: int = 20
    clip: float | None = 1.0
    resample_every: int | None = 10
    """Epochs; never after the last."""
    dead_frequency: float = 1e-4
    aux: float = 1 / 32
    aux_k_factor: int = 16
    """The auxiliary loss uses this many times k dead latents."""
    signed: bool = False
    """True leaves out the ReLU after top-k, as the published class does. Its released SAEs never select a negative,
    so the ReLU changes nothing there, and with it stock SAELens computes the same."""
    exclude: tuple[str, ...] = ()
    """Token groups the SAEs are not for: position_0, special, massive ..."""
    control: bool = True
    """Also train as many stages on base activations alone."""

    @property
    def scope(self) -> str:
        """The tokens that the SAEs are for, which every number of the report is about."""
        return excluding(self.exclude).name


class EvaluationSettings(Settings):
    """What is measured on held-out problems."""

    accuracy_problems: int = 1319
    accuracy_temperature: float = 0.0
    rollout_batch: int = 256
    splice_texts: int = 100
    splice_max_length: int = 256


class ChainConfig(Settings):
    """A chain: checkpoints of one model, and the SAEs that follow them."""

    name: str
    about: str = ""
    seed: int = 0
    threads: int | None = None
    """torch threads; 1 for tiny models, where more only cost."""
    device: str = "auto"
    matmul: Literal["auto", "torch"] = "auto"
    """Which product the trainer's encoder uses on a CPU: `auto` decides by a short trial, so two processes may decide
    differently and then differ in the last bits; with `torch` a run that was killed ends equal to one that was not."""
    base_stage: str = "instruct_base"
    model: ModelSettings
    data: ChainData
    warmup: WarmUp | None = None
    """Supervised steps on the answer format before everything else; the base stage is then the model after them."""
    rl: RLConfig | None = None
    stages: dict[str, str] = Field(default_factory=dict)
    """Existing checkpoints by stage name (folder, repo, repo@revision, adapters too), in place of a run of rl."""
    control_steps: tuple[int, ...] = ()
    """In place of both: as many stages that are all the base model, named by these steps."""
    harvest: HarvestSettings = Field(default_factory=HarvestSettings)
    sae: SAESettings
    evaluation: EvaluationSettings = EvaluationSettings()
    compare: tuple[str, ...] = ()
    """Run folders of other chains to set beside this one."""
    published_as: str | None = None
    """The chain's name in the published tables; None where there is nothing to compare with."""
    same_model: bool = True
    """False where the model is not the published one, so that no verdict is given."""
    publish: PublishSettings = PublishSettings()

    @model_validator(mode="after")
    def _one_source_of_stages(self) -> ChainConfig:
        given = [n for n, v in (("rl", self.rl), ("stages", self.stages), ("control_steps", self.control_steps)) if v]
        # `stages` given on the command line replaces the run that a profile describes
        if "stages" in given and "control_steps" not in given:
            return self
        if len(given) != 1:
            raise ValueError(f"stages come from one of rl, stages, control_steps; given: {', '.join(given) or 'none'}")
        return self

    @model_validator(mode="after")
    def _layers_are_harvested(self) -> ChainConfig:
        missing = {layer for chain in self.sae.chains for layer in chain.layers} - set(self.harvest.layers)
        if missing:
            raise ValueError(f"sae.chains use layers {sorted(missing)}, harvest.layers are {list(self.harvest.layers)}")
        return self

    @property
    def runs_rl(self) -> bool:
        """Whether this run trains the policy itself."""
        return self.rl is not None and not self.stages and not self.control_steps

    def stage_names(self) -> list[str]:
        """All stages, the base first."""
        if self.stages:
            return [self.base_stage, *(name for name in self.stages if name != self.base_stage)]
        if self.control_steps:
            return [self.base_stage, *(f"control_step{step}" for step in self.control_steps)]
        assert self.rl is not None
        return [self.base_stage, *self.rl.stage_names()]

    def activation_stage(self, stage: str) -> str:
        """The stage whose activations an SAE of `stage` is trained on: the base's in a control run."""
        return self.base_stage if self.control_steps else stage

    def harvested_stages(self) -> list[str]:
        """Stages whose activations are taken."""
        return list(dict.fromkeys(self.activation_stage(stage) for stage in self.stage_names()))

    def members(self) -> list[Member]:
        """Every family of SAEs at each of its layers."""
        return [Member(chain, layer) for chain in self.sae.chains for layer in chain.layers]
