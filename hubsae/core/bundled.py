"""Where the card templates and recipes lie: inside an installed wheel, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

from hubsae.core.errors import HubSAEError

PACKAGE = Path(__file__).resolve().parent.parent


def bundled(name: str) -> Path:
    """The folder `cards` or `recipes`.

    >>> bundled("cards").name
    'cards'
    """
    for folder in (PACKAGE / "_data" / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise HubSAEError(
        f"this installation of hubsae has no {name}/ folder", hint="reinstall it: pip install --force-reinstall hubsae"
    )
