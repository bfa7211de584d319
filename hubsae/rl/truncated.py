"""A probe at one layer as a reward: the model is run up to that layer and no further.

tokens -> layers 0 to L -> codes of an SAE (or the states themselves) -> probe -> a score per step
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hubsae.activations.capture import capture
from hubsae.core.errors import ConfigError
from hubsae.core.hooks import HookPoint
from hubsae.core.intervene import hook_of
from hubsae.core.sae import SAE
from hubsae.evals.probes import Probe
from hubsae.rl.steps import Aggregate, StepFormat, StepReward


class TruncatedReward(StepReward):
    """Scores of steps from a probe; takes the place of the reward model that the probe was fitted on.

    >>> import tempfile, torch, transformers
    >>> from hubsae.core.config import SAEConfig
    >>> shape = transformers.LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
    ...                                  num_attention_heads=2, num_key_value_heads=2)
    >>> sae = SAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2))
    >>> reward = TruncatedReward(transformers.LlamaForCausalLM(shape), None, Probe(torch.ones(16).double(), 0.5),
    ...                          sae=sae, hook=1)
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> reward.read(ids, ids > 0, ids == 3).shape
    torch.Size([1])
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        probe: Probe,
        *,
        sae: SAE | None = None,
        hook: Any = None,
        how: StepFormat = StepFormat(),
        aggregate: Aggregate = "min",
    ):
        """`sae` is what the probe reads the codes of, None for one on the states; its record knows the hook point."""
        super().__init__(tokenizer, how, aggregate)
        if sae is None and hook is None:
            raise ConfigError("where is the probe read?", hint="pass hook=18 or the SAE, whose record says it")
        width = len(probe.weights)
        if sae is not None and sae.d_sae != width:
            raise ConfigError(f"the probe has {width} weights, the SAE {sae.d_sae} latents: it is of another one")
        self.model, self.probe, self.sae = model, probe, sae
        self.hook = HookPoint.parse(hook) if sae is None else hook_of(sae, hook)

    def read(self, ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        """Scores at the tokens that `keep` marks. [kept]"""
        states = capture(self.model, ids, mask, [self.hook], keep)[self.hook.name]
        return self.probe(states if self.sae is None else self.sae.encode_sparse(states.to(self.sae.device)))
