"""The only rooms that talk to the Hub: client, retries, push, load, cards, datasets.

Names are resolved on first use; importing this package imports no huggingface_hub.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "HubClient": "hubsae.hub.client",
    "RetryPolicy": "hubsae.hub.retry",
    "retrying": "hubsae.hub.retry",
    "describe": "hubsae.hub.listing",
    "list_saes": "hubsae.hub.listing",
    "pull": "hubsae.hub.load",
    "render_card": "hubsae.hub.card",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NAMES[name]), name)
