"""Settings of a reinforcement-learning run; the defaults are those of the published chains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from hubsae.core.settings import Settings
from hubsae.rl.policy import LoRA
from hubsae.rl.scorers import SCORERS

METHOD = "PPO: critic and GAE, clipped ratio per token, k1 KL per token in the reward"
"""What is done, for records and cards."""


class RLConfig(Settings):
    """One reinforcement-learning run.

    A step is one rollout batch: `prompts` x `responses` sequences, then `minibatches` updates per epoch.
    """

    scorer: str = "strict"
    """Name of the scorer that gives the reward (hubsae.rl.scorers)."""
    shuffled_gold: bool = False
    """Reward against the gold of another problem: a control whose reward carries no signal."""
    steps: int = Field(116, ge=0)
    save_steps: tuple[int, ...] = (10, 30, 50, 80, 116)
    prompts: int = Field(256, ge=1)
    responses: int = Field(8, ge=1)
    minibatches: int = Field(4, ge=1)
    epochs: int = Field(1, ge=1)
    micro_batch: int = Field(8, ge=1)
    """Sequences per forward and backward."""
    rollout_batch: int = Field(256, ge=1)
    """Sequences generated at a time."""
    lr: float = 1e-6
    critic_lr: float = 1e-5
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    kl_coef: float = 0.005
    gamma: float = 1.0
    lam: float = 1.0
    clip: float = 0.2
    value_clip: float = 0.5
    entropy_coef: float = 0.001
    critic_warmup: int = 0
    """First steps in which only the critic learns."""
    temperature: float = Field(1.0, gt=0)
    max_prompt: int = 512
    max_response: int = 512
    lora: LoRA | None = None
    """None trains all weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forwards; weights and optimiser are float32. float16 would need its gradients scaled."""
    state_every: int = Field(5, ge=1)
    """Steps between the states a killed run continues from."""
    test_every: int = 5
    """Steps between accuracy measurements on held-out problems; 0 for none."""
    test_problems: int = 1319
    test_temperature: float = 0.0
    tracker: Literal["none", "auto", "trackio", "wandb", "tensorboard"] = "none"
    """Where metrics go beside the CSV; auto takes trackio or wandb if installed."""

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, name: str) -> str:
        if name not in SCORERS:
            raise ValueError(f"no such scorer; there are {', '.join(SCORERS)}")
        return name

    @property
    def sequences(self) -> int:
        """Sequences in a rollout batch."""
        return self.prompts * self.responses

    def stage_names(self) -> list[str]:
        """Names of the saved stages, as the published files have them."""
        return [f"ppo_step{step}" for step in self.save_steps if step <= self.steps]
