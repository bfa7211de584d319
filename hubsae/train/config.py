"""What a training run is, as data: one frozen model, readable from YAML, every field with its meaning.

The defaults train a TopK SAE the usual way (unit-norm decoder with gradient projection, tied start, AuxK off).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from hubsae.core.config import Architecture
from hubsae.core.errors import ConfigError
from hubsae.core.scopes import excluding
from hubsae.core.settings import Settings


class InitConfig(Settings):
    """How parameters start, where no SAE to start from is given."""

    encoder: Literal["tied", "torch", "kaiming"] = Field(
        default="tied",
        description="tied: the decoder's transpose (of a transcoder, unit directions of its own), a tenth of it for a "
        "jumprelu SAE with no threshold of its own: latents that start open at full strength recover fewer features; "
        "torch: nn.Linear's default; kaiming: kaiming-uniform.",
    )
    decoder: Literal["random", "torch", "kaiming"] = Field(
        default="random", description="random: unit directions; torch: nn.Linear's default; kaiming: kaiming-uniform."
    )
    bias: Literal["zeros", "mean", "geometric_median"] = Field(
        default="mean", description="Start of the pre-bias (of b_dec where they are tied or there is none)."
    )
    rows: int = Field(default=65_536, ge=1, description="Rows of data the mean or median is taken over.")
    threshold: float | None = Field(
        default=None, gt=0, description="jumprelu: first threshold of every latent; default 0.01."
    )


class AuxConfig(Settings):
    """AuxK: a second reconstruction by dead latents alone, so that they get a gradient."""

    coefficient: float = Field(1 / 32, ge=0)
    k: int | None = Field(default=None, ge=1, description="Dead latents per token; default: half of d_in.")
    target: Literal["residual", "full"] = Field(
        default="residual",
        description="residual: what the SAE left over (Gao et al.); full: the activation, with the decoder bias.",
    )
    normalize: bool = Field(default=False, description="Divide by the variance of the target, as Gao et al. do.")
    scale_by_dead: bool = Field(default=False, description="Multiply by min(1, dead / k), as SAELens does.")


class ResampleConfig(Settings):
    """Giving dead latents a new start."""

    method: Literal["worst_tokens", "anthropic"] = Field(
        default="worst_tokens",
        description="worst_tokens: encoder and decoder row := unit vector of a token among the worst reconstructed "
        "quarter, encoder bias 0, optimiser untouched (seed release 000). anthropic: tokens drawn by squared loss, "
        "decoder row := unit vector of the centred token, encoder row the same at 0.2 times the mean norm of living "
        "ones, bias 0, optimiser state of the latent reset.",
    )
    every_epochs: int | None = Field(
        default=None, ge=1, description="After each this many epochs, but not after the last."
    )
    at_steps: tuple[int, ...] = Field(default=(), description="Or after these steps.")
    tokens: int = Field(default=8_192, ge=1, description="Random training tokens to choose from.")

    def due(self, step: int, epoch: int) -> bool:
        """Whether to resample after this step; `epoch` counts those that end with it, 0 where none does."""
        return step in self.at_steps or bool(self.every_epochs and epoch and epoch % self.every_epochs == 0)


class DeadConfig(Settings):
    """When a latent counts as dead, and what is done about it."""

    rule: Literal["tokens", "frequency"] = Field(
        default="tokens",
        description="tokens: not fired for this many; frequency: fired on too few tokens of the last epoch.",
    )
    tokens: int = Field(default=10_000_000, ge=1)
    frequency: float = Field(default=1e-4, gt=0)
    resample: ResampleConfig | None = None


class ScheduleConfig(Settings):
    """Learning rate over the run: warm-up, then a shape."""

    shape: Literal["constant", "cosine", "linear"] = "constant"
    floor: float = Field(default=0.0, ge=0, le=1, description="Last learning rate, as a share of lr (cosine, linear).")
    warmup_steps: int = Field(default=0, ge=0)
    warmup_tokens: int = Field(default=0, ge=0, description="In place of warmup_steps.")
    cooldown_steps: int = Field(
        default=0,
        ge=0,
        description="The shape ends this many steps before the run does; from there linearly to 0 (with shape: "
        "constant, a linear decay at the end).",
    )


class SparsityConfig(Settings):
    """Penalties of the architectures whose sparsity is trained and not chosen."""

    l1: float = Field(default=0.0, ge=0, description="relu, gated: coefficient of Σ z, mean over tokens.")
    l0: float = Field(
        default=0.0, ge=0, description="jumprelu: coefficient of L0, or of (L0/target - 1)² with a target."
    )
    l0_target: float | None = Field(default=None, gt=0)
    bandwidth: float = Field(
        default=0.05,
        gt=0,
        description="jumprelu: width of the straight-through estimator, in units of the pre-activations; with a narrow "
        "one few tokens come near enough to a threshold to move it.",
    )
    train_threshold: bool = Field(
        default=True,
        description="jumprelu: false leaves every threshold at init.threshold, so that nothing sets the sparsity.",
    )
    threshold_lr: float = Field(
        default=1.0, gt=0, description="jumprelu: learning rate of the thresholds, as a multiple of lr."
    )
    warmup_steps: int = Field(default=0, ge=0, description="The coefficient rises linearly from 0 over these steps.")
    warmup_tokens: int = Field(default=0, ge=0, description="In place of warmup_steps.")


class TrainConfig(Settings):
    """One training run.

    >>> TrainConfig(architecture="topk", expansion=8, k=64, batch_size=512).width(896)
    7168
    """

    name: str = Field(default="sae", description="Name of the run, also of its cell in train_many.")

    # the SAE
    architecture: Architecture = "topk"
    d_sae: int | None = Field(default=None, ge=1, description="Number of latents, or give expansion.")
    expansion: float | None = Field(default=None, gt=0, description="d_sae as a multiple of d_in.")
    k: int | None = Field(default=None, ge=1, description="topk, batch_topk: latents per token.")
    topk_relu: bool = Field(default=True, description="topk: whether a ReLU follows the selection.")
    pre_bias: Literal["tied", "untied", "none"] = Field(
        default="tied",
        description="What is subtracted before encoding: b_dec, a bias of its own (seed release 000), or nothing. A "
        "transcoder's b_dec lies at its output, so there the default is untied; it folds into b_enc.",
    )
    skip: bool = Field(
        default=False, description="Transcoders (pairs of hook points): a matrix from the input to the output as well."
    )
    matryoshka: tuple[int | float, ...] = Field(
        default=(), description="Prefixes (widths, or shares below 1) that must reconstruct alone; d_sae is added."
    )
    init: InitConfig = InitConfig()

    # the data
    batch_size: int = Field(default=4_096, ge=1, description="Tokens per step, over all ranks.")
    epochs: float = Field(default=1.0, gt=0)
    tokens: int | None = Field(default=None, ge=1, description="Stop after this many tokens; overrides epochs.")
    data_seed: int = Field(
        default=0, description="Order of the data; apart from `seed`, so that seeds can share a stream."
    )
    val_fraction: float = Field(default=0.0, ge=0, lt=1, description="Tail of an in-memory tensor kept for validation.")
    normalize: Literal["none", "mean_std", "center_scalar", "scalar"] = Field(
        default="none",
        description="Input space: per-dimension mean and std; mean and one global std; or one scale that makes the "
        "mean norm sqrt(d_in). Folded into the weights of the result.",
    )
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Groups of tokens to leave out, by name: position_0, special, massive, template, role=user, or any "
        "boolean label column. Part of the SAE's record: its own scope is what is left.",
    )
    max_norm_factor: float | None = Field(
        default=None,
        gt=0,
        description="Leave out massive tokens: those whose norm is above this multiple of the median norm (exclude: "
        "[massive] alone means 10).",
    )

    # the loss
    loss: Literal["mean", "sum", "fvu"] = Field(
        default="mean",
        description="Squared error: mean over elements; summed over dimensions, mean over tokens; or divided by the "
        "batch's variance.",
    )
    sparsity: SparsityConfig = SparsityConfig()
    aux: AuxConfig | None = None
    dead: DeadConfig = DeadConfig()

    # the optimiser
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
    clip: float | None = Field(default=None, gt=0, description="Largest gradient norm. Costs a stored gradient.")
    accumulate: int = Field(default=1, ge=1, description="Split each batch into this many parts (memory).")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: the encoder product in bf16, so an approximate selection; with kernels: triton what entries "
        "gather from is rounded too.",
    )
    kernels: Literal["torch", "triton"] = Field(
        default="torch",
        description="torch runs everywhere; triton, on CUDA, encodes and selects in one kernel and updates in one: the "
        "same numbers in fp32 up to rounding.",
    )
    unit_norm: bool = Field(default=True, description="Decoder rows are rescaled to norm one after each step.")
    project: bool = Field(default=True, description="The part of a decoder row's gradient along the row is removed.")
    seed: int = Field(default=0, description="Initialisation and resampling.")

    # while it runs
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between validations; default: each epoch's end."
    )
    eval_rows: int = Field(default=65_536, ge=1, description="Most validation rows used.")
    log_every: int = Field(default=50, ge=1, description="Steps between log lines.")
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="Steps between checkpoints; default: epoch ends."
    )
    keep_best: int = Field(default=1, ge=0, description="Checkpoints kept by metric, besides the last.")
    metric: Literal["val_mse", "val_fvu", "train_loss"] | None = Field(
        default=None, description="What best means; default val_mse, or train_loss without validation data."
    )
    select: Literal["last", "best"] = Field(default="best", description="Which checkpoint the result is.")
    loggers: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ()
    project_name: str = Field(default="hubsae", description="Project in trackio or wandb.")
    exports: tuple[Literal["safetensors", "pt", "onnx"], ...] = Field(
        default=("safetensors",), description="What the final SAE is written as, in the run folder."
    )
    parallel: Literal["data", "latent", "none"] = Field(
        default="data", description="Under torchrun: what is split across ranks; none: each rank trains alone."
    )
    record: dict[str, Any] = Field(
        default_factory=dict,
        description="Sections of metadata.json to carry along, such as hook: {layer: 18} or base_model: {id: ...}.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.d_sae is None) == (self.expansion is None):
            raise ValueError("give d_sae or expansion, one of them")
        if self.architecture in ("topk", "batch_topk"):
            if self.k is None:
                raise ValueError(f"{self.architecture} needs k, the number of latents kept per token")
            if self.d_sae is not None and self.k > self.d_sae:
                raise ValueError(f"k={self.k} is larger than d_sae={self.d_sae}")
        elif self.k is not None:
            raise ValueError(f"k says nothing for {self.architecture}; its sparsity follows from sparsity.l1 / l0")
        if self.matryoshka and self.architecture not in ("topk", "batch_topk"):
            raise ValueError("matryoshka prefixes are for topk and batch_topk")
        if not self.topk_relu and self.architecture != "topk":
            raise ValueError("topk_relu=False means signed top-k; it is for topk only")
        if self.sparsity.l0 and self.architecture != "jumprelu":
            raise ValueError("sparsity.l0 is for jumprelu; relu and gated take sparsity.l1")
        if self.sparsity.l1 and self.architecture not in ("relu", "gated"):
            raise ValueError("sparsity.l1 is for relu and gated; jumprelu takes sparsity.l0")
        if self.aux is not None and self.architecture == "gated":
            raise ValueError("gated SAEs have an auxiliary loss of their own; leave aux out")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
        if self.accumulate > 1 and self.architecture == "batch_topk":
            raise ValueError("batch_topk selects over the whole batch, so it cannot be accumulated in parts")
        by_variance = self.loss == "fvu" or (self.aux is not None and self.aux.normalize)
        if self.accumulate > 1 and (self.sparsity.l0_target is not None or by_variance):
            what = "an L0 target, the fvu loss and aux.normalize"
            raise ValueError(f"{what} look at the whole batch; they cannot be accumulated in parts")
        excluding(self.exclude)
        return self

    @property
    def excluded(self) -> tuple[str, ...]:
        """The groups of tokens to leave out, massive ones among them where only their factor is said."""
        return tuple(dict.fromkeys((*self.exclude, *(("massive",) if self.max_norm_factor is not None else ()))))

    def check(self, d_in: int) -> None:
        """Raise what only the width of the activations shows."""
        width = self.width(d_in)
        if self.k is not None and self.k > width:
            raise ConfigError(f"{self.name}: k={self.k} is larger than d_sae={width}", "lower k or raise the expansion")

    def for_target(self, d_out: int | None) -> TrainConfig:
        """The settings on activations with a target of width d_out, or without; raises what cannot be done there."""
        if d_out is None:
            if self.skip:
                raise ConfigError(
                    f"{self.name}: skip is for transcoders, and these activations are of one hook point",
                    hint="train on a pair: data.target, live.targets (hubsae train), harvested.pair(input, output)",
                )
            return self
        if self.architecture == "gated":
            raise ConfigError(f"{self.name}: there is no gated transcoder", hint="use topk, batch_topk, jumprelu, relu")
        if self.pre_bias != "tied":
            return self
        if "pre_bias" in self.model_fields_set:
            raise ConfigError(
                f"{self.name}: a transcoder's b_dec lies at its output, so it cannot be subtracted from the input",
                hint="pre_bias: untied, or none",
            )
        return self.model_copy(update={"pre_bias": "untied"})

    def steps(self, rows: int) -> tuple[int, int]:
        """Steps of an epoch over `rows` tokens, and of the whole run."""
        per_epoch = rows // self.batch_size
        if per_epoch == 0:
            raise ConfigError(
                f"batch_size {self.batch_size} is larger than the data ({rows} rows)",
                hint=f"set batch_size to at most {rows}",
            )
        wanted = self.tokens // self.batch_size if self.tokens is not None else round(self.epochs * per_epoch)
        return per_epoch, max(1, wanted)

    def width(self, d_in: int) -> int:
        """Number of latents for activations of this width."""
        return self.d_sae if self.d_sae is not None else round((self.expansion or 0) * d_in)

    def prefixes(self, d_sae: int) -> tuple[int, ...]:
        """Matryoshka prefixes as widths, rising, the full width last; just the full width where there are none."""
        widths = {round(p * d_sae) if p < 1 else int(p) for p in self.matryoshka} | {d_sae}
        return tuple(sorted(w for w in widths if 0 < w <= d_sae))
