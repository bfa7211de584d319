"""Scopes are data: which tokens a number, a training or a splice is about, by the label columns of activations.

    "not position_0 & role=user"  ->  a mask over rows, from their labels

A real model puts a norm of 25,000 on its first token where the median is 171, so a number over all tokens says
little. A scope is a conjunction of terms; a term is a name, `not name` or `column=value`. Names with a meaning of
their own are below; every other name is a boolean column. The same text stands on cards, in tables and commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hubsae.core.errors import ConfigError, DataError

NAMES: dict[str, tuple[str, bool]] = {
    "prompt": ("is_prompt", True),
    "response": ("is_prompt", False),
    "special": ("is_special", True),
    "template": ("is_template", True),
    "assistant": ("is_assistant", True),
}
"""Names of boolean columns, and the value they stand for. Beside them: `all`, `position_0`, `massive`."""
NORM = "norm"
"""The label column `massive` looks at: the norm of the vector, which a reader computes."""
OLDER = {"no_position_0": "not position_0", "prompt_no_position_0": "prompt & not position_0"}
"""Spellings in records of earlier versions."""

_TERM = re.compile(r"(?P<no>not\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)(?:\s*=\s*(?P<value>[^=&]+))?")


@dataclass(frozen=True, order=True)
class Term:
    """One condition on a row."""

    negated: bool
    name: str
    value: str | None = None

    def __str__(self) -> str:
        text = self.name if self.value is None else f"{self.name}={self.value}"
        return f"not {text}" if self.negated else text

    @property
    def column(self) -> str:
        """The label column it needs."""
        if self.value is None and self.name in ("position_0", "massive"):
            return "position" if self.name == "position_0" else NORM
        return NAMES.get(self.name, (self.name, True))[0] if self.value is None else self.name


@dataclass(frozen=True)
class Scope:
    """Rows for which every term holds; without terms, all of them.

    >>> scope = parse("role=user & not position_0")
    >>> scope.name, scope.columns
    ('role=user & not position_0', ('position', 'role'))
    >>> scope.mask({"position": [0, 1, 2], "role": ["user", "user", "assistant"]}).tolist()
    [False, True, False]
    """

    terms: tuple[Term, ...] = ()
    massive_above: float | None = None
    """The norm above which a token counts as massive; not part of the name."""

    @property
    def name(self) -> str:
        """The canonical text: the same for every spelling of the same terms."""
        return " & ".join(map(str, self.terms)) or "all"

    def __str__(self) -> str:
        return self.name

    def __and__(self, other: Scope) -> Scope:
        """Rows in both.

        >>> (parse("prompt") & parse("not position_0")).name
        'prompt & not position_0'
        """
        bound = self.massive_above if self.massive_above is not None else other.massive_above
        return _scope([*self.terms, *other.terms], bound)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The label columns it needs, sorted."""
        return tuple(sorted({term.column for term in self.terms}))

    def mask(self, labels: Mapping[str, Any], rows: int | None = None) -> np.ndarray:
        """Which rows belong to it, bool [n]; `rows` is needed where there are no labels at all."""
        if rows is None:
            if not labels:
                raise DataError(f"scope {self.name!r}: no labels, so the number of rows is not known")
            rows = len(next(iter(labels.values())))
        found = np.ones(rows, dtype=bool)
        for term in self.terms:
            found &= self._holds(term, labels)
        return found

    def _holds(self, term: Term, labels: Mapping[str, Any]) -> np.ndarray:
        if term.column not in labels:
            raise DataError(
                f"scope {self.name!r} needs the label column {term.column!r}",
                hint=f"columns here: {', '.join(map(str, labels)) or 'none'}",
            )
        column = np.asarray(labels[term.column])
        if term.value is not None:
            holds = _equal(column, term)
        elif term.name == "position_0":
            holds = column == 0
        elif term.name == "massive":
            if self.massive_above is None:
                raise DataError(
                    f"scope {self.name!r}: the norm above which a token is massive is not known",
                    hint="give massive_above=, or read it from the statistics of the activations",
                )
            holds = column > self.massive_above
        else:
            if column.dtype.kind not in "biu":
                raise DataError(
                    f"scope {self.name!r}: column {term.column!r} holds {column.dtype}, not true or false",
                    hint=f"compare it: {term.column}=VALUE",
                )
            holds = column.astype(bool) == NAMES.get(term.name, ("", True))[1]
        return ~holds if term.negated else holds


ALL = Scope()


def parse(text: str, massive_above: float | None = None) -> Scope:
    """The scope that a text means.

    >>> parse("not special  & prompt & not position_0").name
    'prompt & not position_0 & not special'
    >>> parse("all").columns
    ()
    """
    terms = []
    for part in OLDER.get(text.strip(), text).split("&"):
        match = _TERM.fullmatch(part.strip())
        if match is None or (match["name"] == "not" and match["value"] is None):
            raise ConfigError(
                f"{text!r} is no scope: {part.strip()!r} cannot be read",
                hint="terms joined by &: position_0, not special, prompt, role=user, or any boolean column",
            )
        term = Term(bool(match["no"]), match["name"], match["value"] and match["value"].strip())
        if (term.name, term.value) != ("all", None):
            terms.append(term)
        elif term.negated:
            raise ConfigError(f"{text!r} is no scope: 'not all' is nothing")
    return _scope(terms, massive_above)


def excluding(names: Iterable[str], massive_above: float | None = None) -> Scope:
    """What is left when groups of tokens are left out; `all` where none is.

    >>> excluding(["special", "position_0"]).name, excluding([]).name
    ('not position_0 & not special', 'all')
    """
    terms = []
    for name in names:
        group = parse(name).terms
        if len(group) != 1:
            raise ConfigError(f"{name!r} cannot be left out", hint="name one group: position_0, special, massive ...")
        terms.append(Term(not group[0].negated, group[0].name, group[0].value))
    return _scope(terms, massive_above)


def _scope(terms: Iterable[Term], massive_above: float | None) -> Scope:
    return Scope(tuple(sorted(set(terms), key=lambda t: (t.negated, t.name, t.value or ""))), massive_above)


def _equal(column: np.ndarray, term: Term) -> np.ndarray:
    assert term.value is not None
    if column.dtype.kind in "OUS":
        return column.astype(str) == term.value
    try:
        wanted = {"true": 1.0, "false": 0.0}.get(term.value.lower())
        return column == (float(term.value) if wanted is None else wanted)
    except ValueError:
        raise DataError(f"column {term.name!r} holds numbers, so {term.value!r} is in no row") from None
