"""Settings of a grid search: the model and texts, the sweep, how cells are trained and measured."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from hubsae.core.settings import Settings
from hubsae.recipes.one_layer import LayerData, items
from hubsae.recipes.subject import ModelSettings

from .cells import Cell, Kind


class GridData(LayerData):
    """The texts and the place where activations are read."""

    chat: bool = Field(
        default=False,
        description="Question and answer in the chat template; otherwise the bare question, as published.",
    )
    prompts: int | None = Field(default=None, ge=2, description="Training prompts used; default: all.")
    max_tokens: int | None = Field(default=None, ge=1000, description="Activations harvested; default: all.")
    max_length: int | None = 512
    texts: int = Field(default=200, ge=2, description="Test texts on which the loss is measured.")
    text_length: int | None = Field(default=None, description="Tokens kept of each test text; default: max_length.")

    def items(self, rows: list[dict[str, Any]]) -> list[Any]:
        """Rows as `harvest` and `splice` take them: conversations, or bare texts."""
        if not (self.chat and rows and "question" in rows[0]):
            return items(rows)
        turns = (("user", "question"), ("assistant", "answer"))
        return [{"messages": [{"role": role, "content": row[key]} for role, key in turns]} for row in rows]

    @property
    def described(self) -> str:
        """For the record."""
        if self.kind != "problems":
            return "conversations in the chat template" if self.kind == "chats" else "plain text"
        return "question and answer in the chat template" if self.chat else "the bare question"


class SweepSettings(Settings):
    """The cells: every kind at every expansion with each of its numbers."""

    kinds: tuple[Kind, ...] = ("topk", "batch_topk", "jumprelu_fixed", "jumprelu_trained")
    expansions: tuple[float, ...] = (4, 8, 16)
    ks: tuple[int, ...] = (32, 64, 128, 220)
    thresholds: tuple[float, ...] = Field(default=(), description="jumprelu_fixed: thresholds, in training space.")
    l0_targets: tuple[float, ...] = Field(default=(), description="jumprelu_trained: L0 to aim at; default: the ks.")
    seeds: tuple[int, ...] = (0,)

    @model_validator(mode="after")
    def _some(self) -> SweepSettings:
        if "jumprelu_fixed" in self.kinds and not self.thresholds:
            raise ValueError("jumprelu_fixed needs thresholds")
        if not self.cells():
            raise ValueError("the sweep has no cell")
        return self

    def cells(self) -> list[Cell]:
        """Every cell of the sweep, in a fixed order.

        >>> sweep = SweepSettings(kinds=("topk", "batch_topk"), expansions=(4,), ks=(8, 16))
        >>> [cell.id for cell in sweep.cells()]
        ['TopK_exp4x_k8', 'TopK_exp4x_k16', 'BatchTopK_exp4x_k8', 'BatchTopK_exp4x_k16']
        """
        numbers = {
            "topk": self.ks,
            "batch_topk": self.ks,
            "jumprelu_fixed": self.thresholds,
            "jumprelu_trained": self.l0_targets or self.ks,
        }
        return [
            Cell(kind, float(expansion), float(number), seed)
            for kind in dict.fromkeys(self.kinds)
            for expansion in dict.fromkeys(self.expansions)
            for number in dict.fromkeys(numbers[kind])
            for seed in dict.fromkeys(self.seeds)
        ]


class JumpReLUSettings(Settings):
    """How thresholds are trained. The first one is where random directions have the L0 that is asked for.

    Measured on the tiny world (8x, target 16): thresholds that learn no faster than the weights stop at an L0 of 6.7;
    at ten times the rate it is 15.9 and the error half.
    """

    coefficient: float = Field(default=1.0, gt=0, description="Of (L0 / target - 1)².")
    bandwidth: float = Field(
        default=0.5, gt=0, description="Width of the straight-through estimator, as a share of the first threshold."
    )
    lr: float = Field(default=10.0, gt=0, description="Learning rate of the log thresholds, as a multiple of train.lr.")
    warmup: float = Field(default=0.2, ge=0, lt=1, description="Share of the steps over which the coefficient rises.")


class TrainSettings(Settings):
    """How every cell is trained: what they share, so that one pass over the data serves them all."""

    exclude: tuple[str, ...] = Field(
        default=(), description="Token groups the SAEs are not for: position_0, special, massive ..."
    )
    epochs: float = Field(default=10, gt=0)
    batch_size: int = Field(default=512, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    floor: float = Field(default=0.0, ge=0, le=1, description="Last learning rate of the cosine, as a share of lr.")
    normalize: Literal["none", "mean_std", "center_scalar", "scalar"] = Field(
        default="none",
        description="Training space; folded into the published weights. Thresholds are in it.",
    )
    init: Literal["tied", "torch"] = Field(
        default="tied", description="tied: encoder := decoder's transpose; torch: nn.Linear."
    )
    bias: Literal["mean", "zeros"] = Field(default="mean", description="Start of the pre-bias.")
    project: bool = Field(default=True, description="Take the part along a decoder row out of its gradient.")
    aux: float | None = Field(default=None, gt=0, description="AuxK coefficient (1/32 is usual); none as published.")
    dead_tokens: int = Field(default=100_000, ge=1, description="AuxK takes up latents silent for this many tokens.")
    jumprelu: JumpReLUSettings = JumpReLUSettings()
    checkpoints: int = Field(default=10, ge=1, description="States a group leaves over its run, to resume from.")
    memory_gb: float | None = Field(
        default=None, gt=0, description="Cells trained together may take this much; default: most of what is free."
    )

    @property
    def memory_bytes(self) -> int | None:
        """`memory_gb` in bytes."""
        return None if self.memory_gb is None else int(self.memory_gb * 2**30)


class SyntheticSettings(Settings):
    """Data with known features, on which the same trainer is checked."""

    d_in: int = 64
    features: int = 256
    l0: float = 8.0
    spread: float = 4.0
    noise: float = 0.02
    tokens: int = 40_000
    expansions: tuple[float, ...] = (1, 2, 4)
    ks: tuple[int, ...] = (8,)
    kinds: tuple[Kind, ...] = ("topk", "batch_topk", "jumprelu_trained")
    epochs: float = 10
    batch_size: int = 512
    lr: float = 3e-3

    def sweep(self) -> SweepSettings:
        """Its cells."""
        return SweepSettings(kinds=self.kinds, expansions=self.expansions, ks=self.ks)


class ReleaseSettings(Settings):
    """What the packaged release is called."""

    name: str = "sae-grid-search"
    license: str | None = "apache-2.0"


class GridConfig(Settings):
    """A grid search.

    >>> GridConfig(model={"id": "tiny"}, data={"id": "tiny", "chat": True, "layer": 2},
    ...            sweep={"kinds": ["topk"], "expansions": [2], "ks": [4]}).sweep.cells()[0].id
    'TopK_exp2x_k4'
    """

    seed: int = Field(default=0, description="Order and split of the data; added to each cell's own seed.")
    model: ModelSettings
    data: GridData
    sweep: SweepSettings
    train: TrainSettings = TrainSettings()
    synthetic: SyntheticSettings = SyntheticSettings()
    release: ReleaseSettings = ReleaseSettings()
