"""How well SAEs reconstruct activations: one streaming pass, any number of SAEs, every number named.

The pass itself is in `accumulate.py`; here its sums are read off as measures, per-latent statistics, a
density histogram and explained variance by norm decile. The result is the same, bit for bit, for every batch
size and every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.evals.accumulate import Sums, rows_at_once
from hubsae.evals.blocks import BLOCK_ROWS, iter_blocks, read_pieces
from hubsae.evals.read_off import read_off
from hubsae.evals.results import ReconstructionResult

__all__ = ["accumulate", "name_saes", "read_off", "reconstruction"]


def name_saes(saes: Mapping[str, SAE] | Sequence[SAE] | SAE) -> dict[str, SAE]:
    """SAEs by name: the keys given, or their ids, or sae0, sae1, ..."""
    if isinstance(saes, SAE):
        saes = [saes]
    if isinstance(saes, Mapping):
        named = dict(saes)
    else:
        named = {}
        for number, sae in enumerate(saes):
            name = sae.metadata.id or f"sae{number}"
            named[name if name not in named else f"{name}#{number}"] = sae
    if not named:
        raise DataError("no SAEs to evaluate")
    return named


def accumulate(
    saes: Mapping[str, SAE] | Sequence[SAE] | SAE,
    activations: Any,
    *,
    batch_size: int | None = None,
    position: Any = None,
    is_prompt: Any = None,
    sample_id: Any = None,
    rank: int = 0,
    world_size: int = 1,
    on_block: Callable[[int], None] | None = None,
) -> Sums:
    """The sums of a pass, or of one rank's part of it; `merge` them and give them to `read_off`."""
    named = name_saes(saes)
    columns = {"position": position, "is_prompt": is_prompt, "sample_id": sample_id}
    pieces, labels, d = read_pieces(activations, columns, batch_size)
    sums = Sums(named, d, labels)
    for block in iter_blocks(pieces, rank=rank, world_size=world_size):
        sums.add(block, named)
        if on_block is not None:
            on_block(block.x.shape[0])
    return sums


def reconstruction(
    saes: Mapping[str, SAE] | Sequence[SAE] | SAE,
    activations: Any,
    *,
    batch_size: int | None = None,
    position: Any = None,
    is_prompt: Any = None,
    sample_id: Any = None,
    on_block: Callable[[int], None] | None = None,
) -> ReconstructionResult:
    """Evaluate SAEs on the same activations in one pass.

    `activations` is a tensor [tokens, d], a mapping with `x` and label columns, or an ActivationDataset.
    Labels (`position` of the token in its sequence, `is_prompt`, `sample_id`) open the scopes and make the
    intervals those of whole samples. `batch_size` only says how to read; it changes no number. Under torchrun
    ranks share the work and all get the whole result.

    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> x = torch.randn(64, 4, generator=torch.manual_seed(0))
    >>> result = reconstruction(sae, x)
    >>> result["sae0"].value("mse") == reconstruction(sae, x, batch_size=7)["sae0"].value("mse")
    True
    >>> reconstruction(sae, x, position=torch.arange(64) % 8).scopes
    ['all', 'no_position_0', 'position_0']
    """
    named = name_saes(saes)
    rank, world_size = _ranks()
    if world_size > 1:
        _agree_on_products(named, rank)
    sums = accumulate(
        named,
        activations,
        batch_size=batch_size,
        position=position,
        is_prompt=is_prompt,
        sample_id=sample_id,
        rank=rank,
        world_size=world_size,
        on_block=on_block,
    )
    return read_off(sums if world_size == 1 else sums.gather(), named)


def _ranks() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _agree_on_products(saes: Mapping[str, SAE], rank: int) -> None:
    """Which backend multiplies is decided by a timed trial; ranks that decided differently would round differently."""
    import torch.distributed as dist

    from hubsae.kernels.linear import adopt, decisions

    found: list[Any] = [None]
    if rank == 0:
        for sae in {sae.config: sae for sae in saes.values()}.values():
            with torch.no_grad():
                sae.encode_sparse(torch.zeros(rows_at_once(sae.d_sae, BLOCK_ROWS), sae.d_in, device=sae.device))
        found = [decisions()]
    dist.broadcast_object_list(found, src=0)
    adopt(found[0])
