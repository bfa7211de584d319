"""Training sparse autoencoders: `train` one, `train_many` on one stream, `train_chain` in warm-started stages."""

from __future__ import annotations

from hubsae.train.api import train, train_live, train_many
from hubsae.train.chain import ChainResult, StageResult, train_chain
from hubsae.train.config import (
    AuxConfig,
    DeadConfig,
    InitConfig,
    ResampleConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainConfig,
)
from hubsae.train.result import TrainResult

__all__ = [
    "AuxConfig",
    "ChainResult",
    "DeadConfig",
    "InitConfig",
    "ResampleConfig",
    "ScheduleConfig",
    "SparsityConfig",
    "StageResult",
    "TrainConfig",
    "TrainResult",
    "train",
    "train_chain",
    "train_live",
    "train_many",
]
