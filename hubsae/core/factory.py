"""Which class an object has when it comes back to a user: set when `hubsae` is imported.

`train`, `convert`, `harvest` and the readers lie below the Hub and know an SAE and an activation dataset only as they
are on one machine; what they return can still be pushed. So they ask here, and here nobody imports upwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_loaders: dict[str, Callable[[], type[Any]]] = {}


def provide(base: str, loader: Callable[[], type[Any]]) -> None:
    """Set what gives the class that users get for the base class of this name; it is called at the first object."""
    _loaders[base] = loader


def user_class(base: type[Any]) -> type[Any]:
    """`base`, or the class that users get where that is a kind of it."""
    loader = _loaders.get(base.__name__)
    full = base if loader is None else loader()
    return full if issubclass(full, base) else base
