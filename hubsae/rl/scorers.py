"""Scorers of GSM8K-style answers, as named pure functions: what each one extracts, and whether that is right.

    strict            verl today: `#### number` in the last 300 characters, last match, string equality
    strict_first      verl before: `#### number` anywhere, first match, string equality
    flexible          last number, written however; compared as a number (the chains' own scorer was not
                      published, so this is our reading of "looser numeric match")
    verl_flexible     last run of digits, commas and periods in the last 300 characters, string equality
    lm_eval_strict    lm-evaluation-harness gsm8k, strict-match filter and its normalisation
    lm_eval_flexible  lm-evaluation-harness gsm8k, flexible-extract filter and its normalisation

Nothing here evaluates text; numbers are parsed with a length limit, so no answer can make scoring slow.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from hubsae.core.errors import NotFoundError, nearest

VERSION = 1
"""Part of every run's record; raised when a scorer would judge some text differently."""

TAIL = 300
"""verl searches the last 300 characters only; an answer is stated at the end."""

LONGEST_NUMBER = 40
"""Digits beyond which a run of digits is no answer."""

# [0-9] and not \d: \d also matches digits of other scripts, which no published scorer accepts
_HASH = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER_RUN = re.compile(r"(\-?[0-9\.\,]+)")
_LM_EVAL_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_PLAIN_NUMBER = re.compile(r"(?<![0-9.])-?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


@dataclass(frozen=True)
class Scorer:
    """A named scorer.

    >>> SCORERS["strict"]("So\\n#### 72", "72"), SCORERS["strict"]("The answer is 72.", "72")
    (1.0, 0.0)
    """

    name: str
    extract: Callable[[str], str | None]
    """The answer a response states, None where it states none."""
    matches: Callable[[str, str], bool]
    """Whether an extracted answer equals the gold."""
    about: str

    def __call__(self, response: str, gold: str) -> float:
        """1.0 if `response` states `gold`, else 0.0."""
        found = self.extract(response)
        return float(found is not None and self.matches(found, gold))


def extract_strict(response: str) -> str | None:
    """`#### number` in the last 300 characters, last match, without commas.

    >>> extract_strict("#### 5 then #### 1,007")
    '1007'
    """
    found = _HASH.findall(response[-TAIL:])
    return found[-1].replace(",", "").replace("$", "") if found else None


def extract_strict_first(response: str) -> str | None:
    """`#### number` anywhere, first match, without commas.

    >>> extract_strict_first("#### 5 then #### 7")
    '5'
    """
    found = _HASH.search(response)
    return found.group(1).replace(",", "").replace("$", "") if found else None


def extract_verl_flexible(response: str) -> str | None:
    """The last run of digits, commas and periods that is not just a period, as it stands.

    >>> extract_verl_flexible("The answer is 72.")
    '72.'
    """
    found = _NUMBER_RUN.findall(response[-TAIL:])
    numbers = [run for run in found if run != "."]
    # verl falls back on the first run when all of them are periods; it scores 0 either way
    return numbers[-1] if numbers else found[0] if found else None


def extract_flexible(response: str) -> str | None:
    """The last number of the text, without commas, currency sign and trailing period.

    >>> extract_flexible("It costs $1,234.50.")
    '1234.50'
    """
    found = _PLAIN_NUMBER.findall(response)
    return found[-1].replace(",", "").replace("$", "") if found else None


def extract_lm_eval_strict(response: str) -> str | None:
    """`#### number`, first match, as lm-evaluation-harness normalises it.

    >>> extract_lm_eval_strict("#### 72.")
    '72'
    """
    found = _HASH.findall(response)
    return normalise_lm_eval(found[0]) if found else None


def extract_lm_eval_flexible(response: str) -> str | None:
    """The last number-like run, as lm-evaluation-harness normalises it.

    >>> extract_lm_eval_flexible("so 3,")
    '3'
    """
    found = _LM_EVAL_FLEXIBLE.findall(response)
    if not found:
        return None
    groups = [group for group in found[-1] if group]
    return normalise_lm_eval(groups[0].strip()) if groups else None


def normalise_lm_eval(text: str) -> str:
    """Drop what exact_match of lm-evaluation-harness ignores, in its order, and lower-case.

    >>> normalise_lm_eval("2+70=72\\n#### 72")
    '72'
    """
    text = text.replace(",", "").replace("$", "")
    text = text.rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


def gold_of(answer: str) -> str:
    """The gold number of a GSM8K answer: what follows the last `####`, without commas.

    >>> gold_of("1000+234=1234\\n#### 1,234")
    '1234'
    """
    return answer.rpartition("####")[2].strip().replace(",", "")


def find_scorer(name: str) -> Scorer:
    """A scorer by name, or an error that lists them."""
    if name not in SCORERS:
        raise NotFoundError(f"no scorer {name!r}", hint=f"scorers: {nearest(name, SCORERS, most=len(SCORERS))}")
    return SCORERS[name]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> float:
    """The flexible scorer with the signature verl's `custom_reward_function` calls.

    >>> compute_score("openai/gsm8k", "The answer is 72.", "72")
    1.0
    """
    return SCORERS["flexible"](solution_str, ground_truth)


def compute_score_strict(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> float:
    """The strict scorer with the signature verl's `custom_reward_function` calls.

    >>> compute_score_strict("openai/gsm8k", "The answer is 72.", "72")
    0.0
    """
    return SCORERS["strict"](solution_str, ground_truth)


def _same_text(found: str, gold: str) -> bool:
    return found == gold


def _same_number(found: str, gold: str) -> bool:
    a, b = _number(found), _number(gold.replace(",", "").replace("$", "").strip())
    return a is not None and a == b


def _same_lm_eval(found: str, gold: str) -> bool:
    return found == normalise_lm_eval(gold)


def _number(text: str) -> Decimal | None:
    if len(text) > LONGEST_NUMBER or not re.fullmatch(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)", text):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer("strict", extract_strict, _same_text, "verl's built-in GSM8K scorer as it is now"),
        Scorer("strict_first", extract_strict_first, _same_text, "verl's scorer before it searched the tail only"),
        Scorer("flexible", extract_flexible, _same_number, "last number, compared as a number"),
        Scorer("verl_flexible", extract_verl_flexible, _same_text, "verl's flexible method: commas and periods kept"),
        Scorer("lm_eval_strict", extract_lm_eval_strict, _same_lm_eval, "lm-evaluation-harness strict-match"),
        Scorer("lm_eval_flexible", extract_lm_eval_flexible, _same_lm_eval, "lm-evaluation-harness flexible-extract"),
    )
}
