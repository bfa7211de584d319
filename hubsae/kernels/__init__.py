"""Encode, select and decode on plain tensors: the arithmetic that everything else stands on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

IMPLEMENTATIONS = ("torch", "triton")
_chosen = "torch"


def use(name: str) -> None:
    """Choose the implementation of the compute kernels: `torch` (always there), or `triton` on CUDA."""
    global _chosen
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"kernels {name!r} are unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if name != "torch" and find_spec(name) is None:
        raise ImportError(f"kernels={name!r} need the package {name}, which is not installed")
    _chosen = name


@contextmanager
def using(name: str) -> Iterator[None]:
    """`use` for the length of a context."""
    before = _chosen
    use(name)
    try:
        yield
    finally:
        use(before)


def chosen() -> str:
    """The implementation in use."""
    return _chosen


def aside(device_type: str) -> bool:
    """Whether work runs beside the host, which should not wait for it: on a GPU, or as it would in the interpreter."""
    return device_type != "cpu" or _chosen == "triton"
