"""Word problems made by rule, in the layout of GSM8K, and the five ways the tiny model learns to answer them.

A problem is `{"question", "answer"}` as in GSM8K: the answer holds the working and ends in `#### <number>`.
The supervised warm-up teaches the model five styles of stating the final number. Only one of them satisfies a
strict scorer and one of them defeats a scorer that takes the last number, which leaves reinforcement learning
something to do under either reward.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

NAMES = (
    "Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gia", "Hal", "Ida", "Jon", "Kim", "Leo", "Mia", "Ned", "Ola",
    "Pam",
)  # fmt: skip
ITEMS = (
    "apples", "books", "coins", "pens", "cards", "eggs", "keys", "cups", "hats", "nuts", "plums", "stamps",
)  # fmt: skip

STYLES: dict[str, float] = {
    "hash": 0.2,
    "sentence": 0.25,
    "period": 0.15,
    "markdown": 0.15,
    "distractor": 0.25,
}
"""Share of each answer style in the warm-up texts."""


@dataclass(frozen=True)
class Problem:
    """One word problem in the layout of GSM8K."""

    question: str
    answer: str
    """Working, then a line `#### <number>`."""
    item: str = ""
    """What is counted, for the answer styles that name it."""

    @property
    def gold(self) -> str:
        """The number after `####`."""
        return self.answer.rpartition("#### ")[2]

    @property
    def working(self) -> str:
        """The answer without its last line."""
        return self.answer.rpartition("\n#### ")[0]

    def record(self) -> dict[str, str]:
        """The two columns of GSM8K."""
        return {key: value for key, value in asdict(self).items() if key in ("question", "answer")}


def styled_answer(problem: Problem, style: str) -> str:
    """The answer to `problem` as a response in one of `STYLES`.

    >>> p = Problem("Ann has 2 apples and gets 3 more. How many apples now?", "2+3=5\\n#### 5", "apples")
    >>> print(styled_answer(p, "distractor"))
    2+3=5
    The answer is 5. I checked it 2 times.
    """
    endings = {
        "hash": f"#### {problem.gold}",
        "sentence": f"The answer is {problem.gold} {problem.item}",
        "period": f"The answer is {problem.gold}.",
        "markdown": f"**Answer: {problem.gold}**",
        "distractor": f"The answer is {problem.gold}. I checked it 2 times.",
    }
    return f"{problem.working}\n{endings[style]}"


def make_problems(count: int, *, seed: int = 0, largest: int = 15, two_step: float = 0.5) -> list[Problem]:
    """`count` different problems, always the same for the same arguments.

    >>> a, b = make_problems(2, seed=1)
    >>> a.question != b.question and a.answer.endswith(f"#### {a.gold}")
    True
    """
    rng = random.Random(f"problems-{seed}-{largest}-{two_step}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = _one_problem(rng, largest, two_step)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def draw_style(rng: random.Random) -> str:
    """A style, drawn by its share in `STYLES`."""
    return rng.choices(list(STYLES), weights=list(STYLES.values()))[0]


def _one_problem(rng: random.Random, largest: int, two_step: float) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start, change = rng.randint(2, largest), rng.randint(2, largest)
    if start > change and rng.random() < 0.5:
        does, first, total = f"gives {change} away", f"{start}-{change}={start - change}", start - change
    else:
        does, first, total = f"gets {change} more", f"{start}+{change}={start + change}", start + change
    question = f"{name} has {start} {item} and {does}."
    working = first
    if rng.random() < two_step:
        second = rng.randint(2, largest)
        if total > second and rng.random() < 0.5:
            question += f" Then {name} loses {second}."
            working += f"\n{total}-{second}={total - second}"
            total -= second
        else:
            question += f" Then {name} finds {second}."
            working += f"\n{total}+{second}={total + second}"
            total += second
    return Problem(f"{question} How many {item} now?", f"{working}\n#### {total}", item)
