"""An inference threshold for batch_topk SAEs that were saved without one, estimated on activations."""

from __future__ import annotations

import torch
from torch import Tensor

from hubsae.core.errors import ConfigError, DataError
from hubsae.core.sae import SAE


def estimate_threshold(sae: SAE, activations: Tensor, *, batch_size: int = 4096) -> SAE:
    """The same SAE with a stored threshold, so that codes no longer depend on the batch.

    The threshold is the mean over batches of the middle between the smallest pre-activation that the batch rule keeps
    and the largest that it drops, so that rounding in the product of another batch size moves no latent across it.

    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="batch_topk", d_in=8, d_sae=32, k=2))
    >>> estimate_threshold(sae, torch.randn(512, 8)).config.threshold > 0
    True
    """
    if sae.config.architecture != "batch_topk" or sae.config.k is None:
        raise ConfigError(f"only batch_topk has a threshold to estimate, not {sae.config.selection}")
    flat = activations.reshape(-1, activations.shape[-1])
    batches = [part for part in flat.split(batch_size) if part.shape[0] == min(batch_size, flat.shape[0])]
    if not batches or flat.shape[0] == 0:
        raise DataError("no activations to estimate a threshold on")
    cuts = []
    with torch.no_grad():
        for part in batches:
            positive = sae.pre_activations(part.to(sae.device)).flatten()
            keep = min(sae.config.k * part.shape[0], positive.numel())
            around = torch.topk(positive, min(keep + 1, positive.numel())).values[keep - 1 :].double()
            cuts.append((around.mean() if len(around) > 1 else around[0] - 1).clamp_min(0))
    threshold = float(torch.stack(cuts).mean().float())
    config = sae.config.model_copy(update={"threshold": threshold})
    metadata = sae.metadata.model_copy(update={"config": config}, deep=True)
    setattr(metadata.training, "threshold_source", f"estimated on {len(cuts) * batches[0].shape[0]} tokens")  # noqa: B010
    fixed = SAE.build(config, sae.tensors(), metadata=metadata, normalizer=sae.normalizer, sparsity=sae.sparsity)
    fixed.fingerprint = sae.fingerprint
    return fixed
