"""Encode, select and decode on plain tensors: the arithmetic that everything else stands on."""

from __future__ import annotations

IMPLEMENTATIONS = ("torch", "numba", "triton")
_chosen = "torch"


def use(name: str) -> None:
    """Choose the implementation of the compute kernels: `torch` (always there), `numba`, or `triton` on CUDA."""
    global _chosen
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"kernels {name!r} are unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    _chosen = name


def chosen() -> str:
    """The implementation in use."""
    return _chosen
