"""Worked solutions with one wrong step, made by rule, so that which steps are right is known.

    operand    a number that is neither in the question nor in an earlier step, and what follows from it
    operation  another operation, carried out correctly
    carry      the right operation with a ten too many or too few
    final      another final answer

A solution that goes wrong ends with its wrong step, as labels of process reward models do.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hubsae.rl.steps import StepText, split_steps

KINDS = ("operand", "operation", "carry", "final")
RIGHT = "right"
_NUMBER = r"[$€£]?(?P<{}>\d+)"
EQUATION = re.compile(
    rf"{_NUMBER.format('a')}\s*(?P<op>[-+*x×])\s*{_NUMBER.format('b')}\s*=\s*{_NUMBER.format('c')}(?![\d.,]*\d)"
)
OTHER = {"+": "-", "-": "+", "*": "+", "x": "+", "×": "+"}


@dataclass(frozen=True)
class Solution:
    """An answer to a problem, step by step, with what is known of it."""

    problem: int
    prompt: str
    steps: tuple[str, ...]
    good: tuple[bool, ...]
    """Whether each step is right; empty where nobody knows"""
    kind: str = RIGHT
    scores: tuple[float, ...] = field(default=())
    """What a reward model says of each step"""

    @property
    def text(self) -> StepText:
        """As reward models take it."""
        return StepText(self.prompt, self.steps)


def corrupt(question: str, steps: Sequence[str], kind: str, rng: random.Random) -> tuple[str, ...] | None:
    """The steps up to the first wrong one, which is the last; None where this kind of error fits nowhere.

    >>> corrupt("Ann has 2 cups and gets 3 more.", ["2+3=5", "#### 5"], "operation", random.Random(0)) is None
    True
    >>> corrupt("Ann has 4 cups and gets 3 more.", ["4+3=7", "#### 7"], "operation", random.Random(0))
    ('4-3=1',)
    >>> corrupt("Ann has 4 cups and gets 3 more.", ["4+3=7", "#### 7"], "carry", random.Random(0))
    ('4+3=17',)
    """
    if kind == "final":
        gold = re.fullmatch(r"#### (\d+)", steps[-1])
        if gold is None:
            return None
        moved = [n for n in (int(gold[1]) + d for d in range(-12, 13) if d) if n >= 0]
        return (*steps[:-1], f"#### {rng.choice(moved)}")
    places = [(i, found) for i, step in enumerate(steps) if (found := EQUATION.search(step)) and _holds(found)]
    rng.shuffle(places)
    for at, found in places:
        a, b, c, op = int(found["a"]), int(found["b"]), int(found["c"]), found["op"]
        if kind == "operand":
            known = {int(n) for n in re.findall(r"\d+", " ".join([question, *steps[:at], steps[at]]))}
            free = [n for n in range(max(2, a // 2), 2 * a + 12) if n not in known and 0 <= _value(n, op, b) != c]
            if not free:
                continue
            a = rng.choice(free)
            c = _value(a, op, b)
        elif kind == "operation":
            op = OTHER[op]
            if op == "-" and a < b:
                continue
            if _value(a, op, b) == c:
                continue
            c = _value(a, op, b)
        else:
            c += 10 if c < 10 or rng.random() < 0.5 else -10
        return (*steps[:at], _written(steps[at], found, a, op, c))
    return None


def solutions(
    rows: Iterable[dict[str, Any]],
    render: Any,
    *,
    wrong: Sequence[float] = (0.5,),
    longest: int | None = None,
    first: int = 0,
    most: int | None = None,
    seed: int = 0,
) -> list[Solution]:
    """Solutions to the problems of `rows`: to each as many as `wrong` has entries, each wrong with that chance.

    Rows are `question` and `answer`, or `messages`, whose answers are taken as they are, with no label. `render` makes
    the prompt of a question; `longest` leaves out answers of more characters, prompt included.
    """
    found: list[Solution] = []
    made_of: Counter[str] = Counter()
    taken = 0
    for number, row in enumerate(rows, start=first):
        if most is not None and taken >= most:
            break
        rng = random.Random(f"errors-{seed}-{number}")
        known = "question" in row
        question = row["question"] if known else row["messages"][-2]["content"]
        answer = row["answer"] if known else row["messages"][-1]["content"]
        prompt, steps = render(question), split_steps(answer, "\n" if known else "\n\n")
        if longest is not None and len(prompt) + len(answer) > longest:
            continue
        if not known:
            found.append(Solution(number, prompt, steps, ()))
            taken += 1
            continue
        made: list[Solution] = []
        for chance in wrong:
            kinds = rng.sample(KINDS, len(KINDS)) if rng.random() < chance else []
            kinds.sort(key=made_of.__getitem__)  # the rarest so far first: most kinds fit only some solutions
            other = next(((k, w) for k in kinds if (w := corrupt(question, steps, k, rng)) is not None), None)
            if other is not None and other[1] not in {m.steps for m in made}:
                made.append(Solution(number, prompt, other[1], (*[True] * (len(other[1]) - 1), False), other[0]))
                made_of[other[0]] += 1
            elif chance < 1 and steps not in {m.steps for m in made}:
                made.append(Solution(number, prompt, steps, (True,) * len(steps)))
        found += made
        taken += bool(made)
    return found


def _holds(found: re.Match[str]) -> bool:
    return _value(int(found["a"]), found["op"], int(found["b"])) == int(found["c"])


def _value(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def _written(step: str, found: re.Match[str], a: int, op: str, c: int) -> str:
    """The step with these in place of what it says; from the right, so that places stay true."""
    for name, value in (("c", c), ("op", op), ("a", a)):
        step = step[: found.start(name)] + str(value) + step[found.end(name) :]
    return step
