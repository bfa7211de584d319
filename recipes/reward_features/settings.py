"""Settings of the recipe: texts, reward model, SAEs, probes, truncation, base model, reinforcement learning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hubsae.core.settings import Settings
from hubsae.recipes.subject import DataSettings, ModelSettings
from hubsae.rl.config import RLConfig
from hubsae.rl.steps import StepFormat


class TextSettings(DataSettings):
    """Solutions, and how many of them."""

    chat: bool = Field(default=True, description="Prompts go through the chat template.")
    system: str = ""
    separator: str = Field(default="\n", description="Ends a step for the reward model.")
    base_separator: str = Field(default="\n", description="Stands between steps for the base model.")
    base_read: Literal["separator", "step"] = Field(
        default="separator", description="Where the base model's steps are read: behind them, or at their last token."
    )
    longest: int | None = Field(default=None, description="Characters of prompt and answer; longer ones are left out.")
    prm: int = Field(default=1000, description="Problems that the reward model learns from, none of which comes later.")
    train: int = Field(default=1000, description="Problems for SAEs and probes.")
    test: int = Field(default=200, description="Problems held out, with several solutions each.")
    candidates: int = Field(default=4, ge=2, description="Solutions to each held-out problem, one of them right.")
    tokens: int | None = Field(default=None, description="Activations harvested at each layer; default: all.")

    def formats(self) -> tuple[StepFormat, StepFormat]:
        """How the reward model reads steps, and how the base model does."""
        return StepFormat(self.separator), StepFormat(self.base_separator, self.base_read)


class PRMSettings(Settings):
    """The process reward model: one that exists, or one made from the base model here."""

    id: str | None = Field(default=None, description="A reward model on the Hub or a folder; default: made here.")
    revision: str | None = None
    dtype: str = "float32"
    epochs: float = 1
    versions: int = Field(default=1, ge=1, description="Solutions to each problem that it learns from, if they differ.")
    batch: int = 8
    lr: float = 3e-4
    lora: int | None = Field(default=None, description="Rank of the adapter; default: all weights are trained.")
    from_layer: int = Field(default=0, description="Layers below stay as they are.")
    enough: float = Field(default=0.8, description="AUC below which the report says the reward model is no good.")


class SAESettings(Settings):
    """The SAEs, one per layer and model."""

    width: int = 256
    k: int = 16
    epochs: float = 2
    batch_size: int = 512
    lr: float = 1e-3
    dead_tokens: int = 100_000
    exclude: tuple[str, ...] = ()


class ProbeSettings(Settings):
    """Ridge from codes to scores."""

    folds: int = 5
    shuffles: int = Field(default=20, ge=2, description="Times the scores are shuffled between problems.")
    top: int = Field(default=32, description="Features looked at one by one.")


class SteerSettings(Settings):
    """Steering one matched feature of the base model, and watching the reward."""

    prompts: int = Field(default=8, description="0 leaves it out.")
    tokens: int = 32
    strengths: tuple[float, ...] = (0.5, 1.0)
    controls: int = 1


class Config(Settings):
    """Everything a run depends on."""

    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    model: ModelSettings
    """The base model"""
    data: TextSettings
    prm: PRMSettings = PRMSettings()
    layers: tuple[int, ...]
    """Of the reward model"""
    base_layers: tuple[int, ...]
    untrained_layers: tuple[int, ...] = ()
    """Layers at which a model of the same shape with random weights is harvested, as a control"""
    sae: SAESettings = SAESettings()
    probe: ProbeSettings = ProbeSettings()
    steer: SteerSettings = SteerSettings()
    truncation: int = Field(default=40, description="Held-out problems on which the truncated reward is run and timed.")
    rl: RLConfig | None = Field(default=None, description="PPO against the probe; default: left out.")
    rl_layer: int | None = Field(default=None, description="Layer of that probe; default: that nearest two thirds.")
    name: str = "reward-features"
    top: int = Field(default=10, description="Examples kept of each feature.")

    def two_thirds(self) -> int:
        """The published claim keeps two thirds of the layers: the layer that is nearest to that, from below."""
        wanted = 2 * self.model.layers / 3
        return max([layer for layer in self.layers if layer + 1 <= wanted] or [min(self.layers)])
