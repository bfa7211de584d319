"""Optional packages: imported where they are needed, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from hubsae.core.errors import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    >>> require("json", extra="train").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        if getattr(error, "name", None) not in (None, top, module):
            raise MissingExtraError(
                f"{module} is installed but cannot be imported: {error}",
                hint=f"reinstall it with: pip install -U 'hubsae[{extra}]'",
            ) from error
        raise MissingExtraError(
            f"this needs {top}, which is not installed", hint=f"pip install 'hubsae[{extra}]'"
        ) from error
