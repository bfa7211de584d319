"""What verbs that measure SAEs share: load those that fit, and find the activations of each."""

from __future__ import annotations

from typing import Any

from hubsae.core.progress import progress
from hubsae.hub.sae import HubSAE


def load(target: str, device: str, **filters: Any) -> dict[str, HubSAE]:
    """SAEs of a release or repo that fit, by id."""
    chosen = {name: value for name, value in filters.items() if value is not None}
    saes: dict[str, HubSAE] = {}
    with progress("loading SAEs") as task:
        for name, sae in HubSAE.iter_pretrained(target, device=device, **chosen):
            saes[name] = sae
            task.advance()
    return saes


def together(
    saes: dict[str, HubSAE], path: str, config: str | None, split: str | None
) -> list[tuple[Any, dict[str, HubSAE]]]:
    """SAEs by the activations they are measured on."""
    from hubsae.evals.record import activation_reader, activations_of

    read = activation_reader(path, config=config, split=split)
    found: dict[tuple[str, str], tuple[Any, dict[str, HubSAE]]] = {}
    for name, sae in saes.items():
        data = activations_of(sae, read)
        found.setdefault((data.config, data.split), (data, {}))[1][name] = sae
    return list(found.values())
