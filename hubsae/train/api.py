"""The public calls: train one SAE, several on one stream, or several on activations as a model makes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hubsae.core.errors import ConfigError, HubSAEError
from hubsae.core.normalizer import Normalizer
from hubsae.core.options import pass_on
from hubsae.train.config import TrainConfig
from hubsae.train.data import as_source
from hubsae.train.init import check_warm, resolve
from hubsae.train.live import LiveActivations
from hubsae.train.result import TrainResult
from hubsae.train.trainer import Run, fit_together


def train(
    config: TrainConfig,
    activations: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    init: Any = None,
    val: Any = None,
    resume: bool = True,
    device: str | torch.device = "cpu",
    space: Normalizer | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train one SAE on a tensor [tokens, d] or on an `ActivationDataset`; on pairs of hook points, a transcoder.

    With `out` the run keeps its state there and a second call goes on where the first was stopped. `init` is an SAE,
    or the path of one in any known format, to start from. `space` fixes the input statistics.

    >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    >>> result = train(TrainConfig(d_sae=16, k=2, batch_size=64, lr=1e-3), x)
    >>> result.sae.config.k, result.steps, result.sae(x).shape
    (2, 8, torch.Size([512, 8]))
    """
    (result,) = pass_on(Run, locals(), configs=[config], starts=[init]).fit()
    if result.error is not None:
        raise result.error
    return result


def train_many(
    configs: Sequence[TrainConfig],
    activations: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    init: Sequence[Any] | Any = None,
    val: Any = None,
    resume: bool = True,
    device: str | torch.device = "cpu",
    quiet: bool = False,
) -> list[TrainResult]:
    """Train several SAEs side by side; those that read the same batches share the reading and the work.

    `activations` (and `val`, `init`) is one for all, or a list with one per config (other layers, say). Configs
    share a stream where source, batch size, length, data seed, normalisation and clipping agree; architecture, k,
    width, seed, learning rate and the rest may differ. Each result equals that of `train` up to float
    rounding. One that fails (an exploding loss, a wrong k) has its `error` set and leaves the others alone.

    >>> x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    >>> cells = [TrainConfig(name=f"k{k}", d_sae=16, k=k, batch_size=64) for k in (1, 2)]
    >>> [r.sae.config.k for r in train_many(cells, x)]
    [1, 2]
    """
    names = [c.name for c in configs]
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ConfigError(f"cells need names of their own: {', '.join(twice)} occurs twice", hint="set name=")
    sources = _each(activations, len(configs), "activations")
    vals, starts = _each(val, len(configs), "val"), _each(init, len(configs), "init")
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, config in enumerate(configs):
        groups.setdefault((id(sources[i]), id(vals[i]), *stream_key(config)), []).append(i)
    results: dict[int, TrainResult] = {}
    given = locals()
    for number, members in enumerate(groups.values()):
        folder = None if out is None else Path(out) if len(groups) == 1 else Path(out) / f"group_{number:02d}"
        members = _startable(members, configs, sources, starts, results)
        if not members:
            continue
        chosen, source, held = [configs[i] for i in members], sources[members[0]], vals[members[0]]
        own = {"out": folder, "starts": [starts[i] for i in members], "val": held}
        try:
            found = pass_on(Run, given, configs=chosen, activations=source, **own).fit()
        except HubSAEError as error:
            if len(groups) == 1:
                raise
            found = [TrainResult(c.name, c, None, error=error) for c in chosen]
        results.update(zip(members, found, strict=True))
    return [results[i] for i in range(len(configs))]


def stream_key(config: TrainConfig) -> tuple[Any, ...]:
    """What configs must agree on to be trained on one stream."""
    c = config
    every = (c.eval_every, c.eval_rows, c.checkpoint_every, c.log_every, c.loggers, c.parallel, c.kernels)
    space = (c.normalize, c.exclude, c.max_norm_factor, c.val_fraction)
    # clipping and accumulation store gradients: cells that do not ask for it should not pay
    return (c.batch_size, c.epochs, c.tokens, c.data_seed, c.accumulate, c.clip is None, *space, *every)


def _startable(
    members: list[int],
    configs: Sequence[TrainConfig],
    sources: list[Any],
    starts: list[Any],
    results: dict[int, TrainResult],
) -> list[int]:
    """Those that can begin; a cell that cannot is reported and does not stop its neighbours."""
    good = []
    for i in members:
        source, config = as_source(sources[i]), configs[i]
        d, d_out = source.d, getattr(source, "d_out", None)
        try:
            config.for_target(d_out).check(d)
            starts[i] = resolve(starts[i])
            if starts[i] is not None:
                check_warm(config, d, config.width(d), starts[i], d_out)
            good.append(i)
        except HubSAEError as error:
            results[i] = TrainResult(config.name, config, None, error=error)
    return good


def _each(value: Any, count: int, what: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ConfigError(f"{len(value)} {what} for {count} configs", hint="give one for all, or one for each")
        return list(value)
    return [value] * count


def train_live(
    configs: Sequence[TrainConfig],
    live: LiveActivations,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    device: str | torch.device = "cpu",
    quiet: bool = False,
) -> dict[str, list[TrainResult]]:
    """Train SAEs on activations as a model makes them: every config at every hook point of `live`, from one pass.

    Results are by hook point (`layers.8`), and so are the folders in `out`.
    """
    keys = {stream_key(config) for config in configs}
    if len(keys) > 1:
        raise ConfigError("live training has one stream: batch size, length and tokens left out must agree")
    if (first := configs[0]).tokens is None or first.epochs != 1.0:
        configs = [c.model_copy(update={"tokens": live.tokens, "epochs": 1.0}) for c in configs]
    runs, given = [], locals()
    for name, layer in live.layers.items():
        own = [c.model_copy(update={"name": f"{c.name}-{name}" if len(live.layers) > 1 else c.name}) for c in configs]
        where = {"out": None if out is None else Path(out) / name, "val": layer.validation}
        runs.append(pass_on(Run, given, configs=own, activations=layer, **where))
    return dict(zip(live.layers, fit_together(runs), strict=True))
