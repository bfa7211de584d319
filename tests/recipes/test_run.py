"""The run folder: skips what is unchanged, continues after a kill, says why it repeats, refuses what cannot work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hubsae.core.errors import ConfigError, HubSAEError
from hubsae.recipes.run import RunError, RunFolder
from hubsae.recipes.steps import Step


def writing(name: str, text: str, calls: list[str], needs: tuple[str, ...] = ()) -> Step:
    def run(ctx):
        calls.append(name)
        assert not list(ctx.folder.iterdir()), "a step that does not resume starts with an empty folder"
        before = "".join((ctx.path(n) / "out.txt").read_text() for n in needs)
        (ctx.folder / "out.txt").write_text(before + text)
        return {"length": len(before + text)}

    return Step(name, run, settings={"text": text}, needs=needs)


def chain(calls: list[str], a: str = "a", b: str = "b", c: str = "c") -> list[Step]:
    return [
        writing("first", a, calls),
        writing("part/second", b, calls, ("first",)),
        writing("other", c, calls),
    ]


def test_finished_steps_are_skipped_and_their_results_stay(tmp_path: Path):
    calls: list[str] = []
    run = RunFolder(tmp_path / "run")
    first = run.execute(chain(calls))
    again = run.execute(chain(calls))
    assert calls == ["first", "part/second", "other"]
    assert [o.result for o in again] == [o.result for o in first] == [{"length": 1}, {"length": 2}, {"length": 1}]
    assert run.result("part/second") == {"length": 2}


def test_a_change_repeats_the_step_and_what_follows_from_it_and_nothing_else(tmp_path: Path):
    calls: list[str] = []
    run = RunFolder(tmp_path)
    run.execute(chain(calls))
    calls.clear()
    changed = chain(calls, a="A")
    states = run.states(changed)
    assert states["first"].why == "changed: text"
    assert states["part/second"].why == "a step before it changed"
    assert states["other"].state == "finished"
    run.execute(changed)
    assert calls == ["first", "part/second"]
    assert (tmp_path / "part/second/out.txt").read_text() == "Ab"


def test_a_lost_or_shortened_file_repeats_its_step(tmp_path: Path):
    calls: list[str] = []
    run = RunFolder(tmp_path)
    run.execute(chain(calls))
    calls.clear()
    (tmp_path / "other/out.txt").write_text("")
    assert "out.txt" in run.states(chain(calls))["other"].why
    run.execute(chain(calls))
    assert calls == ["other"]


def test_a_step_must_name_what_it_reads(tmp_path: Path):
    def run(ctx):
        return ctx.result("a")

    steps = [Step("a", lambda ctx: 1), Step("b", run)]
    with pytest.raises(KeyError, match="without naming it"):
        RunFolder(tmp_path).execute(steps)


def test_steps_that_cannot_work_together_are_refused(tmp_path: Path):
    nothing = lambda ctx: None  # noqa: E731
    for steps, text in (
        ([Step("a", nothing), Step("a", nothing)], "two steps"),
        ([Step("a", nothing), Step("a/b", nothing)], "lie in each other"),
        ([Step("a", nothing, needs=("b",)), Step("b", nothing)], "no earlier step"),
    ):
        with pytest.raises(ConfigError, match=text):
            RunFolder(tmp_path).execute(steps)


def test_an_error_says_which_step_and_that_the_run_continues(tmp_path: Path):
    def fail(ctx):
        raise HubSAEError("the data is odd", hint="look at it")

    calls: list[str] = []
    steps = [*chain(calls), Step("last", fail, needs=("other",))]
    with pytest.raises(HubSAEError, match=r"(?s)the data is odd.*look at it.*step 'last'.*continues"):
        RunFolder(tmp_path).execute(steps)
    calls.clear()
    RunFolder(tmp_path).execute([*chain(calls), Step("last", lambda ctx: 1, needs=("other",))])
    assert calls == []


def test_a_resuming_step_keeps_its_folder_after_a_kill_but_not_after_a_change(tmp_path: Path):
    seen: list[list[str]] = []

    def run(ctx):
        seen.append(sorted(path.name for path in ctx.folder.iterdir()))
        (ctx.folder / f"part{len(seen)}").write_text("x")
        if len(seen) < 3:
            raise KeyboardInterrupt

    for settings in (1, 1, 2):
        try:
            RunFolder(tmp_path).execute([Step("s", run, settings=settings, resumes=True)])
        except KeyboardInterrupt:
            pass
    assert seen == [[], ["part1"], []]


def test_another_recipe_may_not_use_the_folder(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.describe("rl_chain", "tiny", {"seed": 0})
    run.describe("rl_chain", "full", {"seed": 1})
    with pytest.raises(RunError, match="rl_chain"):
        run.describe("grid_search", "tiny", {})


def test_a_folder_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path: Path):
    (tmp_path / "file").write_text("")
    run = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(RunError, match="--out"):
        run.describe("rl_chain", "tiny", {})
    with pytest.raises(RunError, match="--out"):
        run.execute([Step("a", lambda ctx: None)])


KILLED = """
import os, signal, sys
from pathlib import Path
from hubsae.recipes.run import RunFolder
from hubsae.recipes.steps import Step

def step(name, needs):
    def run(ctx):
        with open(sys.argv[1] + ".calls", "a") as log:
            log.write(name + "\\n")
        (ctx.folder / "half").write_text("half")
        if name == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        (ctx.folder / "half").unlink()
        (ctx.folder / "whole").write_text(name)
        return name
    return Step(name, run, needs=needs)

names = ["a", "b", "c"]
RunFolder(sys.argv[1]).execute([step(n, tuple(names[:i])) for i, n in enumerate(names)])
"""


@pytest.mark.parametrize("at", ["a", "b", "c"])
def test_killed_in_a_step_it_continues_there_without_repeating_finished_ones(tmp_path: Path, at: str):
    run = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run), at], check=False)
    assert killed.returncode == -signal.SIGKILL
    subprocess.run([sys.executable, "-c", KILLED, str(run), "none"], check=True)
    calls = (tmp_path / "run.calls").read_text().split()
    assert sorted(calls) == sorted(["a", "b", "c", at])
    assert not list(run.glob("*/half")) and len(list(run.glob("*/whole"))) == 3


def test_two_processes_may_not_run_in_one_folder(tmp_path: Path):
    inner = (
        "import sys; from hubsae.recipes.run import RunFolder; from hubsae.recipes.steps import Step\n"
        "RunFolder(sys.argv[1]).execute([Step('a', lambda ctx: None)])"
    )

    def rival(ctx):
        done = subprocess.run(
            [sys.executable, "-c", inner, str(ctx.run_folder)], capture_output=True, text=True, env=dict(os.environ)
        )
        assert done.returncode == 1
        return "another process is running" in done.stderr

    assert RunFolder(tmp_path).execute([Step("outer", rival)])[0].result is True


def test_a_rescue_reads_an_unfinished_step_and_runs_again_when_that_has_gone_on(tmp_path: Path):
    seen: list[str] = []

    def halted(ctx):
        (ctx.folder / "state").write_text("1")
        raise HubSAEError("the machine was taken away")

    def rescue(ctx):
        seen.append((ctx.path("train") / "state").read_text())
        (ctx.folder / "saved").write_text(seen[-1])

    train, saved = Step("train", halted, resumes=True), Step("saved", rescue, rescues=("train",))
    run = RunFolder(tmp_path)
    with pytest.raises(HubSAEError):
        run.execute([train])
    run.execute([saved])
    run.execute([saved])
    assert seen == ["1"]
    assert run.states([train])["train"].state == "incomplete", "training may still go on"
    (tmp_path / "train/state").write_text("12")
    run.execute([saved])
    assert seen == ["1", "12"]


def test_only_a_step_that_spreads_sees_the_other_ranks_of_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)

    def seen(ctx):
        return {name: os.environ[name] for name in launch if name in os.environ}

    alone, spread = RunFolder(tmp_path).execute([Step("alone", seen), Step("spread", seen, spreads=True)])
    assert (alone.result, spread.result) == ({}, launch)
    assert {name: os.environ[name] for name in launch} == launch
