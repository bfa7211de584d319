"""A trained cell as a HubSAE: folded onto raw activations, with the record of how it was trained, and on what."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError, HookError
from hubsae.core.fold import TrainedTensors, fold
from hubsae.core.hooks import HookPoint
from hubsae.core.metadata import Metadata
from hubsae.core.normalizer import Normalizer
from hubsae.core.sae import SAE
from hubsae.core.scopes import Scope, excluding
from hubsae.core.settings import merge
from hubsae.train.config import TrainConfig
from hubsae.train.result import as_metadata
from hubsae.train.state import Cell
from hubsae.version import __version__

# section and field of metadata.json -> what a harvest calls it
KNOWN = {
    ("base_model", "id"): "model",
    ("base_model", "revision"): "revision",
    ("base_model", "stage"): "stage",
    ("base_model", "adapter"): "adapter",
    ("base_model", "merge_dtype"): "adapter_merge",
    ("base_model", "dtype"): "model_dtype",
    ("hook", "layer"): "layer",
    ("hook", "kind"): "kind",
    ("hook", "module_path"): "hook_point",
    ("hook", "transformer_lens"): "transformer_lens",
    ("hook", "context_size"): "max_length",
    ("activations", "mode"): "mode",
    ("activations", "text_dataset"): "dataset",
}


class Exporter(NamedTuple):
    """Makes SAEs of the cells of a run, and says in their records what is known of it beside their settings."""

    source: Any
    scope: Scope
    """The tokens that take part."""
    space: Normalizer | None
    """Input normalisation."""
    space_out: Normalizer | None
    """That of what a transcoder predicts."""
    steps_per_epoch: int
    transcoder: bool

    def sae(
        self, cell: Cell, weights: dict[str, Tensor], moment: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> SAE:
        """A cell with these weights on raw activations; `moment` has the `step`, `tokens` and `threshold` they are of.

        The normalisers and an untied pre-bias fold into the weights exactly; the statistics are kept beside them.
        """
        config = cell.config
        center = {"tied": weights["b_dec"], "untied": weights.get("b_pre"), "none": None}[config.pre_bias]
        gated = config.architecture == "gated"
        biases = {"b_gate": weights["b_enc"], "b_mag": weights["b_mag"]} if gated else {"b_enc": weights["b_enc"]}
        trained = TrainedTensors(
            W_enc=weights["W_enc"].float().t().contiguous().cpu(),
            W_dec=weights["W_dec"].float().clone().cpu(),
            b_dec=weights["b_dec"].float().clone().cpu(),
            pre_bias=None if center is None else center.float().cpu(),
            encoder_biases={name: bias.float().clone().cpu() for name, bias in biases.items()},
            r_mag=weights["r_mag"].float().cpu().clone() if gated else None,
            W_skip=weights["W_skip"].float().cpu().clone() if config.skip else None,
        )
        mean, std = (None, None) if self.space is None else (self.space.mean, self.space.std)
        output = None if self.space_out is None else (self.space_out.mean, self.space_out.std)
        tensors, subtract = fold(trained, mean, std, output=output, transcoder=self.transcoder)
        if config.architecture == "jumprelu":
            tensors["threshold"] = weights["theta"].float().clone().cpu()
        sae_config = SAEConfig(
            architecture=config.architecture,
            d_in=weights["W_enc"].shape[1],
            d_sae=weights["W_enc"].shape[0],
            k=config.k,
            topk_relu=config.topk_relu,
            threshold=moment["threshold"] if config.architecture == "batch_topk" else None,
            apply_b_dec_to_input=subtract,
            d_out=weights["W_dec"].shape[1] if self.transcoder else None,
            skip=config.skip or None,
        )
        metadata = self._record(cell, sae_config, moment, metrics or {})
        return SAE.build(sae_config, tensors, metadata=metadata, normalizer=self.space)

    def _record(self, cell: Cell, sae_config: SAEConfig, moment: dict[str, Any], metrics: dict[str, float]) -> Metadata:
        """metadata.json; what is known besides, from the config and the activations, takes precedence."""
        config, parent, resample = cell.config, cell.parent, cell.config.dead.resample
        # what the harvest left out is not in the data, and belongs to the record all the same
        before = getattr(self.source, "info", {}).get("exclude") or ()
        excluded = [*dict.fromkeys((*before, *config.excluded))]
        training = {
            "tokens": moment["tokens"],
            "steps": moment["step"],
            "epochs": moment["step"] / self.steps_per_epoch,
            "optimizer": f"Adam, betas {config.betas[0]:g} {config.betas[1]:g}, eps {config.eps:g}"
            + (f", gradient norm clipped at {config.clip:g}" if config.clip else ""),
            "lr": config.lr,
            "lr_schedule": schedule_in_words(config),
            "batch_size": config.batch_size,
            "seed": config.seed,
            "loss": loss_in_words(config),
            "aux_loss": aux_in_words(config),
            "dead_rule": dead_in_words(config),
            "resampling": resample and f"{resample.method}; {cell.resampled} latents resampled",
            "warm_start": parent and {"id": parent.metadata.id, "sha256": parent.metadata.provenance.weights_sha256},
            "selection": f"best {moment['metric']}, step {moment['step']}" if "metric" in moment else "last step",
            "split": f"contiguous tail of {config.val_fraction:g}" if config.val_fraction else None,
            "exclude": excluded or None,
            "massive_above": self.scope.massive_above,
        }
        kind = {"none": "none", "mean_std": "mean_std"}.get(config.normalize, "scalar")
        data: dict[str, Any] = {
            "config": sae_config.model_dump(),
            "training": {key: value for key, value in training.items() if value is not None},
            "normalizer": {"kind": kind, "folded": self.space is not None},
            "provenance": {
                "converter": f"hubsae {__version__} (trained)",
                "versions": {"hubsae": __version__, "torch": torch.__version__, "python": platform.python_version()},
            },
        }
        made = Metadata.from_dict(merge(data, joined(config.record, self.source)))
        made.set_metrics(as_metadata(metrics, excluding(excluded).name))
        return made


def schedule_in_words(config: TrainConfig) -> str:
    """The learning rate over the run, as recorded."""
    s = config.schedule
    text = s.shape if s.shape == "constant" else f"{s.shape} to {s.floor:g}"
    if s.warmup_tokens or s.warmup_steps:
        text = f"warm-up {f'{s.warmup_tokens} tokens' if s.warmup_tokens else f'{s.warmup_steps} steps'}, then {text}"
    elif s.shape != "constant":
        text += " of the peak"
    return text + (f", linear to 0 over the last {s.cooldown_steps} steps" if s.cooldown_steps else "")


def dead_in_words(config: TrainConfig) -> str:
    """When a latent counts as dead, as recorded."""
    if config.dead.rule == "tokens":
        return f"not fired for {config.dead.tokens} tokens"
    return f"fired on a share of tokens below {config.dead.frequency:g} over an epoch"


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


def recorded(source: Any) -> dict[str, dict[str, Any]]:
    """Model, hook point and dataset of activations, as far as they are known."""
    info = getattr(source, "info", None)
    if not info:
        return {}
    out: dict[str, dict[str, Any]] = {}
    for (section, field), key in KNOWN.items():
        if info.get(key) is not None:
            out.setdefault(section, {})[field] = _public(info[key]) if field in ("id", "adapter") else info[key]
    if (target := getattr(source, "target", None)) is not None:
        said = target.info
        fields = {field: said.get(key) for (section, field), key in KNOWN.items() if section == "hook"}
        out["hook_out"] = {field: value for field, value in fields.items() if value is not None}
    about = out.setdefault("activations", {})
    about["tokens"] = source.n_rows
    about |= {"id": _public(source.path), "config": source.config} if hasattr(source, "config") else {}
    return out


def joined(record: dict[str, Any], source: Any) -> dict[str, Any]:
    """What a config puts on record, on top of what the activations say; a contradicting hook point is an error.

    >>> class Acts:
    ...     info, n_rows, path, config = {"layer": 8, "hook_point": "model.layers.8"}, 10, "acts", "layers.8"
    >>> joined({"hook": {"kind": "resid_post"}}, Acts())["hook"]["layer"]
    8
    """
    found = recorded(source)
    hook, own = found.get("hook", {}), record.get("hook") or {}
    said, here = _point(own), _point(hook)
    if said is not None and here is not None and said != here:
        raise ConfigError(
            f"record.hook says {said.name}, the activations were taken at {here.name}",
            hint="leave record.hook out: it is read from the activations; or train on those of that hook point",
        )
    model, theirs = (record.get("base_model") or {}).get("id"), found.get("base_model", {}).get("id")
    if model and theirs and model != theirs and "/" in model and "/" in theirs:
        raise ConfigError(
            f"record.base_model says {model}, the activations are of {theirs}",
            hint="leave record.base_model out (base_model: null): it is read from the activations",
        )
    return merge(found, {section: values for section, values in record.items() if values is not None})


def _point(hook: dict[str, Any]) -> HookPoint | None:
    """The hook point that a section means, by whichever of its fields says it."""
    try:
        for field in ("transformer_lens", "module_path"):
            if hook.get(field):
                return HookPoint.parse(hook[field])
        if hook.get("layer") is not None:
            return HookPoint(int(hook["layer"]), hook.get("kind") or "resid_post")
    except HookError:
        pass  # a hook point of another kind of model
    return None


def _public(name: Any) -> str:
    """An id as it is; of a local path only its name, since a record goes to others."""
    path = Path(str(name))
    return path.name if path.is_absolute() or path.exists() or str(name).startswith(".") else str(name)
