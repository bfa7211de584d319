"""What each step of a chain recipe will need, from the settings alone: for `--dry-run`, before anything is loaded.

Memory is that of tensors that must be there at once; allocators and libraries add to it.
"""

from __future__ import annotations

from hubsae.recipes.steps import Estimate
from hubsae.rl.config import RLConfig
from hubsae.rl.warmup import WarmUp

from .settings import ChainConfig, ChainSettings, Mode

VOCABULARY = 151_936
"""Of Qwen2.5; logits are the largest tensor of a forward."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def source(config: ChainConfig) -> Estimate:
    """Model and problems."""
    size = config.model.parameters * 4
    what = f"{config.model.label} ({config.model.parameters / 1e6:,.0f} M parameters), {config.data.id}"
    return Estimate(what, disk=size, memory=size)


def warmup(config: ChainConfig, settings: WarmUp) -> Estimate:
    """Supervised steps: weights, gradient, two moments."""
    size = config.model.parameters * 4
    return Estimate(f"{settings.steps} steps of {settings.batch} answers", disk=size, memory=4 * size)


def reinforcement(config: ChainConfig, rl: RLConfig) -> Estimate:
    """The run of PPO: models, optimisers, logits, saved stages and states."""
    weights = config.model.parameters * 4
    trained = weights if rl.lora is None else adapter_bytes(config, rl.lora.r)
    copies = 2 if rl.lora is None else 1  # policy and, without an adapter to switch off, a reference
    critic = 4 * weights  # weights, gradient, two moments
    vocabulary = VOCABULARY if config.model.parameters > 10_000_000 else 512
    # logits, their float32 copy and the softmax of one micro-batch
    logits = rl.micro_batch * (rl.max_response + 1) * vocabulary * 4 * 3
    state = 3 * (trained + weights)
    saved = [step for step in rl.save_steps if step <= rl.steps]
    what = (
        f"PPO, {rl.scorer} reward{', gold shuffled' if rl.shuffled_gold else ''}: {rl.steps} steps "
        f"x {rl.sequences:,} responses of at most {rl.max_response} tokens, {len(saved)} stages saved, "
        f"{'LoRA r ' + str(rl.lora.r) if rl.lora else 'all weights'}"
    )
    return Estimate(what, disk=state + len(saved) * trained, memory=copies * weights + 3 * trained + critic + logits)


def adapter_bytes(config: ChainConfig, rank: int) -> int:
    """Size of a LoRA adapter on all linear layers; for the usual shapes about 17 ranks of width per block."""
    return config.model.layers * 17 * rank * config.model.d_model * 4


def accuracy(config: ChainConfig) -> Estimate:
    """Sampling held-out problems at one stage."""
    count = config.evaluation.accuracy_problems
    return Estimate(f"{count:,} held-out problems", memory=config.model.parameters * 4)


def merge(config: ChainConfig) -> Estimate:
    """Comparing every stage with the base, in float32 and as stored in fewer bits."""
    return Estimate(f"{len(config.stage_names()) - 1} stages against the base", memory=config.model.parameters * 4 * 4)


def tokens_of(config: ChainConfig, mode: Mode) -> float:
    """Tokens one stage gives in a mode."""
    samples = min(config.harvest.problems or config.data.samples, config.data.samples)
    question = config.data.tokens_per_sample
    longer = {"question": 1.0, "prompt": 1.6, "prompt+response": 3.5, "own": 4.5}[mode]
    return samples * min(question * longer, config.harvest.max_length)


def activations(config: ChainConfig, mode: Mode) -> Estimate:
    """Vectors of all stages and layers in one mode."""
    stages, layers = config.harvested_stages(), config.harvest.layers
    tokens = tokens_of(config, mode)
    disk = tokens * len(stages) * len(layers) * config.model.d_model * BYTES[config.harvest.dtype]
    batch = (config.harvest.batch_tokens or 65_536) * config.model.d_model * 4 * (len(layers) + 4)
    what = f"{len(stages)} stages x {len(layers)} layers, about {tokens:,.0f} tokens each"
    return Estimate(what, disk=int(disk), memory=int(config.model.parameters * 4 + batch))


def chain(config: ChainConfig, settings: ChainSettings) -> Estimate:
    """SAEs of one k and layer, all stages, with the control."""
    stages = len(config.stage_names())
    runs = 2 * stages - 1 if config.sae.control and not config.control_steps else stages
    width = config.sae.expansion * config.model.d_model
    weights = 2 * width * config.model.d_model * 4
    what = f"{runs} SAEs of {config.model.d_model} x {width:,}, k {settings.k}, {config.sae.epochs} epochs each" + (
        f", {runs - stages} of them the control" if runs > stages else ""
    )
    # weights, gradient, two moments; on disk the SAE, its last state and the best one
    return Estimate(what, disk=runs * weights * 5, memory=weights * 4 + config.sae.batch_size * width * 4 * 2)


def evaluation(config: ChainConfig) -> Estimate:
    """Reconstruction and splice of one stage's SAEs."""
    count = sum(len(chain.layers) for chain in config.sae.chains)
    what = f"{count} SAEs: held-out activations, and {config.evaluation.splice_texts} texts with the SAE in the model"
    return Estimate(what, memory=config.model.parameters * 4 + count * sae_bytes(config))


def drift(config: ChainConfig) -> Estimate:
    """Every SAE of a layer on the activations of every stage."""
    stages = len(config.stage_names())
    return Estimate(f"{stages} x {stages} SAEs and stages per layer", memory=2 * stages * sae_bytes(config))


def release(config: ChainConfig) -> Estimate:
    """The packaged SAEs."""
    count = len(config.stage_names()) * sum(len(chain.layers) for chain in config.sae.chains)
    return Estimate(f"{count} SAEs with metrics, tables, plots and card", disk=count * sae_bytes(config))


def sae_bytes(config: ChainConfig) -> int:
    """Size of one SAE in float32."""
    return 2 * config.sae.expansion * config.model.d_model**2 * 4
