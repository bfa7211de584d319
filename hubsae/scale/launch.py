"""Run a job in tasks: datatrove starts them, logs them and marks those that are done; one last step merges.

    OUT/.tasks/VERB/job.json             the job and its number of tasks; another job is refused
    OUT/.tasks/VERB/logs/task_00003.log  what task 3 said
    OUT/.tasks/VERB/completions/00003    it is done, and will not be run again

Running the same job again does what is not done: tasks that failed or were killed, of these the parts that are missing.
"""

from __future__ import annotations

import inspect
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from hubsae.activations.ranks import Ranks
from hubsae.core.errors import ConfigError, HubSAEError, nearest
from hubsae.core.extras import require
from hubsae.core.files import read_json, write_json_atomic
from hubsae.core.progress import progress, say
from hubsae.core.text import printable
from hubsae.scale.child import how_it_ended, in_child
from hubsae.scale.jobs import Job
from hubsae.version import __version__

EXECUTORS = ("local", "slurm", "ray", "jobs")
POLL = 2.0
"""Seconds between two looks at a queue."""
SLURM_JOB = "slurm_job"
MOUNT = "/data"
"""Where a job on Hugging Face finds its bucket."""
JOB_DEFAULTS = {"image": "ghcr.io/astral-sh/uv:python3.11-bookworm", "flavor": "cpu-basic", "timeout": "12h"}
OURS = ("bucket", "package", "secrets")
JOB_SETTINGS = (
    *JOB_DEFAULTS, *OURS, "namespace", "tasks_per_job", "token", "max_retries", "poll_interval", "job_name",
    "randomize_start_duration",
)  # fmt: skip
"""What a job on Hugging Face is told of, or its waiting side; the others of datatrove's would have no effect."""


class TaskError(HubSAEError):
    """Tasks failed; the message names them with their logs."""


def run(
    job: Job,
    *,
    executor: str = "local",
    tasks: int = 1,
    workers: int | None = None,
    settings: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> Any:
    """Run a job in `tasks` tasks, at most `workers` at a time, and merge; returns what `job.here()` would.

    - `local`: one worker (the default) runs the tasks one after another in this process, more in processes.
    - `slurm`: an array job; this process waits for it, and when it is called again finds it in the queue.
    - `ray`: the cluster that RAY_ADDRESS names, else one on this machine.
    - `jobs`: Hugging Face Jobs, whose bucket (setting `bucket`) is mounted at /data: paths of the job lie there.

    `settings` are those of datatrove's executor: `partition`, `time`, `gpus_per_task`, `mem_per_cpu_gb`, `flavor` ...
    Any number of tasks gives the same bytes, and the same call again does what an earlier one left undone. `dry_run`
    returns what would be submitted to Hugging Face.

    >>> from hubsae.scale.jobs import Convert
    >>> job = Convert(path="piles", out="/data/acts")
    >>> run(job, executor="jobs", tasks=2, settings={"bucket": "me/shelf"}, dry_run=True)[1]["env"]
    {'DATATROVE_JOB_ARRAY_INDEX': '1'}
    """
    if executor not in EXECUTORS:
        raise ConfigError(f"there is no executor {executor!r}", hint=f"one of {', '.join(EXECUTORS)}")
    if tasks < 1 or (workers is not None and workers < 1):
        raise ConfigError(f"{tasks} tasks and {workers} workers: both are at least 1")
    given = dict(settings or {})
    if executor == "jobs":
        return _on_hugging_face(job, tasks, workers, given, dry_run)
    require("datatrove", extra="scale")
    ended = {"local": _local, "slurm": _slurm, "ray": _ray}[executor](job, tasks, workers, given)
    if failed := [rank for rank in range(tasks) if not (job.folder / "completions" / f"{rank:05d}").is_file()]:
        lines = [f"task {rank} {ended.get(rank, 'is not done')}: {_log(job.folder, rank)}" for rank in failed]
        raise TaskError(
            f"{len(failed)} of {tasks} tasks failed:\n  " + "\n  ".join(lines[:20]),
            hint="the others are kept: the same command runs these alone",
        )
    result = job.merge()
    (job.folder / "merged").touch()
    return result


class Task:
    """The one step of a pipeline: what a rank does, in this process or in one that may die alone."""

    def __init__(self, job: Job, isolated: bool = False):
        self.job, self.isolated = job, isolated

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do the parts of a rank."""
        call = partial(self.job.task, Ranks(rank, world_size))
        if not self.isolated:
            call()
            return
        done = in_child(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise TaskError(f"{how_it_ended(done.returncode)}: {done.stdout.decode(errors='replace')[-4000:]}")

    def __repr__(self) -> str:
        return f"hubsae {self.job.verb}"


class Merge(Task):
    """The last step as a task of its own, where no one waits on this side."""

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        self.job.merge()


def _begin(job: Job, tasks: int, executor: str) -> None:
    """Enter the job; what another one, or one cut otherwise, left there must not be taken for this one's."""
    folder, record = job.folder, job.record()
    if (folder / "merged").is_file():
        shutil.rmtree(folder)  # that one is finished
    if (folder / "job.json").is_file():
        before = read_json(folder / "job.json")
        keys = sorted({*record, *before["job"]})
        if wrong := [key for key in keys if record.get(key) != before["job"].get(key)]:
            first = wrong[0]
            raise HubSAEError(
                f"{folder} holds the tasks of another job, which is not finished: "
                f"{first} is {before['job'].get(first)!r} there and {record.get(first)!r} here",
                hint="write elsewhere, or remove that folder to give that job up",
            )
        there, submitted = before["tasks"], folder / SLURM_JOB
        other = (there, "slurm") != (tasks, executor)
        if other and submitted.is_file() and _queued(number := submitted.read_text()):
            raise HubSAEError(
                f"Slurm job {number} still runs this in {there} tasks{'' if there == tasks else f', not {tasks}'}",
                hint=f"--executor slurm --tasks {there} waits for it, scancel {number} ends it",
            )
        if there != tasks:  # parts that are done are found all the same
            shutil.rmtree(folder / "completions", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "job.json", {"job": record, "tasks": tasks})


def _log(folder: Path, rank: int) -> str:
    """The log of a task, with its last line."""
    path = next((p for p in sorted((folder / "logs").glob(f"task_{rank:05d}.*")) if p.stat().st_size), None)
    path = path or _slurm_log(folder, rank) or folder / "logs"
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"{path}{f' ({printable(last.strip(), 160)})' if last else ''}"


def _slurm_log(folder: Path, rank: int) -> Path | None:
    """What Slurm itself kept of the job of the array that a task was in."""
    try:
        how, ranks = read_json(folder / "executor.json"), read_json(folder / "ranks_to_run.json")
        index = ranks.index(rank) // how["tasks_per_job"]
        path = Path(how["slurm_logs_folder"]) / f"{(folder / SLURM_JOB).read_text()}_{index}.out"
    except (OSError, HubSAEError, KeyError, ValueError):
        return None
    arrays = how["max_array_size"]  # of several arrays only the last one's number is known
    alone = arrays == -1 or len(ranks) <= arrays * how["tasks_per_job"]
    return path if alone and path.is_file() else None


def _known(name: str, settings: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in settings:
        if key not in known:
            hint = f"nearest: {nearest(key, known)}; all: {', '.join(known)}"
            raise ConfigError(f"{name} has no setting {key!r}", hint=hint)


def _executor(name: str, step: Task, settings: Mapping[str, Any], **options: Any) -> Any:
    """An executor of datatrove with the settings that it knows."""
    kind = getattr(require("datatrove.executor", extra="scale"), name)
    known = [key for key in inspect.signature(kind).parameters if key not in ("pipeline", *options)]
    _known(name, settings, known)
    return kind([step], **options, **settings)


# ---- engines: each returns how tasks ended, as far as it knows ---------------------------------------------------


def _local(job: Job, tasks: int, workers: int | None, settings: dict[str, Any]) -> dict[int, str]:
    executor = _executor(
        "LocalPipelineExecutor", Task(job), settings, tasks=tasks, workers=workers or 1, logging_dir=str(job.folder)
    )
    _begin(job, tasks, "local")
    todo, ended = executor.get_incomplete_ranks(), {}
    logs = job.folder / "logs"
    logs.mkdir(exist_ok=True)
    several = (workers or 1) > 1

    def one(rank: int) -> None:
        # what every executor of datatrove calls for each rank; others than the first print errors only
        call = partial(executor._run_for_rank, rank, local_rank=1)
        if several:
            with open(logs / f"task_{rank:05d}.out", "wb") as output:
                code = in_child(call, stdout=output, stderr=output).returncode
            ended.update({rank: how_it_ended(code)} if code else {})
            return
        try:
            call()
        except Exception as error:
            ended[rank] = f"stopped ({error.message if isinstance(error, HubSAEError) else error})"

    # datatrove's own pool waits for ever for a worker that was killed
    with progress(f"{job.verb} tasks", tasks) as shown, ThreadPoolExecutor(workers or 1) as pool:
        shown.resumed(tasks - len(todo))
        for _ in pool.map(one, todo) if several else map(one, todo):
            shown.advance()
    return ended


def _slurm(job: Job, tasks: int, workers: int | None, settings: dict[str, Any]) -> dict[int, str]:
    if not shutil.which("sbatch"):
        raise HubSAEError("there is no Slurm here: no sbatch", hint="run this on a login node of the cluster")
    if "partition" not in settings:
        raise ConfigError("slurm needs a partition", hint="--executor-set partition=NAME; sinfo lists them")
    path = f"export PATH={Path(sys.executable).parent}:$PATH"
    defaults = {"time": "24:00:00", "qos": "", "job_name": f"hubsae-{job.verb}", "env_command": path}
    logs = str(job.folder)
    executor = _executor(
        "SlurmPipelineExecutor",
        Task(job),
        {**defaults, **settings},
        tasks=tasks,
        workers=workers or -1,
        logging_dir=logs,
    )
    _begin(job, tasks, "slurm")
    executor.launch_merge_stats = _nothing  # its job would wait for ever for a task that failed
    submitted = job.folder / SLURM_JOB
    if not (submitted.is_file() and _queued(submitted.read_text())):
        executor.run()
        submitted.write_text(str(executor.job_id))
    number = submitted.read_text()
    try:
        with progress(f"{job.verb} tasks", tasks) as shown:
            while _queued(number):
                shown.update(tasks - len(executor.get_incomplete_ranks()))
                time.sleep(POLL)
    except KeyboardInterrupt:
        say(f"the tasks go on as Slurm job {number}; the same command waits for them again, scancel {number} ends them")
        raise
    return {}


def _nothing() -> None:
    """Takes the place of what must not be done."""


def _queued(job_id: str) -> bool:
    """Whether Slurm has a job that is waiting or running; a controller that is too busy to say has."""
    if job_id == "-1" or not shutil.which("squeue"):  # there was nothing to submit, or there is no one to ask
        return False
    found = subprocess.run(["squeue", "-h", "-j", job_id], capture_output=True, text=True)
    return bool(found.stdout.strip()) if found.returncode == 0 else "Invalid job id" not in found.stderr


def _ray(job: Job, tasks: int, workers: int | None, settings: dict[str, Any]) -> dict[int, str]:
    ray = require("ray", extra="ray")
    step, logs = Task(job, isolated=True), str(job.folder)
    executor = _executor("RayPipelineExecutor", step, settings, tasks=tasks, workers=workers or -1, logging_dir=logs)
    _begin(job, tasks, "ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    executor.run()
    return {}


def _on_hugging_face(
    job: Job, tasks: int, workers: int | None, settings: dict[str, Any], dry_run: bool
) -> list[dict[str, Any]] | str:
    """Tasks and last step as jobs on Hugging Face; the result stays in the bucket, and where is returned."""
    bucket, inside = settings.pop("bucket", None), PurePosixPath(job.folder.as_posix())
    if bucket is None or not inside.is_relative_to(MOUNT):
        raise ConfigError(
            f"jobs on Hugging Face share a bucket, mounted at {MOUNT}; {job.home} is not in it",
            hint=f"--executor-set bucket=OWNER/NAME, and --out {MOUNT}/NAME",
        )
    _known("jobs", settings, JOB_SETTINGS)
    each = settings.get("tasks_per_job", 1)
    if not isinstance(each, int) or each < 1:
        raise ConfigError(f"{each!r} tasks per job: at least 1")
    asked = {**JOB_DEFAULTS, "package": f"hubsae[train,scale]=={__version__}", "bucket": bucket, **settings}
    # markers of another job, or of one cut otherwise, are not this one's
    folder = f"hf://buckets/{bucket}/{inside.relative_to(MOUNT)}/{job.key(tasks=tasks)}"
    if dry_run:
        submitted = range(math.ceil(tasks / each))
        return [_submission(job.verb, asked, index, f"{folder}/executor.pik") for index in submitted]
    known = {key: value for key, value in settings.items() if key not in OURS}

    def made(step: Task, where: str, tasks: int, **options: Any) -> Any:
        options |= {"tasks": tasks, "workers": workers or -1, "logging_dir": where}
        executor = _executor("JobsPipelineExecutor", step, {**JOB_DEFAULTS, **known}, **options)
        executor._submit_array_index = partial(_submit, job.verb, asked)  # datatrove's own mounts no bucket
        return executor

    first = made(Task(job), folder, tasks)
    last = made(Merge(job), f"{folder}/merge", 1, depends=first)
    try:
        last.run()
    except RuntimeError as error:  # tasks that failed for good
        raise TaskError(
            f"{error}", hint=f"their logs are in {folder}/logs; the same command runs these alone"
        ) from error
    last.logging_dir.fs.invalidate_cache()
    if last.get_incomplete_ranks(skip_completed=True):
        raise TaskError(
            f"the last step failed: {folder}/merge/logs/task_00000.log",
            hint="the tasks are done; the same command runs the last step alone",
        )
    return f"hf://buckets/{bucket}/{PurePosixPath(job.home.as_posix()).relative_to(MOUNT)}"


def _submission(verb: str, asked: Mapping[str, Any], index: int, pickled: str) -> dict[str, Any]:
    """One job for Hugging Face; secrets by name."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"  # a pickle is of one version
    command = ["uv", "run", "--python", python, "--with", asked["package"], "launch_pickled_pipeline", pickled]
    return {
        "command": command,
        **{name: asked[name] for name in (*JOB_DEFAULTS, "namespace") if name in asked},
        "env": {"DATATROVE_JOB_ARRAY_INDEX": str(index)},
        "secrets": ["HF_TOKEN", *(name for name in str(asked.get("secrets", "")).split(",") if name)],
        "labels": {"hubsae": verb, "task": str(index)},
        "volumes": [{"type": "bucket", "source": asked["bucket"], "mount_path": MOUNT}],
    }


def _submit(verb: str, asked: Mapping[str, Any], index: int, pickled: str, token: str) -> str:
    from hubsae.hub.jobs import submit

    return submit(_submission(verb, asked, index, pickled), token=token)
