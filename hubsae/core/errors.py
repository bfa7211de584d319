"""Typed errors. Each says what went wrong and, in `hint`, what to do next.

Other rooms derive their own from these; the command line prints any of them as one readable message
and exits with 1 (`--debug` shows the traceback).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike


class HubSAEError(Exception):
    """Base of every error hubsae raises on purpose.

    >>> print(HubSAEError("no SAE at layer 7", hint="layers here: 6, 12"))
    no SAE at layer 7
      -> layers here: 6, 12
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if not self.hint else f"{self.message}\n  -> {self.hint}"


class FormatError(HubSAEError):
    """A file is not what it should be: names the file, what was expected and what was found."""

    def __init__(self, path: str | PathLike[str], expected: str, found: str, hint: str | None = None):
        super().__init__(f"{path}: expected {expected}, found {found}", hint)
        self.path = str(path)
        self.expected = expected
        self.found = found

    def __reduce__(self):
        return type(self), (self.path, self.expected, self.found, self.hint)


class AmbiguousFormatError(HubSAEError):
    """More than one reading fits a file; the message lists them and how to choose."""


class ConfigError(HubSAEError):
    """A configuration contradicts itself or the tensors it describes."""


class MetadataError(HubSAEError):
    """metadata.json lacks something required or holds what it cannot."""


class MissingExtraError(HubSAEError, ImportError):
    """An optional package is needed; the hint is the install command."""


class NotFoundError(HubSAEError, LookupError):
    """What was asked for is not there; the hint names the nearest valid choices."""


class SAENotFoundError(NotFoundError):
    """No SAE of that id there, or none that fits the filters."""


class AmbiguousSAEError(NotFoundError):
    """Several SAEs fit; the message lists them."""


class HubRequestError(HubSAEError):
    """A request to the Hub failed for good."""


class DataError(HubSAEError):
    """Activations or text are not usable as they are."""


class TrainingError(HubSAEError):
    """Training cannot start or had to stop; the hint says where the last good state lies."""


class WriteError(HubSAEError):
    """A file could not be written; the message names it, the room it needs, and what is still whole."""


class TrainingInterrupted(TrainingError):
    """Somebody asked training to stop (Ctrl-C), and it did so in good order."""


class HookError(HubSAEError):
    """A model has no such hook point, or its output cannot be read."""


def nearest(wanted: str, choices: Iterable[str], most: int = 5) -> str:
    """The choices nearest to `wanted`, or the first few when none is near, as one line.

    >>> nearest("layer8", ["layer6", "layer18", "readme"])
    'layer18, layer6'
    """
    every = list(choices)
    near = get_close_matches(wanted, every, n=most, cutoff=0.5)
    if near:
        return ", ".join(near)
    more = f" ... ({len(every)} in all)" if len(every) > most else ""
    return ", ".join(every[:most]) + more
