"""Reward models of transformers checkpoints: a backbone, and a head that is read from the files or refused.

    Qwen2.5-Math-PRM           two-layer head  score.0, ReLU, score.2     the probability of a good step at `<extra_0>`
    token classifier           linear head     score                      the same, at the end of each step
    sequence classifier        linear head     score                      the score of the solution up to each step

transformers loads a checkpoint whose head it does not know without an error and makes the head up, and such scores are
noise. Here the head is built from its tensors and nothing else, and no code of a repo is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hubsae.activations.models import as_dtype, load_tokenizer, not_loaded
from hubsae.activations.rewards import ScoredText, StepScores, step_ends
from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.extras import require
from hubsae.core.quiet import quiet
from hubsae.rl.stages import cached_file
from hubsae.rl.steps import Aggregate, StepFormat, StepReward

HEADS = ("score.", "classifier.")
IGNORED = ("lm_head.",)
"""Left in such checkpoints by the language model they were made from."""
STEP_TOKEN = "<extra_0>"
LAYERED = "ForProcessRewardModel"


class RewardModel(StepReward):
    """A backbone with a head on its last states: two outputs give the probability of the second, one is the score."""

    def __init__(
        self,
        backbone: Any,
        head: nn.Module,
        tokenizer: Any,
        how: StepFormat = StepFormat(),
        *,
        aggregate: Aggregate = "min",
    ):
        super().__init__(tokenizer, how, aggregate)
        self.backbone, self.head = backbone, head

    def logits(self, ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        """What the head says at the tokens that `keep` marks. [kept, outputs]"""
        device = next(self.backbone.parameters()).device
        hidden = self.backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)[0]
        return self.head(hidden[keep.to(device)]).float()

    def read(self, ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        """Scores at the tokens that `keep` marks. [kept]"""
        logits = self.logits(ids, mask, keep)
        if logits.shape[1] == 1:
            return logits[:, 0]
        return (logits[:, 1] - logits[:, 0]).sigmoid()


class HarvestScorer:
    """A reward model as a scorer of a harvest with the same tokenizer: of samples, or of steps with a `separator`.

    A sample is scored at its last token, a step at the last token of its own.
    """

    def __init__(self, model: RewardModel, separator: str | None = None):
        self.model, self.separator = model, separator

    def __call__(self, text: ScoredText) -> Any:
        return self.score_batch([text])[0]

    def score_batch(self, texts: Sequence[ScoredText]) -> list[Any]:
        """A number, or `StepScores`, of each."""
        if self.separator is None:
            found = self.model.at([t.ids for t in texts], [[len(t.ids) - 1] for t in texts])
            return [float(scores[0]) if len(scores) else None for scores in found]
        ends = [step_ends(t.ids, t.prompt_length, self.separator, self.model.tokenizer) for t in texts]
        found = self.model.at([t.ids for t in texts], ends)
        return [
            StepScores(at, scores.tolist(), start=t.prompt_length)
            for t, at, scores in zip(texts, ends, found, strict=True)
        ]


def load_reward_model(
    path: str | Path,
    *,
    revision: str | None = None,
    separator: str | None = None,
    device: Any = "cpu",
    dtype: str | torch.dtype = "float32",
) -> RewardModel:
    """A reward model of a folder or a Hub id: process reward model, token classifier, or sequence classifier.

    `separator` ends a step; by default `<extra_0>` for Qwen's process reward models, a newline for the others. The
    kind follows from the checkpoint's architecture, the shape of the head from its tensors; whatever of the checkpoint
    is neither backbone nor head is an error, and so is what lacks.
    """
    transformers = require("transformers", extra="train")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(str(path), **options)
    except (OSError, ValueError) as error:
        raise not_loaded(path, error) from error
    kind = next(iter(config.architectures or ()), "no architecture")
    steps = kind.endswith((LAYERED, "ForTokenClassification"))
    if not steps and not kind.endswith("ForSequenceClassification"):
        raise ConfigError(
            f"{path} is {kind}, which has no head that scores",
            hint="reward models here are process reward models of Qwen, token classifiers and sequence classifiers",
        )
    with quiet():
        backbone, report = transformers.AutoModel.from_pretrained(
            str(path), dtype=as_dtype(dtype), output_loading_info=True, **options
        )
    heads = HEADS if steps else HEADS[:1]  # the `classifier` of a sequence classifier reads a pooled state, no token's
    strange = [k for k in report["unexpected_keys"] if not k.startswith((*heads, *IGNORED))]
    wrong = sorted([*report["missing_keys"], *strange, *(str(k) for k in report["mismatched_keys"])])
    if wrong:
        raise FormatError(path, "every weight of the backbone and no other", ", ".join(wrong[:6]))
    head = build_head(path, _head_tensors(path, revision), int(config.hidden_size)).to(backbone.dtype)
    how = StepFormat(separator or (STEP_TOKEN if kind.endswith(LAYERED) else "\n"))
    tokenizer = load_tokenizer(path, revision=revision)
    return RewardModel(
        backbone.to(device).eval(), head.to(device).eval(), tokenizer, how,
        aggregate="min" if steps else "last",
    )  # fmt: skip


def build_head(path: str | Path, tensors: dict[str, Tensor], width: int) -> nn.Module:
    """The head that these tensors are: one linear layer, or two with a ReLU between them.

    >>> build_head("m", {"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}, 8)
    Linear(in_features=8, out_features=2, bias=True)
    """
    two = {"0.weight", "0.bias", "2.weight", "2.bias"}
    last = tensors.get("2.weight" if set(tensors) == two else "weight")
    if last is None or last.ndim != 2 or (set(tensors) != two and not set(tensors) <= {"weight", "bias"}):
        found = ", ".join(HEADS[0] + name for name in sorted(tensors))
        found = found or "none of them; a new one would score at random"
        raise FormatError(path, "a head: score.weight, or score.0 and score.2 with biases", found)
    if last.shape[0] > 2:
        raise FormatError(path, "a head of one output or two", f"one of {last.shape[0]}")
    head: nn.Module = nn.Linear(width, last.shape[0], bias="bias" in tensors)
    if set(tensors) == two:
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, last.shape[0]))
    try:
        head.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise FormatError(path, f"a head on states of width {width}", str(error).splitlines()[-1].strip()) from error
    return head


def _head_tensors(path: str | Path, revision: str | None) -> dict[str, Tensor]:
    """The tensors of the head, out of whichever file holds them; only safetensors are read."""
    from safetensors import safe_open

    index = cached_file(str(path), "model.safetensors.index.json", revision)
    if index is not None:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted({file for key, file in places.items() if key.startswith(HEADS)})
    else:
        names = ["model.safetensors"]
    found: dict[str, Tensor] = {}
    for name in names:
        file = cached_file(str(path), name, revision)
        if file is None:
            raise FormatError(path, f"{name}, with the weights of the head", "no such file")
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if key.startswith(HEADS):
                    found[key.partition(".")[2]] = tensors.get_tensor(key).float()
    return found
