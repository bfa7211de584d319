"""What each step of a chain recipe will need, from the settings alone: for `--dry-run`, before anything is loaded.

Memory is that of tensors that must be there at once; allocators and libraries add to it.
"""

from __future__ import annotations

from hubsae.recipes import cost
from hubsae.recipes.steps import Estimate
from hubsae.rl.config import RLConfig
from hubsae.rl.warmup import WarmUp

from .settings import ChainConfig, ChainSettings, Mode, harvest_step

VOCABULARY = 151_936
"""Of Qwen2.5; logits are the largest tensor of a forward."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
LONGER = {"question": 1.0, "prompt": 1.6, "prompt+response": 3.5, "own": 4.5}
"""Tokens of a text in a mode, as a multiple of the question's."""


def by_step(config: ChainConfig) -> dict[str, Estimate]:
    """Every step, by name."""
    model, stages = config.model.parameters * 4, len(config.stage_names())
    sae, each = sae_bytes(config), len(config.members())
    texts = f"{each} SAEs: held-out activations, and {config.evaluation.splice_texts} texts with the SAE in the model"
    about = f"{config.model.label} ({config.model.parameters / 1e6:,.0f} M parameters), {config.data.id}"
    graded = Estimate(f"{config.evaluation.accuracy_problems:,} held-out problems", memory=model)
    evaluated = Estimate(texts, memory=model + each * sae)
    found = {
        "source": Estimate(about, disk=model, memory=model),
        "merge": Estimate(f"{stages - 1} stages against the base", memory=4 * model),
        "drift": Estimate(f"{stages} x {stages} SAEs and stages per layer", memory=2 * stages * sae),
        "release": Estimate(f"{stages * each} SAEs with metrics, tables, plots and card", disk=stages * each * sae,
                            memory=model),
        "report": Estimate("results beside the published numbers, figures"),
    }  # fmt: skip
    if config.warmup is not None:
        found["warmup"] = warmup(config, config.warmup)
    if config.rl is not None:
        found["rl"] = reinforcement(config, config.rl)
    found |= {f"accuracy/{stage}": graded for stage in config.harvested_stages()}
    found |= {harvest_step(mode): activations(config, mode) for mode in config.harvest.modes}
    found |= {member.step: chain(config, member.chain) for member in config.members()}
    return found | {f"evaluation/{stage}": evaluated for stage in config.stage_names()}


def warmup(config: ChainConfig, settings: WarmUp) -> Estimate:
    """Supervised steps: weights, gradient, two moments."""
    size, tokens = config.model.parameters * 4, settings.batch * settings.max_tokens
    memory = 4 * size + _kept(config, tokens) + tokens * _vocabulary(config) * 4 * 3
    return Estimate(f"{settings.steps} steps of {settings.batch} answers", disk=size, memory=memory)


def reinforcement(config: ChainConfig, rl: RLConfig) -> Estimate:
    """The run of PPO: models, optimisers, logits, saved stages and states."""
    weights = config.model.parameters * 4
    # a LoRA adapter on all linear layers is for the usual shapes about 17 ranks of width per block
    trained = config.model.layers * 17 * rl.lora.r * config.model.d_model * 4 if rl.lora else weights
    copies = 1 if rl.lora else 2  # policy and, without an adapter to switch off, a reference
    # logits, their float32 copy and the softmax of one micro-batch
    logits = rl.micro_batch * (rl.max_response + 1) * _vocabulary(config) * 4 * 3
    kept = _kept(config, rl.micro_batch * (rl.max_prompt + rl.max_response))
    saved = len(rl.stage_names())
    what = (
        f"PPO, {rl.scorer} reward{', gold shuffled' if rl.shuffled_gold else ''}: {rl.steps} steps x {rl.sequences:,} "
        f"responses of at most {rl.max_response} tokens, {saved} stages saved, "
        f"{'LoRA r ' + str(rl.lora.r) if rl.lora else 'all weights'}"
    )
    # the critic: weights, gradient, two moments
    memory = copies * weights + 3 * trained + 4 * weights + kept + logits
    return Estimate(what, disk=3 * (trained + weights) + saved * trained, memory=memory)


def _kept(config: ChainConfig, tokens: int) -> int:
    """What the layers keep for the backward pass, in float32: about 21 widths a token and layer.

    States, norms, queries, keys and values are 10; gate, up, their product and the activation 4 of 2.7 widths.
    """
    return tokens * config.model.layers * 21 * config.model.d_model * 4


def _vocabulary(config: ChainConfig) -> int:
    return VOCABULARY if config.model.parameters > 10_000_000 else 512


def tokens_of(config: ChainConfig, mode: Mode) -> float:
    """Tokens one stage gives in a mode."""
    samples = min(config.harvest.problems or config.data.samples, config.data.samples)
    return samples * min(config.data.tokens_per_sample * LONGER[mode], config.harvest.max_length)


def activations(config: ChainConfig, mode: Mode) -> Estimate:
    """Vectors of all stages and layers in one mode."""
    stages, layers, d = config.harvested_stages(), config.harvest.layers, config.model.d_model
    tokens = tokens_of(config, mode)
    batch = (config.harvest.batch_tokens or 65_536) * d * 4 * (len(layers) + 4)
    what = f"{len(stages)} stages x {len(layers)} layers, about {tokens:,.0f} tokens each"
    disk = int(tokens * len(stages) * len(layers) * d * BYTES[config.harvest.dtype])
    return Estimate(what, disk=disk, memory=config.model.parameters * 4 + batch)


def chain(config: ChainConfig, settings: ChainSettings) -> Estimate:
    """SAEs of one k and layer, all stages, with the control."""
    stages, width = len(config.stage_names()), config.sae.expansion * config.model.d_model
    runs = 2 * stages - 1 if config.sae.control and not config.control_steps else stages
    control = f", {runs - stages} of them the control" if runs > stages else ""
    shape = f"{config.model.d_model} x {width:,}, k {settings.k}, {config.sae.epochs} epochs each"
    # weights, gradient, two moments; on disk the SAE, its last state and the best one
    size = sae_bytes(config)
    return Estimate(
        f"{runs} SAEs of {shape}{control}",
        disk=runs * size * 5,
        memory=size * 4 + config.sae.batch_size * width * 4 * 2,
    )


def sae_bytes(config: ChainConfig) -> int:
    """Size of one SAE in float32."""
    return cost.sae_bytes(config.model.d_model, config.sae.expansion * config.model.d_model)
