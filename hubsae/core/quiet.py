"""Keeps transformers from drawing a progress bar for every small checkpoint it loads or saves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hubsae.core.extras import require


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside; as before afterwards.

    >>> with quiet():
    ...     pass
    """
    require("transformers", extra="train")
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # transformers 5 warns of names that peft and trl still use
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
