"""Policy, reference and critic: loading, adapters, and saving a stage so that it can be merged later without loss.

With LoRA the reference is the policy with its adapter switched off, and a stage is the adapter alone (small and
exact). Without, the reference is a frozen copy and a stage is the whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hubsae.activations.models import load_model
from hubsae.core.extras import require
from hubsae.core.files import read_json, write_json_atomic
from hubsae.core.quiet import quiet
from hubsae.core.settings import Settings


class LoRA(Settings):
    """Low-rank adapter. Rank and alpha of the published runs are not known; 32 and 32 are an assumption."""

    r: int = 32
    alpha: int = 32
    target: str | tuple[str, ...] = "all-linear"


class Critic(nn.Module):
    """A copy of the base model with a scalar head that starts at zero, so that its first values are neutral."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """One value per token [sequences, tokens]."""
        out = self.backbone(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        return self.head(out.last_hidden_state.float()).squeeze(-1)


def load_weights(path: str | Path, *, revision: str | None = None, device: Any = "cpu") -> Any:
    """A causal language model in float32, whatever its checkpoint is stored in."""
    with quiet():
        return load_model(path, revision=revision, dtype="float32", device=device)


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch every dropout off: old and new log-probabilities must differ by the update only.

    >>> without_dropout(nn.Sequential(nn.Dropout(0.1)))[0].p
    0.0
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model


class Policy:
    """The model that is trained, with its reference."""

    def __init__(
        self,
        path: str | Path,
        lora: LoRA | None,
        *,
        seed: int,
        revision: str | None = None,
        device: Any = "cpu",
        name: str | None = None,
    ):
        self.name, self.revision, self.lora = name or str(path), revision, lora
        model = load_weights(path, revision=revision, device=device)
        self._reference: Any = None
        if lora is None:
            self._reference = load_weights(path, revision=revision, device=device).requires_grad_(False)
        else:
            peft = require("peft", extra="train")
            settings = peft.LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=0.0,
                target_modules=lora.target if isinstance(lora.target, str) else list(lora.target),
                task_type="CAUSAL_LM",
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = peft.get_peft_model(model, settings)
        self.model: Any = without_dropout(model)

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The model as it was before training."""
        if self._reference is not None:
            yield self._reference
        else:
            with self.model.disable_adapter():
                yield self.model

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save_stage(self, folder: Path, tokenizer: Any) -> None:
        """Write the adapter, or the whole model where there is none."""
        with quiet():
            self.model.save_pretrained(folder)
        if self.lora is not None:
            # peft writes a set in the order of this process' string hashes; sorted, the same run gives the same file
            about = read_json(folder / "adapter_config.json")
            about["target_modules"] = sorted(about["target_modules"])
            about["base_model_name_or_path"], about["revision"] = self.name, self.revision
            write_json_atomic(folder / "adapter_config.json", about)
        tokenizer.save_pretrained(folder)


def new_critic(path: str | Path, *, revision: str | None = None, device: Any = "cpu") -> Critic:
    """A critic that starts from the same checkpoint as the policy."""
    transformers = require("transformers", extra="train")
    with quiet():
        backbone = transformers.AutoModel.from_pretrained(str(path), revision=revision, dtype=torch.float32)
    critic = Critic(backbone).to(device)
    without_dropout(critic)
    return critic
