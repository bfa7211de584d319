"""What each step will need, from the settings alone: for `--dry-run`, before anything is loaded."""

from __future__ import annotations

from hubsae.recipes import cost
from hubsae.recipes.cost import machine_of, sae_bytes
from hubsae.recipes.steps import Estimate

from .settings import Config

PROBE_SHARE = 0.3
"""Of the encoding pass, what the sums of a probe cost at most"""


def of(config: Config) -> dict[str, Estimate]:
    """Estimates by name of the step."""
    d, model, sae = config.data, config.model, config.sae
    on = machine_of(model)
    rate, weights = on.flops, model.parameters * on.weight
    each, held = d.tokens_per_sample, d.test * d.candidates
    tokens = min(d.train * each, d.tokens or float("inf"))
    forward = cost.forward(model)
    made, each_sae = config.prm.id is None, sae_bytes(model.d_model, sae.width)
    # what comes back: through an adapter only the states' gradients, else those of the weights too
    learning = 1 + (1 if config.prm.lora else 2) * (1 - config.prm.from_layer / model.layers)
    found = {
        "subject": Estimate(f"{model.label}, {d.id}", disk=weights),
        "prm": Estimate(
            f"{d.prm * config.prm.versions:,} solutions, {'LoRA' if config.prm.lora else 'all weights'}" if made
            else f"{config.prm.id}",
            disk=weights, memory=(2 if config.prm.lora else 4) * weights if made else weights,
            seconds=learning * forward * d.prm * config.prm.versions * each * config.prm.epochs / rate if made else 0,
        ),
        "scores": Estimate(f"{d.train + held:,} solutions", memory=weights,
                           seconds=forward * (d.train + held) * each / rate),
        "truncation": Estimate(
            f"{config.truncation * d.candidates:,} solutions, whole and at {len(config.layers)} layers", memory=weights,
            seconds=3 * forward * config.truncation * d.candidates * each / rate,
        ),
        "base": Estimate(f"{config.probe.top} features matched, one steered", memory=2 * weights,
                         seconds=20 * forward * config.steer.prompts * each / rate),
        "index": Estimate(f"{len(config.layers)} SAEs", memory=each_sae,
                          seconds=2 * sae.width * model.d_model * tokens * len(config.layers) / rate),
    }  # fmt: skip
    if config.rl is not None:
        found["rl"] = Estimate(f"PPO against the probe, {config.rl.steps} steps", memory=12 * weights)
    layers = {"reward": config.layers, "base": config.base_layers, "untrained": config.untrained_layers}
    for name, some in layers.items():
        if not some:
            continue
        disk = int((tokens + held * each) * len(some) * model.d_model * 2)
        encode = 2.0 * sae.width * model.d_model * tokens * len(some)
        found[f"harvest/{name}"] = Estimate(
            f"{len(some)} layers, {int(tokens):,} tokens and {held:,} solutions held out", disk=disk, memory=weights,
            seconds=forward * (tokens + held * each) * (max(some) + 1) / model.layers / rate, moved=disk,
        )  # fmt: skip
        found[f"saes/{name}"] = Estimate(
            f"{len(some)} SAEs of {sae.width:,} latents, {sae.epochs:g} epochs",
            disk=len(some) * each_sae, memory=3 * len(some) * each_sae,
            seconds=3 * encode * sae.epochs / rate, moved=int(disk * sae.epochs),
        )  # fmt: skip
        # sums of the codes and of a random dictionary, and two copies of one while it is factored
        sums = (2 * config.probe.folds + 2) * sae.width**2 * 8
        solves = len(some) * 3 * 7 * (config.probe.folds + 1) * sae.width**3 / 3
        found[f"probes/{name}"] = Estimate(
            f"ridge on {sae.width:,} latents, {config.probe.folds} folds, {config.probe.shuffles} shuffles; memory if "
            "every latent fires", memory=sums,
            seconds=(1 + PROBE_SHARE) * encode / each * 4 / rate + solves / (rate / 3),
        )  # fmt: skip
    return found
