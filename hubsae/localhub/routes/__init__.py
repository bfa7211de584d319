"""The hub's urls, one file per topic. Order matters only for the pages, which come last: they match short paths."""

from __future__ import annotations

from ..routing import Router


def all_routes() -> Router:
    """Every route of the hub."""
    from . import (
        access,
        account,
        collections,
        commits,
        content,
        control,
        discussions,
        lfs,
        pages,
        refs,
        repos,
        tree,
        xet,
    )

    table = Router()
    for module in (
        control,
        account,
        repos,
        tree,
        commits,
        refs,
        discussions,
        access,
        collections,
        lfs,
        xet,
        content,
        pages,
    ):
        table.include(module.routes)
    return table
