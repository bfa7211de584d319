"""Which class an SAE has when it comes back to a user: set once, when `hubsae` is imported.

`train`, `convert` and the readers lie below the Hub and know only the maths of an SAE; what they return can still be
pushed. So they ask here, and here nobody imports upwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_loader: Callable[[], type[Any]] | None = None


def provide(loader: Callable[[], type[Any]]) -> None:
    """Set what gives the class; it is called at the first SAE."""
    global _loader
    _loader = loader


def sae_class(base: type[Any]) -> type[Any]:
    """`base`, or the class that users get where that is a kind of it."""
    if _loader is None:
        return base
    full = _loader()
    return full if issubclass(full, base) else base
