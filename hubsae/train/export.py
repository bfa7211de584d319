"""A trained cell as a HubSAE: folded onto raw activations, with the record of how it was trained."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from hubsae.core.config import SAEConfig
from hubsae.core.fold import TrainedTensors, fold
from hubsae.core.metadata import Metadata, Metric
from hubsae.core.normalizer import Normalizer
from hubsae.core.sae import SAE
from hubsae.train.config import TrainConfig
from hubsae.train.state import Cell
from hubsae.version import __version__


def to_sae(
    cell: Cell,
    space: Normalizer | None,
    t: dict[str, Tensor],
    *,
    space_out: Normalizer | None = None,
    transcoder: bool = False,
    **facts: Any,
) -> SAE:
    """The SAE of a cell with weights `t` (as `current` gives them) on raw activations.

    The normaliser and an untied pre-bias fold into the weights exactly; the statistics are kept beside them. So does
    `space_out`, the normaliser of what a transcoder predicts.
    """
    config = cell.config
    center = {"tied": t["b_dec"], "untied": t.get("b_pre"), "none": None}[config.pre_bias]
    gated = config.architecture == "gated"
    biases = {"b_gate": t["b_enc"], "b_mag": t["b_mag"]} if gated else {"b_enc": t["b_enc"]}
    trained = TrainedTensors(
        W_enc=t["W_enc"].float().t().contiguous().cpu(),
        W_dec=t["W_dec"].float().clone().cpu(),
        b_dec=t["b_dec"].float().clone().cpu(),
        pre_bias=None if center is None else center.float().cpu(),
        encoder_biases={name: bias.float().clone().cpu() for name, bias in biases.items()},
        r_mag=t["r_mag"].float().cpu().clone() if gated else None,
        W_skip=t["W_skip"].float().cpu().clone() if config.skip else None,
    )
    mean, std = (None, None) if space is None else (space.mean, space.std)
    output = None if space_out is None else (space_out.mean, space_out.std)
    tensors, subtract = fold(trained, mean, std, output=output, transcoder=transcoder)
    if config.architecture == "jumprelu":
        tensors["threshold"] = t["theta"].float().clone().cpu()
    threshold = facts.pop("threshold")
    sae_config = SAEConfig(
        architecture=config.architecture,
        d_in=t["W_enc"].shape[1],
        d_sae=t["W_enc"].shape[0],
        k=config.k,
        topk_relu=config.topk_relu,
        threshold=threshold if config.architecture == "batch_topk" else None,
        apply_b_dec_to_input=subtract,
        d_out=t["W_dec"].shape[1] if transcoder else None,
        skip=config.skip or None,
    )
    return SAE.build(sae_config, tensors, metadata=record(config, sae_config, space, **facts), normalizer=space)


def current(cell: Cell) -> dict[str, Tensor]:
    """The weights of a cell, as they are."""
    return {"W_enc": cell.W_enc, "W_dec": cell.W_dec, **cell.vectors}


def record(
    config: TrainConfig,
    sae_config: SAEConfig,
    space: Normalizer | None,
    *,
    steps: int = 0,
    tokens: int = 0,
    epochs: float | None = None,
    metrics: list[Metric] | None = None,
    parent: dict[str, Any] | None = None,
    selection: str | None = None,
    resampled: int = 0,
    split: str | None = None,
    exclude: list[str] | None = None,
    massive_above: float | None = None,
    sections: dict[str, Any] | None = None,
) -> Metadata:
    """metadata.json of a training run; what is known besides, in `sections`, takes precedence."""
    s = config.schedule
    schedule = s.shape if s.shape == "constant" else f"{s.shape} to {s.floor:g} of the peak"
    if s.warmup_tokens or s.warmup_steps:
        schedule = f"{s.warmup_tokens} tokens" * bool(s.warmup_tokens) or f"{s.warmup_steps} steps"
        schedule = f"warm-up {schedule}, then " + (s.shape if s.shape == "constant" else f"{s.shape} to {s.floor:g}")
    if s.cooldown_steps:
        schedule += f", linear to 0 over the last {s.cooldown_steps} steps"
    dead = config.dead
    rule = (
        f"not fired for {dead.tokens} tokens"
        if dead.rule == "tokens"
        else f"fired on a share of tokens below {dead.frequency:g} over an epoch"
    )
    training = {
        "tokens": tokens,
        "steps": steps,
        "epochs": epochs,
        "optimizer": f"Adam, betas {config.betas[0]:g} {config.betas[1]:g}, eps {config.eps:g}"
        + (f", gradient norm clipped at {config.clip:g}" if config.clip else ""),
        "lr": config.lr,
        "lr_schedule": schedule,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "loss": loss_in_words(config),
        "aux_loss": aux_in_words(config),
        "dead_rule": rule,
        "resampling": f"{dead.resample.method}; {resampled} latents resampled" if dead.resample else None,
        "warm_start": parent,
        "selection": selection,
        "split": split,
        "exclude": exclude or None,
        "massive_above": massive_above,
    }
    kind = {"none": "none", "mean_std": "mean_std"}.get(config.normalize, "scalar")
    data: dict[str, Any] = {
        "config": sae_config.model_dump(),
        "training": {key: value for key, value in training.items() if value is not None},
        "normalizer": {"kind": kind, "folded": space is not None},
        "provenance": {
            "converter": f"hubsae {__version__} (trained)",
            "versions": {"hubsae": __version__, "torch": torch.__version__, "python": platform.python_version()},
        },
    }
    for section, values in (sections or config.record).items():
        if isinstance(values, dict) and isinstance(data.get(section), dict):
            data[section] = {**data[section], **values}
        else:
            data[section] = values
    made = Metadata.from_dict(data)
    if metrics:
        made.set_metrics(metrics)
    return made


def loss_in_words(config: TrainConfig) -> str:
    """The reconstruction loss and sparsity penalty, as recorded."""
    text = {
        "mean": "mean squared error over elements",
        "sum": "squared error summed over dimensions, mean over tokens",
        "fvu": "squared error over the batch's variance",
    }[config.loss]
    if config.normalize != "none":
        text += f", in the space normalised by {config.normalize}"
    if config.matryoshka:
        text += f", mean over matryoshka prefixes {', '.join(map(str, config.matryoshka))} and the whole"
    s = config.sparsity
    if s.l1:
        text += f"; L1 {s.l1:g}"
    if s.l0:
        text += f"; L0 {s.l0:g}" + (f", target {s.l0_target:g}" if s.l0_target else "")
    if config.architecture == "jumprelu":
        text += f"; straight-through bandwidth {s.bandwidth:g}"
    return text


def aux_in_words(config: TrainConfig) -> str | None:
    """The auxiliary loss, as recorded."""
    if config.aux is None:
        return None
    a = config.aux
    target = "the residual" if a.target == "residual" else "the full activation"
    return f"AuxK {a.coefficient:g}, {a.k or 'd_in/2'} dead latents reconstruct {target}"
