"""Names and numbers as people read and sort them: stages, natural order, sizes, foreign text made harmless."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from hubsae.core.errors import DataError

PROMPT_KEYS = ("prompt", "question", "problem", "instruction", "input")
"""Columns that hold what is asked, in harvest, splice and everywhere else; the first that is there counts."""
RESPONSE_KEYS = ("response", "answer", "completion", "output", "solution")
TEXT_KEYS = ("text", "content", "question", "prompt")
MESSAGE_KEYS = ("messages", "conversations", "conversation")

BASE_NAMES = ("base", "init", "start", "pretrained", "instruct")


def stage_step(stage: str | None) -> int | None:
    """The training step a stage's name says: its last number; 0 for the base model; None where it says none.

    >>> [stage_step(s) for s in ("ppo_step116", "checkpoint-500", "instruct_base", "final", None)]
    [116, 500, 0, None, None]
    """
    if not stage:
        return None
    if found := re.search(r"(\d+)$", stage):
        return int(found.group(1))
    words = re.split(r"[-_. ]", stage.lower())
    return 0 if "base" in words or stage.lower() in BASE_NAMES else None


def stage_order(stage: str | None) -> tuple[int, int, list[tuple[int, int | str]]]:
    """Sort key of stages: by step, the base first; those without a step behind, in natural order.

    >>> sorted(["ppo_step116", "final", "ppo_step30", "instruct_base"], key=stage_order)
    ['instruct_base', 'ppo_step30', 'ppo_step116', 'final']
    """
    step = stage_step(stage)
    return (0, step, []) if step is not None else (1, 0, natural_key(stage or ""))


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which `layer10` comes behind `layer9`.

    >>> sorted(["layer10", "layer9"], key=natural_key)
    ['layer9', 'layer10']
    """
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def format_bytes(size: float) -> str:
    """A size in bytes, with decimal units, as the Hub shows it.

    >>> format_bytes(512), format_bytes(25_700_000)
    ('512 B', '25.7 MB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.95 or unit == "TB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def format_count(count: float) -> str:
    """A large number, short.

    >>> format_count(999), format_count(12_300), format_count(2_293_760_000)
    ('999', '12.3k', '2.29G')
    """
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 999.5 or unit == "T":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError


def format_time(seconds: float) -> str:
    """A duration, to two units.

    >>> format_time(4.21), format_time(75), format_time(7260)
    ('4.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# letters that reorder what stands around them, and those that show nothing
_INVISIBLE = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def printable(text: Any, limit: int | None = None) -> str:
    """Text from a file or repo, harmless on a terminal and in a card: control, bidi and broken characters escaped.

    >>> printable("layer\\x1b[31m1"), printable("a\\u202eb")
    ('layer\\\\x1b[31m1', 'a\\\\u202eb')
    """
    out = []
    for letter in str(text):
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or _INVISIBLE.match(letter):
            out.append(letter.encode("unicode_escape", "backslashreplace").decode("ascii"))
        else:
            out.append(letter)
    shown = "".join(out)
    return shown if limit is None or len(shown) <= limit else shown[: max(0, limit - 1)] + "…"


def check_name(text: str, what: str) -> str:
    """An id or path as it came from a file or repo; refused where it holds what no name should.

    >>> check_name("saes/layer1", "id")
    'saes/layer1'
    """
    if printable(text) != text:
        raise DataError(
            f"{what} holds control or invisible characters: {printable(text, 80)}",
            hint="rename it; ids and paths are plain text",
        )
    return text
