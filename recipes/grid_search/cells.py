"""A cell of the sweep: what is trained, what it is called, and which cells it can be compared with.

TopK_exp8x_k64              TopK
BatchTopK_exp8x_k64         BatchTopK, inference by a stored threshold
JumpReLU_exp8x_t0.5         every threshold fixed at 0.5, no penalty: what the published sweep seems to have used
JumpReLU-STE_exp8x_l64      thresholds trained through a straight-through estimator towards an L0 of 64
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from hubsae.core.errors import ConfigError

Kind = Literal["topk", "batch_topk", "jumprelu_fixed", "jumprelu_trained"]

KINDS: dict[str, str] = {
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "jumprelu_fixed": "JumpReLU",
    "jumprelu_trained": "JumpReLU-STE",
}
"""Kind -> the `Type` of ids and tables."""

LABELS: dict[str, str] = {
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "jumprelu_fixed": "JumpReLU, fixed threshold",
    "jumprelu_trained": "JumpReLU, trained threshold",
}
"""Kind -> what a person reads in plots and findings."""

_LETTER = {"topk": "k", "batch_topk": "k", "jumprelu_fixed": "t", "jumprelu_trained": "l"}
_NAME = re.compile(
    r"^(?P<type>TopK|BatchTopK|JumpReLU-STE|JumpReLU)_exp(?P<exp>[0-9.]+)x_(?P<letter>[ktl])(?P<number>[0-9.e+-]+?)"
    r"(?:_s(?P<seed>[0-9]+))?$"
)


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the sweep.

    >>> Cell("batch_topk", 8, 220).id, Cell("jumprelu_fixed", 4, 0.5).id, Cell("topk", 8, 64, seed=1).id
    ('BatchTopK_exp8x_k220', 'JumpReLU_exp4x_t0.5', 'TopK_exp8x_k64_s1')
    """

    kind: Kind
    expansion: float
    number: float
    """k, the fixed threshold, or the L0 that is aimed at."""
    seed: int = 0

    @property
    def id(self) -> str:
        """The id in the release; a seed other than 0 is part of it."""
        seed = f"_s{self.seed}" if self.seed else ""
        return f"{KINDS[self.kind]}_exp{self.expansion:g}x_{_LETTER[self.kind]}{self.number:g}{seed}"

    @property
    def k(self) -> int | None:
        """Latents per token, for the kinds that choose them."""
        return int(self.number) if self.kind in ("topk", "batch_topk") else None

    @property
    def threshold(self) -> float | None:
        """The fixed threshold, for the kind that has one."""
        return self.number if self.kind == "jumprelu_fixed" else None

    @property
    def l0_target(self) -> float | None:
        """The L0 that training aims at, for the kind that does."""
        return self.number if self.kind == "jumprelu_trained" else None

    def d_sae(self, d_in: int) -> int:
        """Number of latents."""
        return round(self.expansion * d_in)

    def twin(self, kind: Kind) -> Cell:
        """The cell of another kind at the same expansion, number and seed."""
        return Cell(kind, self.expansion, self.number, self.seed)


def parse_id(name: str) -> Cell:
    """The cell an id stands for.

    >>> parse_id("JumpReLU-STE_exp8x_l64") == Cell("jumprelu_trained", 8, 64)
    True
    """
    match = _NAME.match(name)
    kinds = {label: kind for kind, label in KINDS.items()}
    kind = kinds.get(match["type"]) if match else None
    if match is None or kind is None or _LETTER[kind] != match["letter"]:
        raise ConfigError(
            f"{name!r} is not the id of a grid cell",
            hint="such as TopK_exp8x_k64, BatchTopK_exp8x_k64, JumpReLU_exp8x_t0.5 or JumpReLU-STE_exp8x_l64",
        )
    return Cell(kind, float(match["exp"]), float(match["number"]), int(match["seed"] or 0))  # pyright: ignore[reportArgumentType]
