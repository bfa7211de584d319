"""The run folder: steps that are skipped when nothing they depend on changed, and continue after a kill.

    RUN/run.json             what is being run: recipe, config, versions
    RUN/<step>/...           what a step wrote
    RUN/.steps/<step>.json   written last: the step is finished, with its fingerprint, result and files
    RUN/.steps/<step>.begun  the step was begun with this fingerprint, so a resuming step may trust its folder

A step counts as finished only when its record is there, its fingerprint is the same and its files are whole.

Under torchrun the first rank runs the steps and the others wait, except in steps that spread (`Step.spreads`): those
they are called for too, with RANK and WORLD_SIZE in the environment, which other steps do not see. Ranks meet in the
run folder alone, so it must be one they all see. When one rank fails torchrun ends the others.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hubsae.core.errors import ConfigError, HubSAEError, nearest
from hubsae.core.files import read_json, safe_join, write_json_atomic, write_text_atomic
from hubsae.core.progress import progress, say
from hubsae.core.text import format_time
from hubsae.recipes.steps import Step, StepContext, fingerprint, plain
from hubsae.version import __version__

POLL = 0.1
"""Seconds between two looks at what the first rank has reached."""

State = Literal["finished", "new", "changed", "incomplete"]


class RunError(HubSAEError):
    """A run cannot start or a step of it failed."""


class StepState(NamedTuple):
    """Where a step stands in a run folder."""

    state: State
    why: str
    """Why it has to run, in a few words; empty when finished."""


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step in one call of `RunFolder.execute`."""

    name: str
    ran: bool
    """False where it was finished already."""
    seconds: float
    result: Any


class StepEvent(NamedTuple):
    """A step begins, or has ended."""

    name: str
    number: int
    """Counted from 1."""
    of: int
    why: str = ""
    """Why a step that begins runs again."""
    outcome: StepOutcome | None = None
    """None where it begins."""


def say_event(event: StepEvent) -> None:
    """One line where a step ends, or is found finished.

    >>> say_event(StepEvent("harvest", 1, 8))
    """
    if event.outcome is not None:
        ended = f"done in {format_time(event.outcome.seconds)}" if event.outcome.ran else "unchanged, skipped"
        say(f"[{event.number}/{event.of}] {event.name}: {ended}")


class RunFolder:
    """Runs steps in a folder; `notify` hears of each step, `show` is that of `hubsae.core.progress`.

    >>> import tempfile
    >>> step = Step("count", lambda ctx: {"n": ctx.settings}, settings=3)
    >>> run = RunFolder(Path(tempfile.mkdtemp()) / "run")
    >>> [o.ran for o in run.execute([step])], [o.ran for o in run.execute([step])]
    ([True], [False])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        notify: Callable[[StepEvent], None] | None = None,
        show: bool | None = False,
    ):
        self.path = Path(path).absolute()
        self.notify, self.show = notify, show

    def describe(self, recipe: str, profile: str, config: Any) -> None:
        """Record what this folder is a run of; `run.json` holds it."""
        about = {"recipe": recipe, "profile": profile, "config": plain(config), "versions": versions()}
        path = self.path / "run.json"
        if path.is_file():
            before = read_json(path).get("recipe")
            if before != recipe:
                raise RunError(
                    f"{self.path} is a run of the recipe {before!r}, not of {recipe!r}",
                    hint="choose another folder with --out",
                )
        try:
            write_json_atomic(path, about)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write to the run folder {self.path}: {error.strerror}", hint="choose another with --out"
        )

    def states(self, steps: Sequence[Step]) -> dict[str, StepState]:
        """Where each step stands, without running anything."""
        prints = self._fingerprints(steps)
        return {step.name: self._state(step, prints[step.name]) for step in steps}

    def execute(self, steps: Sequence[Step]) -> list[StepOutcome]:
        """Run every step that is not finished, in the given order."""
        prints = self._fingerprints(steps)
        if follows():
            return self._follow(steps, prints)
        with self._lock():
            outcomes: list[StepOutcome] = []
            for number, step in enumerate(steps, 1):
                outcome = self._execute_one(step, prints, outcomes, StepEvent(step.name, number, len(steps)))
                outcomes.append(outcome)
            return outcomes

    def _follow(self, steps: Sequence[Step], prints: dict[str, str]) -> list[StepOutcome]:
        """Wait for the first rank through every step, and do this rank's share of those that spread."""
        outcomes: list[StepOutcome] = []
        for step in steps:
            helped = False
            while (outcome := self._finished(step, prints[step.name])) is None:
                if step.spreads and not helped and self._has_begun(step, prints[step.name]):
                    step.run(self._context(step, outcomes))
                    helped = True
                else:
                    time.sleep(POLL)
            outcomes.append(outcome)
        return outcomes

    def forget(self, steps: Sequence[Step], names: Sequence[str]) -> list[str]:
        """Take these steps for not done, and all that follow from them: their code changed. Returns which."""
        known = [step.name for step in steps]
        for name in names:
            if name not in known:
                raise ConfigError(f"there is no step {name!r}", hint=f"nearest: {nearest(name, known)}")
        again: list[str] = []
        for step in steps:
            if step.name in names or any(need in again for need in step.needs):
                again.append(step.name)
                self._record_path(step.name).unlink(missing_ok=True)
                self._begun_path(step.name).unlink(missing_ok=True)
        return again

    def folder(self, step: str) -> Path:
        """The folder a step writes into."""
        return safe_join(self.path, step)

    def result(self, step: str) -> Any:
        """The result of a finished step."""
        return read_json(self._record_path(step))["result"]

    def seconds(self) -> dict[str, float]:
        """How long each finished step took."""
        records = sorted((self.path / ".steps").glob("*.json"), key=lambda path: read_json(path)["finished"])
        return {read_json(path)["name"]: read_json(path)["seconds"] for path in records}

    def _execute_one(
        self, step: Step, prints: dict[str, str], before: list[StepOutcome], event: StepEvent
    ) -> StepOutcome:
        notify = self.notify or (lambda event: None)
        state = self._state(step, prints[step.name])
        notify(event._replace(why=state.why))
        if state.state == "finished":
            record = read_json(self._record_path(step.name))
            outcome = StepOutcome(step.name, False, record["seconds"], record["result"])
            notify(event._replace(outcome=outcome))
            return outcome
        self._prepare(step, prints[step.name])
        clock = time.perf_counter()
        try:
            why = f" ({state.why})" if state.why else ""
            ranks = nullcontext() if step.spreads else _alone()
            with ranks, progress(f"[{event.number}/{event.of}] {step.name}{why}", show=self.show) as task:
                result = plain(step.run(self._context(step, before, task.report)))
        except HubSAEError as error:
            error.hint = _joined(error.hint, f"this was step {step.name!r}; the same command continues from here")
            raise
        seconds = round(time.perf_counter() - clock, 3)
        self._finish(step, prints, result, seconds)
        outcome = StepOutcome(step.name, True, seconds, result)
        notify(event._replace(outcome=outcome))
        return outcome

    def _context(
        self, step: Step, before: list[StepOutcome], report: Callable[..., None] = lambda *_: None
    ) -> StepContext:
        results = {outcome.name: outcome.result for outcome in before}
        return StepContext(
            step=step,
            folder=self.folder(step.name),
            run_folder=self.path,
            results={name: results[name] for name in step.needs},
            folders={name: self.folder(name) for name in (*step.needs, *step.rescues)},
            progress=report,
        )

    def _has_begun(self, step: Step, print_: str) -> bool:
        """Whether a step is being run (or was when it was killed) with this fingerprint."""
        begun = self._begun_path(step.name)
        try:
            return begun.read_text(encoding="utf-8").strip() == print_
        except FileNotFoundError:
            return False

    def _finished(self, step: Step, print_: str) -> StepOutcome | None:
        """What became of a step that is finished with this fingerprint, None where it is not."""
        try:
            if self._state(step, print_).state != "finished":
                return None
            record = read_json(self._record_path(step.name))
        except FileNotFoundError:
            return None  # taken away in between, to be run again
        return StepOutcome(step.name, True, record["seconds"], record["result"])

    def _prepare(self, step: Step, print_: str) -> None:
        """Make the step's folder: as a killed run left it if the step can go on from that, else empty."""
        folder, begun = self.folder(step.name), self._begun_path(step.name)
        self._record_path(step.name).unlink(missing_ok=True)
        if not (step.resumes and self._has_begun(step, print_)):
            begun.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(begun, print_ + "\n")

    def _finish(self, step: Step, prints: dict[str, str], result: Any, seconds: float) -> None:
        record = {
            "name": step.name,
            "fingerprint": prints[step.name],
            "settings": step.plain_settings(),
            "needs": {name: prints[name] for name in step.needs},
            "result": result,
            "files": _inventory(self.folder(step.name)),
            "seconds": seconds,
            "finished": time.time(),
        }
        write_json_atomic(self._record_path(step.name), record)
        self._begun_path(step.name).unlink(missing_ok=True)

    def _state(self, step: Step, print_: str) -> StepState:
        path = self._record_path(step.name)
        if not path.is_file():
            begun = self._begun_path(step.name).is_file()
            return StepState("incomplete", "continues" if step.resumes else "was interrupted") if begun else NEW
        record = read_json(path)
        if record["fingerprint"] != print_:
            return StepState("changed", _what_changed(step, record))
        folder = self.folder(step.name)
        for file, size in record["files"].items():
            there = folder / file
            if not there.is_file() or there.stat().st_size != size:
                return StepState("changed", f"{file} is missing or has another size")
        return StepState("finished", "")

    def _fingerprints(self, steps: Sequence[Step]) -> dict[str, str]:
        prints: dict[str, str] = {}
        for step in steps:
            if step.name in prints:
                raise ConfigError(f"two steps are called {step.name!r}")
            for other in prints:
                if step.name.startswith(other + "/") or other.startswith(step.name + "/"):
                    raise ConfigError(f"the folder of step {step.name!r} and that of {other!r} lie in each other")
            missing = [name for name in step.needs if name not in prints]
            if missing:
                raise ConfigError(f"step {step.name!r} needs {missing}, which no earlier step is called")
            needed: dict[str, Any] = {name: prints[name] for name in step.needs}
            needed |= {f"{name} as it lies": _inventory(self.folder(name)) for name in step.rescues}
            prints[step.name] = fingerprint(step, needed)
        return prints

    def _record_path(self, step: str) -> Path:
        return self.path / ".steps" / (step.replace("/", "--") + ".json")

    def _begun_path(self, step: str) -> Path:
        return self.path / ".steps" / (step.replace("/", "--") + ".begun")

    def _lock(self) -> Any:
        import filelock

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return filelock.FileLock(self.path / ".lock").acquire(timeout=0)
        except filelock.Timeout:
            raise RunError(
                f"another process is running in {self.path}", hint="wait for it, or choose another folder with --out"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from error


NEW = StepState("new", "")


def follows() -> bool:
    """Whether this process is a rank other than the first.

    >>> follows()
    False
    """
    return int(os.environ.get("RANK", 0)) > 0


@contextmanager
def _alone() -> Iterator[None]:
    """Without what torchrun says of other ranks, for a step that the first does by itself: it would wait for them."""
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    hidden = {name: os.environ.pop(name) for name in launch if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"hubsae": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "trl", "datasets", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _inventory(folder: Path) -> dict[str, int]:
    """Every file below `folder` with its size."""
    files: Iterable[Path] = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _what_changed(step: Step, record: dict[str, Any]) -> str:
    new, old = step.plain_settings(), record["settings"]
    if new != old:
        if isinstance(new, dict) and isinstance(old, dict):
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            return f"changed: {', '.join(keys)}"
        return "its settings changed"
    return "a step before it changed" if step.needs else "its version changed"


def _joined(hint: str | None, more: str) -> str:
    return f"{hint}\n  -> {more}" if hint else more
