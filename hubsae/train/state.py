"""Parameters and optimiser state of one or several SAEs that train side by side.

A bank holds the matrices of all its cells one under another, latent-major: row j of `W_enc` and of `W_dec` is what
latent j reads and writes. Rows are contiguous, so they gather well, normalise in place, and one call can update
the latents of several cells. A cell sees its own rows as views. A single SAE is a bank of one cell.

Beside the matrices and their moments (12 bytes per weight in all with float32) nothing of that size exists, unless
clipping, accumulation or data-parallel training ask for a stored gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hubsae.core.errors import HubSAEError, TrainingError
from hubsae.core.sae import SAE
from hubsae.train.best import Best
from hubsae.train.config import TrainConfig

MATRICES = ("W_enc", "W_dec", "m_enc", "v_enc", "m_dec", "v_dec")
SHARED = ("b_dec", "b_pre", "W_skip")
"""Parameters that do not belong to one latent."""
SCALARS = ("keeps_norms", "threshold", "tokens", "tokens_in_epoch", "first_loss", "sums", "resampled", "measured")


class Cell:
    """One SAE in a bank: its settings, its rows, its vectors, its counters."""

    def __init__(self, config: TrainConfig, bank: Bank, index: int, low: int, n: int):
        self.config, self.index = config, index
        self.low, self.high, self.n = low, low + n, n
        rows = slice(self.low, self.high)
        self.W_enc, self.W_dec = bank.W_enc[rows], bank.W_dec[rows]
        self.m_enc, self.v_enc = bank.m_enc[rows], bank.v_enc[rows]
        self.m_dec, self.v_dec = bank.m_dec[rows], bank.v_dec[rows]
        d, options = bank.d_in, {"device": bank.device, "dtype": bank.dtype}
        self.vectors: dict[str, Tensor] = {"b_enc": torch.zeros(n, **options), "b_dec": bank.b_dec[index]}
        if config.pre_bias == "untied":
            self.vectors["b_pre"] = torch.zeros(d, **options)
        if config.skip:
            self.vectors["W_skip"] = torch.zeros(bank.d_out, d, **options)
        if config.architecture == "jumprelu":
            self.vectors["theta"] = torch.zeros(n, **options)
        if config.architecture == "gated":
            # b_enc is the gate's bias
            self.vectors |= {"b_mag": torch.zeros(n, **options), "r_mag": torch.zeros(n, **options)}
        self.m = {name: torch.zeros_like(v) for name, v in self.vectors.items()}
        self.v = {name: torch.zeros_like(v) for name, v in self.vectors.items()}
        self.step = torch.zeros((), dtype=torch.float32, device=bank.device)
        self.threshold: float | None = None
        self.last_threshold = 0.0
        """Smallest value of the last batch's selection; speeds up the next one, changes nothing."""
        self.widest = 0
        """jumprelu with Triton kernels: most entries of a row when the selection last looked."""
        self.tokens = 0
        self.since_fired, self.fired_in_epoch = bank.since_fired[rows], bank.fired_in_epoch[rows]
        self.tokens_in_epoch = 0
        self.dead_last_epoch = torch.zeros(n, dtype=torch.bool, device=bank.device)
        self.row_norms = bank.row_norms[rows]
        """Norms that `unit_norm` keeps the decoder's rows at; other than one after a warm start from other norms."""
        self.generator = torch.Generator().manual_seed(config.seed)
        self.lr: float | Tensor = config.lr
        self.sparsity = 1.0
        self.failed: HubSAEError | None = None
        self.parent: SAE | None = None
        """The SAE it started from."""
        self.keeps_norms = False
        """Whether `row_norms` are other than one."""
        self.best = Best(None, config.keep_best)
        self.first_loss: float | None = None
        self.now: dict[str, Any] = {}
        """Statistics of the step it is in."""
        self.sums = [0.0, 0.0, 0.0]
        """Loss, L0 and steps since the last evaluation."""
        self.resampled = 0
        self.measured: dict[str, float] = {}
        """The last evaluation."""
        self.watch: Tensor | None = None
        """Where losses are not waited for [4]: the first loss; the first insane one, its step (-1: none), bad data."""
        self.prefixes = config.prefixes(n)
        self.offset = 0
        """First latent of this rank's share, where a dictionary is split across ranks."""
        self.total = n
        """Latents over all ranks."""

    @property
    def center(self) -> Tensor | None:
        """What is subtracted before encoding [d_in]."""
        return {"tied": self.vectors["b_dec"], "untied": self.vectors.get("b_pre"), "none": None}[self.config.pre_bias]

    @property
    def signed(self) -> bool:
        """Whether negative values pass (top-k without ReLU)."""
        return self.config.architecture == "topk" and not self.config.topk_relu

    @property
    def unit_rows(self) -> bool:
        """Whether the decoder's rows are known to have norm one: then a projection needs no division."""
        return self.config.unit_norm and not self.keeps_norms and self.tokens > 0

    def dead(self) -> Tensor:
        """Which latents count as dead [n] bool."""
        rule = self.config.dead
        if rule.rule == "frequency":
            return self.dead_last_epoch
        return self.since_fired >= rule.tokens

    def end_epoch(self) -> None:
        """Close the books of an epoch: the frequency rule looks at the last whole one."""
        if self.tokens_in_epoch:
            self.dead_last_epoch = self.fired_in_epoch < self.config.dead.frequency * self.tokens_in_epoch
        self.fired_in_epoch.zero_()
        self.tokens_in_epoch = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name; views, so that a checkpoint can be copied into them."""
        out = {name: getattr(self, name) for name in MATRICES}
        for prefix, group in (("", self.vectors), ("m.", self.m), ("v.", self.v)):
            out |= {prefix + name: tensor for name, tensor in group.items()}
        out |= {"step": self.step, "since_fired": self.since_fired, "fired_in_epoch": self.fired_in_epoch}
        out |= {"dead_last_epoch": self.dead_last_epoch, "row_norms": self.row_norms}
        out |= {"generator": self.generator.get_state()}
        return out

    def settle(self) -> tuple[float, int, bool] | None:
        """Read what stayed on the device; the first insane loss, its step and whether its data were bad, if any."""
        if self.watch is None:
            return None
        first, loss, step, bad = self.watch.tolist()
        self.first_loss = None if math.isnan(first) else first
        self.sums = [float(value) for value in self.sums]
        return (loss, int(step), bool(bad)) if step >= 0 else None

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, JSON."""
        self.settle()
        failed = None if self.failed is None else self.failed.message
        return {name: getattr(self, name) for name in SCALARS} | {"best": self.best.kept, "failed": failed}

    def load(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """The inverse of `tensors` and `scalars`, in place."""
        for name, mine in self.tensors().items():
            if name == "generator":
                self.generator.set_state(tensors[name])
            else:
                mine.copy_(tensors[name])
        for name in SCALARS:
            setattr(self, name, scalars[name])
        self.best.kept = list(scalars["best"])
        self.failed = None if scalars["failed"] is None else TrainingError(scalars["failed"])


class Bank:
    """Cells of one width d_in, on one device, fed the same batches. Transcoders have another width at the output.

    >>> bank = Bank([TrainConfig(d_sae=8, k=2), TrainConfig(d_sae=16, k=2)], d_in=4)
    >>> bank.W_enc.shape, bank.cells[1].W_enc.shape
    (torch.Size([24, 4]), torch.Size([16, 4]))
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        d_in: int,
        *,
        d_out: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        shares: Sequence[tuple[int, int]] | None = None,
    ):
        self.d_in, self.device, self.dtype = d_in, torch.device(device), dtype
        self.d_out = d_in if d_out is None else d_out
        widths = [config.width(d_in) for config in configs]
        held = [(0, width) for width in widths] if shares is None else list(shares)
        total = sum(high - low for low, high in held)
        for name in MATRICES:
            width = self.d_out if name.endswith("_dec") else d_in
            setattr(self, name, torch.zeros(total, width, device=self.device, dtype=dtype))
        self.b_dec = torch.zeros(len(configs), self.d_out, device=self.device, dtype=dtype)
        self.since_fired = torch.zeros(total, dtype=torch.int64, device=self.device)
        self.fired_in_epoch = torch.zeros_like(self.since_fired)
        self.row_norms = torch.ones(total, 1, device=self.device, dtype=dtype)
        self.cells: list[Cell] = []
        low = 0
        for index, (config, width, share) in enumerate(zip(configs, widths, held, strict=True)):
            cell = Cell(config, self, index, low, share[1] - share[0])
            cell.offset, cell.total, cell.prefixes = share[0], width, config.prefixes(width)
            self.cells.append(cell)
            low = cell.high
        self.edges = torch.tensor([*(cell.low for cell in self.cells), low], device=self.device)
        """[cells + 1] first latent of each cell, and the end."""
        self._stored: tuple[Tensor, Tensor] | None = None
        self.graph: Any = 0
        """The CUDA graph of a step; until it is taken, how many steps ran without; None where it cannot be."""

    W_enc: Tensor
    W_dec: Tensor
    m_enc: Tensor
    v_enc: Tensor
    m_dec: Tensor
    v_dec: Tensor

    @property
    def n(self) -> int:
        """Latents of all cells."""
        return self.W_enc.shape[0]

    @property
    def live(self) -> list[Cell]:
        """Cells that have not failed."""
        return [cell for cell in self.cells if cell.failed is None]

    def count(self, fired: Tensor, tokens: int) -> None:
        """Note on how many of `tokens` tokens each latent fired [n]."""
        self.count_tokens(tokens)
        self.count_fired(fired, tokens)

    def count_tokens(self, tokens: int) -> None:
        """The half of `count` that is the host's."""
        for cell in self.live:
            cell.tokens += tokens
            cell.tokens_in_epoch += tokens

    def count_fired(self, fired: Tensor, tokens: int) -> None:
        """The half of `count` that is the device's."""
        self.fired_in_epoch += fired
        self.since_fired += tokens
        self.since_fired.masked_fill_(fired > 0, 0)

    def stored_gradients(self) -> tuple[Tensor, Tensor]:
        """Buffers for whole gradients of W_enc and W_dec, made when first asked for."""
        if self._stored is None:
            self._stored = (torch.zeros_like(self.W_enc), torch.zeros_like(self.W_dec))
        return self._stored
