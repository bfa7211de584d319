"""A step of a recipe: what it does, what it depends on, what it will cost, and what it sees while it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel


class Progress(Protocol):
    """Told how far a step is."""

    def __call__(self, done: float, total: float | None = None, text: str | None = None) -> None:
        """`done` of `total`, and what is being done."""
        ...


@dataclass(frozen=True)
class Estimate:
    """What a step will need, for `--dry-run`."""

    what: str = ""
    """In words, with sizes: "6 stages x 4 layers, 445,744 tokens each"."""
    disk: int = 0
    """Bytes it leaves on disk."""
    memory: int = 0
    """Bytes of the largest moment, on whichever device does the work."""
    seconds: float = 0
    """How long, on the machine that `what` names or the profile is for; 0 where that is not known."""
    moved: int = 0
    """Bytes read from and written to disks or hubs, passes counted."""


@dataclass(frozen=True)
class Step:
    """One step of a recipe; it writes into a folder of its own name below the run folder.

    A step runs again only when `settings`, `version` or the step it `needs` changed, or when what it wrote is gone.

    >>> def hello(ctx):
    ...     (ctx.folder / "hello.txt").write_text(f"hello {ctx.settings['who']}")
    ...     return {"greeted": 1}
    >>> Step("greeting", hello, settings={"who": "world"}).name
    'greeting'
    """

    name: str
    run: Callable[[StepContext], Any]
    """Does the work; what it returns (plain JSON values) is kept and given to later steps."""
    settings: Any = None
    """All that decides the outcome beside `needs`: JSON values or a pydantic model."""
    needs: tuple[str, ...] = ()
    """Names of the steps whose folders or results it reads."""
    rescues: tuple[str, ...] = ()
    """Steps whose folders it reads as they lie, finished or not; it runs again when a file there has another size."""
    resumes: bool = False
    """Whether it continues from what a killed run left in its folder; otherwise it starts with an empty one."""
    spreads: bool = False
    """Whether, under torchrun, the other ranks run it too, each for its share (see `run`)."""
    version: int = 1
    """Raised when the same settings would now give something else."""
    estimate: Estimate = field(default_factory=Estimate)

    def plain_settings(self) -> Any:
        """The settings as JSON values."""
        return plain(self.settings)


def priced(steps: Iterable[Step], estimates: Mapping[str, Estimate]) -> list[Step]:
    """Steps with what each will need, by name.

    >>> [step.estimate.what for step in priced([Step("sae", print)], {"sae": Estimate("one SAE")})]
    ['one SAE']
    """
    return [replace(step, estimate=estimates.get(step.name, step.estimate)) for step in steps]


@dataclass(frozen=True)
class StepContext:
    """What a running step sees."""

    step: Step
    folder: Path
    """Its own folder; everything it leaves behind goes here."""
    run_folder: Path
    results: dict[str, Any]
    """Results of the steps it needs."""
    folders: dict[str, Path]
    """Folders of the steps it needs."""
    progress: Progress

    @property
    def settings(self) -> Any:
        """The settings the step was declared with."""
        return self.step.settings

    def path(self, step: str) -> Path:
        """The folder of a step this one needs."""
        return self.folders[self._known(step)]

    def result(self, step: str) -> Any:
        """What a step this one needs returned."""
        return self.results[self._known(step)]

    def _known(self, step: str) -> str:
        if step not in self.folders:
            # reading a step that is not declared would let the run miss a change in it
            raise KeyError(f"step {self.step.name!r} reads {step!r} without naming it in needs={self.step.needs}")
        return step


def plain(value: Any) -> Any:
    """`value` as JSON values: pydantic models, paths, tuples and sets included.

    >>> plain({"folder": Path("a"), "layers": (1, 2)})
    {'folder': 'a', 'layers': [1, 2]}
    """
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"settings and results of a step are plain JSON values, not {type(value).__name__}")


def fingerprint(step: Step, needed: dict[str, Any]) -> str:
    """A hash of all that decides what `step` will produce; `needed` says what the steps it needs are, by name."""
    about = {"name": step.name, "version": step.version, "settings": step.plain_settings(), "needs": needed}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
