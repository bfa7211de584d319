"""What a run of the release depends on, section by section; the YAML profiles fill it in."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from hubsae.activations.dataset import WINDOW_BYTES
from hubsae.core.settings import Settings
from hubsae.recipes.one_layer import LayerData
from hubsae.recipes.standard import PublishSettings
from hubsae.recipes.subject import ModelSettings
from hubsae.train import TrainConfig
from hubsae.train.config import AuxConfig, DeadConfig, ResampleConfig, ScheduleConfig

Variant = Literal["plain", "centred", "normalised", "auxk", "resampled", "batch_topk", "release"]


class ReleaseData(LayerData):
    """The conversations, the place where activations are read, and how."""

    validation_fraction: float = Field(default=0.08, gt=0, lt=1, description="Share of conversations put aside.")
    attention: str = Field(default="sdpa", description="Attention of the model; a run with another is refused.")


class LiveSettings(Settings):
    """Training on activations as the model makes them; the harvest is then for statistics, measures and index."""

    on: bool = False
    buffer_rows: int = Field(default=65_536, ge=4, description="Tokens that are mixed with each other.")


class SAESettings(Settings):
    """The SAE, and how it is trained."""

    expansion: int = 16
    k: int = 64
    normalize: Literal["mean_std", "none"] = "mean_std"
    window_bytes: int = Field(default=WINDOW_BYTES, ge=1, description="Activations of the harvest shuffled together.")
    prefetch: int = Field(default=0, ge=0, description="Windows of them read ahead.")
    exclude: tuple[str, ...] = Field(default=("position_0",), description="Groups of tokens it is not for.")
    pre_bias: Literal["tied", "untied", "none"] = "tied"
    tokens: int = Field(ge=1, description="Training tokens, passes counted.")
    batch_size: int = 32_768
    lr: float = 3e-4
    warmup_tokens: int = 1_000_000
    aux_k: int = 512
    aux_coefficient: float = 1 / 32
    dead_tokens: int = Field(default=10_000_000, description="Dead: not fired for this many training tokens.")
    precision: Literal["fp32", "bf16"] = "fp32"
    save_every: int = Field(default=5_000, ge=1, description="Steps between checkpoints.")
    keep_best: int = 3


class MeasureSettings(Settings):
    """How much every kept checkpoint is measured on; `rows` is all that were put aside unless given."""

    texts: int = Field(default=10, ge=2, description="Conversations on which the loss is measured.")
    text_length: int = 192
    probe_rows: int = Field(default=2_048, description="Activations on which exports are compared.")


class IndexSettings(Settings):
    """What is kept of each feature."""

    top: int = 5
    window: int = 8


class JudgeSettings(Settings):
    """A chat model that names features; without one the index has no labels."""

    model: str
    server: str | None = Field(default=None, description="OpenAI-compatible address; None: transformers loads it.")
    features: int = 100


class SteeringSettings(Settings):
    """The dose-response."""

    features: int = Field(default=8, ge=1)
    strengths: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), description="In units of a feature's own maximum.")
    prompts: int = 16
    prompt_length: int = Field(default=64, description="Only prompts of at most this many tokens.")
    new_tokens: int = 32
    controls: int = Field(default=2, description="Random features, and random directions, beside each feature.")
    rows_at_once: int = 64


class DeadSettings(Settings):
    """The table of dead features: variants on the same data, each over several seeds."""

    variants: tuple[Variant, ...] = (
        "plain", "centred", "normalised", "auxk", "resampled", "batch_topk", "release",
    )  # fmt: skip
    seeds: tuple[int, ...] = (0, 1)
    tokens: int = Field(description="Training tokens of each.")
    lr: float = Field(description="So high that features die within so few tokens.")


class Config(Settings):
    """Everything a run depends on."""

    seed: int = 0
    threads: int | None = Field(default=None, description="Threads of torch; default: as they are.")
    matmul: Literal["auto", "torch"] = Field(default="auto", description="torch: the same bits in every process.")
    model: ModelSettings
    data: ReleaseData
    live: LiveSettings = LiveSettings()
    sae: SAESettings
    exports: tuple[Literal["bundle", "pt", "onnx", "raw"], ...] = ("bundle", "pt", "onnx", "raw")
    measure: MeasureSettings = MeasureSettings()
    index: IndexSettings = IndexSettings()
    judge: JudgeSettings | None = None
    steering: SteeringSettings = SteeringSettings()
    dead: DeadSettings
    from_checkpoint: str | int | None = Field(
        default=None, description="Train no further: publish what a halted run kept; best, last, or a step."
    )
    name: str = "sae-qwen3-release"
    publish: PublishSettings = PublishSettings()

    @model_validator(mode="after")
    def _a_checkpoint(self) -> Config:
        chosen = self.from_checkpoint
        if chosen not in (None, "best", "last") and not str(chosen).isdigit():
            raise ValueError(f"from_checkpoint is best, last or a step, not {chosen!r}")
        return self

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.model.d_model * self.sae.expansion

    def training(self) -> TrainConfig:
        """The run that is released."""
        s = self.sae
        return TrainConfig(
            name="sae", architecture="topk", d_sae=self.d_sae, k=s.k, pre_bias=s.pre_bias, normalize=s.normalize,
            exclude=s.exclude, tokens=s.tokens, batch_size=s.batch_size, lr=s.lr, precision=s.precision,
            schedule=ScheduleConfig(warmup_tokens=s.warmup_tokens), seed=self.seed,
            aux=AuxConfig(coefficient=s.aux_coefficient, k=s.aux_k), dead=DeadConfig(tokens=s.dead_tokens),
            checkpoint_every=s.save_every, eval_every=s.save_every, keep_best=s.keep_best, metric="train_loss",
            select="last",
        )  # fmt: skip

    def variants(self) -> dict[str, TrainConfig]:
        """The cells of the dead-feature table by name, `variant-seed`: one thing changed at a time.

        plain       raw activations, nothing against dead latents
        centred     the mean subtracted, one scale for all dimensions
        normalised  mean and std of each dimension
        auxk        raw, and AuxK
        resampled   raw, and a new start for dead latents three times
        batch_topk  raw, and BatchTopK in place of TopK
        release     what is released: mean and std of each dimension, and AuxK
        """
        # dead within such a short run: not fired for a fifth of it
        dead = DeadConfig(tokens=max(1, self.dead.tokens // 5))
        raw = {"normalize": "none", "pre_bias": "none"}
        aux = AuxConfig(coefficient=self.sae.aux_coefficient, k=self.sae.aux_k)
        base = self.training().model_copy(
            update={
                "aux": None, "dead": dead, "tokens": self.dead.tokens, "lr": self.dead.lr, "keep_best": 0,
                "checkpoint_every": None, "eval_every": None,
                "schedule": ScheduleConfig(warmup_tokens=min(self.sae.warmup_tokens, self.dead.tokens // 10)),
            }
        )  # fmt: skip
        steps = self.dead.tokens // self.sae.batch_size
        again = ResampleConfig(method="anthropic", at_steps=tuple(steps * n // 5 for n in (1, 2, 3) if steps >= 5))
        changes: dict[str, dict[str, Any]] = {
            "plain": raw,
            "centred": {"normalize": "center_scalar"},
            "normalised": {"normalize": "mean_std"},
            "auxk": {**raw, "aux": aux},
            "resampled": {**raw, "dead": dead.model_copy(update={"resample": again})},
            "batch_topk": {**raw, "architecture": "batch_topk"},
            "release": {"aux": aux},
        }
        return {
            f"{name}-{seed}": base.model_copy(update={"name": f"{name}-{seed}", "seed": seed, **changes[name]})
            for name in self.dead.variants
            for seed in self.dead.seeds
        }
