"""Options of public functions: a misspelt one is answered with the nearest; those given are handed on by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from hubsae.core.errors import ConfigError, nearest

P = ParamSpec("P")
T = TypeVar("T")


def named_options(call: Callable[P, T]) -> Callable[P, T]:
    """Answer a misspelt keyword with the nearest one there is; the signature stays what it is.

    >>> @named_options
    ... def push(folder, *, private=False): return private
    >>> push("saes", privat=True)
    Traceback (most recent call last):
    ...
    hubsae.core.errors.ConfigError: push has no option 'privat'
      -> nearest: private; all: folder, private
    """
    known = list(inspect.signature(call).parameters)

    @wraps(call)
    def checked(*args: P.args, **options: P.kwargs) -> T:
        for name in options:
            if name not in known:
                shown = [n for n in known if n not in ("self", "cls")]
                raise ConfigError(
                    f"{call.__name__} has no option {name!r}",
                    hint=f"nearest: {nearest(name, shown)}; all: {', '.join(shown)}",
                )
        return call(*args, **options)

    return checked


@cache
def option_names(call: Callable[..., Any]) -> tuple[str, ...]:
    """What a function, or the making of a class, takes."""
    return tuple(inspect.signature(call).parameters)


def pass_on(call: Callable[..., T], given: Mapping[str, Any], **more: Any) -> T:
    """Call with what another function was given (its `locals()`) under the same names; `more` wins.

    >>> def save(path, *, dtype="float32"): return path, dtype
    >>> def convert(source, path, *, dtype="float32"): return pass_on(save, locals(), dtype=dtype.upper())
    >>> convert("a", "b", dtype="float16")
    ('b', 'FLOAT16')
    """
    return call(**{name: given[name] for name in option_names(call) if name in given} | more)
