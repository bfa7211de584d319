"""Stages of a chain: any list of checkpoints, wherever they were made.

base model                  Qwen/Qwen2.5-0.5B-Instruct, repo@revision, or a folder
whole checkpoint            a folder or repo with weights (a merged verl checkpoint, say)
adapter                     a folder or repo with adapter_config.json, merged into the base in float32 on demand
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.activations.models import merge_adapter
from hubsae.core.errors import ConfigError, NotFoundError
from hubsae.core.extras import require
from hubsae.core.text import stage_step
from hubsae.rl.policy import load_weights

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """One stage: a name, and where its weights are."""

    name: str
    """`instruct_base`, `ppo_step10`: a name that ends in a number names the step."""
    source: str
    """A folder, or a Hub repo."""
    revision: str | None = None
    base: str | None = None
    """What an adapter was trained on; None for a whole checkpoint."""
    base_revision: str | None = None

    @property
    def step(self) -> int:
        """Training step by its name; 0 for a base.

        >>> Checkpoint("ppo_step116", "x").step, Checkpoint("instruct_base", "x").step
        (116, 0)
        """
        return stage_step(self.name) or 0

    def load(self, device: Any = "cpu") -> Any:
        """The whole model in float32, an adapter merged."""
        if self.base is None:
            return load_weights(self.source, revision=self.revision, device=device)
        base = load_weights(self.base, revision=self.base_revision, device="cpu")
        return merge_adapter(base, local_adapter(self.source, self.revision)).to(device).eval()


def parse_checkpoint(name: str, source: str, base: str | None = None) -> Checkpoint:
    """A stage from `folder`, `repo` or `repo@revision`; whether it is an adapter is looked up.

    `base` is what adapters belong to, itself `repo@revision` or a folder.

    >>> import tempfile
    >>> parse_checkpoint("ppo_step10", tempfile.gettempdir()).step
    10
    """
    where, revision = _split(source)
    if not Path(where).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise NotFoundError(
            f"stage {name!r}: {source!r} is neither a folder nor a repo id",
            hint="write a path, owner/name, or owner/name@revision",
        )
    adapter = cached_file(where, ADAPTER, revision)
    if adapter is None:
        return Checkpoint(name, where, revision)
    if base is None:
        raise ConfigError(f"stage {name!r} is an adapter", hint="name the model it was trained on as the base model")
    base_source, base_revision = _split(base)
    return Checkpoint(name, where, revision, base_source, base_revision)


def local_adapter(source: str, revision: str | None) -> Path:
    """The folder of an adapter, fetched if it is on the Hub."""
    if Path(source).is_dir():
        return Path(source)
    found = cached_file(source, ADAPTER, revision)
    weights = cached_file(source, "adapter_model.safetensors", revision)
    if found is None or weights is None:
        raise NotFoundError(f"{source} holds no adapter with safetensors weights")
    return Path(weights).parent


def cached_file(source: str, name: str, revision: str | None) -> str | None:
    """A file of a folder, or of a repo by way of transformers' own cache; None where there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.is_file() else None
    require("transformers", extra="train")
    from transformers.utils import hub

    try:
        return hub.cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise NotFoundError(
            f"{source}{'@' + revision if revision else ''} cannot be read: {str(error).splitlines()[0]}",
            hint="check the repo id, the revision and the token, or give a folder",
        ) from error


def _split(source: str) -> tuple[str, str | None]:
    if Path(source).exists():
        return source, None
    where, at, revision = source.partition("@")
    return where, revision if at else None


@torch.no_grad()
def merge_loss(base: Any, stage: Any, dtype: torch.dtype) -> dict[str, float]:
    """What storing a stage in `dtype` would lose of its update: `stage - base`, over all weight matrices.

    `update`: norm of the update as a share of the weights' norm. `unchanged`: share of the updated elements that
    come out equal to the base's. `error`: norm of what was lost or distorted, as a share of the update's norm.

    >>> a, b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    >>> _ = b.load_state_dict({k: v * 1.0001 for k, v in a.state_dict().items()})
    >>> merge_loss(a, b, torch.bfloat16)["unchanged"] > 0.9
    True
    """
    norm = update = lost = 0.0
    touched = unchanged = 0
    before = dict(base.named_parameters())
    for name, after in stage.named_parameters():
        if after.ndim < 2:
            continue
        old, new = before[name].detach().double(), after.detach().double()
        stored = _as_stored(after, dtype) - _as_stored(before[name], dtype)
        change = new - old
        moved = change != 0
        norm += float(old.square().sum())
        update += float(change.square().sum())
        lost += float((stored - change).square().sum())
        touched += int(moved.sum())
        unchanged += int((moved & (stored == 0)).sum())
    return {
        "update": (update / norm) ** 0.5 if norm else 0.0,
        "unchanged": unchanged / touched if touched else 0.0,
        "error": (lost / update) ** 0.5 if update else 0.0,
    }


def _as_stored(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return weights.detach().to(dtype).double()
