"""Jobs cut into tasks on one machine: the same bytes for every number of tasks, also where a task was killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("datatrove", reason="the engine of tasks, pip install 'hubsae[scale]'")
import worlds
from worlds import INDEX, D, DyingHarvest, DyingIndex, contents, harvest_job, index_job

from hubsae.activations import ActivationDataset
from hubsae.activations.ranks import Ranks
from hubsae.core.errors import ConfigError, DataError, HubSAEError, MissingExtraError
from hubsae.scale import Convert, Evaluate, Harvest, Index, TaskError, run

TASKS = (1, 4, 7)


def test_a_harvest_is_the_same_bytes_for_every_number_of_tasks(world, tmp_path):
    for tasks in TASKS:
        made = run(harvest_job(world, tmp_path / f"{tasks}"), tasks=tasks)
        assert list(made) == ["layers.0", "layers.1"] and len(made.open("layers.1").sources) == 15
        assert contents(tmp_path / f"{tasks}") == contents(tmp_path / "1")
    harvest_job(world, tmp_path / "here").here()
    for split in ("train", "validation"):
        here, one = (ActivationDataset.open(tmp_path / name, "layers.1", split) for name in ("here", "1"))
        assert torch.equal(here.read_all(), one.read_all())


def test_an_index_is_the_same_bytes_for_every_number_of_tasks_and_in_one_process(world, tmp_path):
    index_job(world, tmp_path / "here").here()
    for tasks in TASKS:
        folders = run(index_job(world, tmp_path / f"{tasks}"), tasks=tasks)
        assert [folder.name for folder in folders] == ["k2--layer1", "k4--layer1"]
        assert contents(tmp_path / f"{tasks}") == contents(tmp_path / "here")


def test_an_index_of_texts_is_the_same_bytes_in_tasks(world, tmp_path, monkeypatch):
    from hubsae.index import build

    monkeypatch.setattr(build, "PART_TEXTS", 16)
    job = {
        "release": world["release"],
        "texts": world["texts"],
        "model": world["model"],
        "settings": INDEX,
        "force": True,
    }
    Index(**job, out=str(tmp_path / "here")).here()
    run(Index(**job, out=str(tmp_path / "tasks")), tasks=3)
    assert contents(tmp_path / "tasks") == contents(tmp_path / "here")


def test_an_evaluation_is_the_same_numbers_in_tasks_as_in_one_process(world, tmp_path):
    job = {"release": world["release"], "activations": world["activations"], "config": "layers.1", "force": True}
    here = Evaluate(**job, out=str(tmp_path / "here")).here()
    for tasks in (1, 4):
        assert run(Evaluate(**job, out=str(tmp_path / f"{tasks}")), tasks=tasks) == here
        assert contents(tmp_path / f"{tasks}") == contents(tmp_path / "here")


def test_a_conversion_is_the_same_bytes_in_tasks_and_needs_a_scale_that_no_task_can_choose(world, tmp_path):
    pile = tmp_path / "layer3_train.pt"
    torch.save(torch.randn(5000, D, generator=torch.Generator().manual_seed(0)), pile)
    options = {"shard_bytes": 80_000}
    Convert(path=str(pile), out=str(tmp_path / "here"), options=options).here()
    for tasks in (1, 4):
        run(Convert(path=str(pile), out=str(tmp_path / f"{tasks}"), options=options), tasks=tasks)
        assert contents(tmp_path / f"{tasks}") == contents(tmp_path / "here")
    half = Convert(path=str(pile), out=str(tmp_path / "half"), options={**options, "dtype": "float16"})
    with pytest.raises(TaskError, match="every task would have to read everything"):
        run(half, tasks=2)


@pytest.mark.parametrize(("job", "kind"), [(harvest_job, DyingHarvest), (index_job, DyingIndex)])
def test_a_task_that_failed_or_was_killed_is_named_and_done_alone_by_the_same_call(
    world, tmp_path, monkeypatch, job, kind
):
    def fail(flag):
        raise OSError("the disk is gone")

    run(job(world, tmp_path / "one"), tasks=1)
    dying = job(world, tmp_path / "out", kind)
    with (
        monkeypatch.context() as patch,
        pytest.raises(TaskError, match=r"1 of 4 tasks failed:\n  task 1 stopped") as error,
    ):
        patch.setattr(worlds, "die_once", fail)
        run(dying, tasks=4)
    assert "(the disk is gone): " in str(error.value) and "the same command runs these alone" in str(error.value)
    done = {path: path.stat().st_mtime_ns for path in (dying.folder / "completions").iterdir()}
    assert sorted(path.name for path in done) == ["00000", "00002", "00003"]
    with pytest.raises(TaskError, match=r"task 1 killed by signal 9: .*task_00001"):
        run(dying, tasks=4, workers=2)
    run(dying, tasks=4)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_parts_that_are_done_stay_when_the_number_of_tasks_changes(world, tmp_path, monkeypatch):
    from hubsae.activations.stream import Stream

    run(harvest_job(world, tmp_path / "one"), tasks=1)
    forward = Stream._forward

    def failing(stream, batch):
        if batch[0].id >= 48:
            raise OSError("the disk is gone")
        return forward(stream, batch)

    monkeypatch.setattr(Stream, "_forward", failing)
    job = harvest_job(world, tmp_path / "out")
    with pytest.raises(TaskError, match=r"3 of 3 tasks failed:\n  task 0 stopped .the disk is gone"):
        run(job, tasks=3)
    monkeypatch.undo()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / ".harvest").rglob("[0-9]*.json")}
    run(job, tasks=2)
    assert len(before) == 12 and all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_failed_task_is_named_with_what_it_said_and_the_others_are_done(world, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "Ann has 12" if n != 5 else None}) + "\n" for n in range(16)))
    job = Harvest(
        model=world["model"], dataset=str(texts), layers=[1], out=str(tmp_path / "out"),
        options={"window": 4, "strict": True},
    )  # fmt: skip
    with pytest.raises(TaskError, match=r"1 of 4 tasks failed:\n  task 1 stopped .*task_00001\.log"):
        run(job, tasks=4)
    assert len(list((job.folder / "completions").iterdir())) == 3


def test_a_finished_job_may_be_run_again_and_a_folder_of_an_unfinished_one_is_not_taken_for_another(world, tmp_path):
    job = index_job(world, tmp_path)
    run(job, tasks=2)
    first = contents(tmp_path)
    run(job, tasks=2)
    assert contents(tmp_path) == first
    run(index_job(world, tmp_path, top=2), tasks=2)  # the other one is finished
    assert contents(tmp_path) != first
    (job.folder / "merged").unlink()
    with pytest.raises(HubSAEError, match="tasks of another job, which is not finished: settings"):
        run(job, tasks=2)


def test_what_is_asked_wrongly_is_said(world, tmp_path, monkeypatch):
    job = harvest_job(world, tmp_path)
    for how, message in [
        ({"executor": "sge"}, "there is no executor 'sge'"),
        ({"tasks": 0}, "0 tasks and None workers"),
        ({"workers": 0}, "0 workers"),
        ({"settings": {"partitoin": "x"}}, "LocalPipelineExecutor has no setting 'partitoin'"),
        ({"executor": "jobs"}, "share a bucket, mounted at /data"),
        ({"executor": "jobs", "settings": {"bucket": "me/shelf"}}, "is not in it"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(job, **how)
    with pytest.raises(HubSAEError, match="parts of this harvest are missing"):
        job.merge()
    evaluation = Evaluate(
        release=world["release"], activations=world["activations"], config="layers.1", out=str(tmp_path), force=True
    )
    with pytest.raises(DataError, match="5 of 5 parts of this evaluation are missing"):
        evaluation.merge()
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(MissingExtraError, match="needs datatrove") as error:
        run(job)
    assert "hubsae[scale]" in str(error.value)


def test_the_verbs_take_an_executor(world, tmp_path):
    from typer.testing import CliRunner

    from hubsae.cli.main import build

    def hubsae(*arguments):
        return CliRunner().invoke(build(), [str(a) for a in arguments])

    run(harvest_job(world, tmp_path / "one", validation_fraction=0.0, batch_tokens=None), tasks=1)
    arguments = ["harvest", "-m", world["model"], "-d", world["texts"], "-l", "0,1", "--window", 4]
    done = hubsae(*arguments, "-o", tmp_path / "out", "--executor", "local", "--tasks", 3, "--executor-set", "tasks=3")
    assert isinstance(done.exception, ConfigError) and "has no setting 'tasks'" in str(done.exception)
    done = hubsae(*arguments, "-o", tmp_path / "out", "--executor", "local", "--tasks", 3)
    assert done.exit_code == 0, done.output
    for name in ("layers.0", "layers.1"):
        one, out = (ActivationDataset.open(tmp_path / folder, name) for folder in ("one", "out"))
        assert torch.equal(one.read_all(), out.read_all()) and len(out.sources) == 15
    done = hubsae(*arguments, "-o", "x", "--tasks", 3)
    assert done.exit_code == 2 and "--executor" in done.output


def test_what_would_be_submitted_to_hugging_face_is_as_recorded():
    job = Harvest(model="Qwen/Qwen3-8B", dataset="me/chats", layers=[15], out="/data/acts", options={"mode": "prompt"})
    settings = {
        "bucket": "me/shelf", "flavor": "a10g-small", "namespace": "me", "secrets": "WANDB_API_KEY",
        "package": "hubsae[train,scale]==1.0",
    }  # fmt: skip
    requests = run(job, executor="jobs", tasks=2, settings=settings, dry_run=True)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    recorded = (Path(__file__).parent / "hugging_face_jobs.json").read_text()
    assert requests == json.loads(recorded.replace("PYTHON", python).replace("/KEY/", f"/{job.key(tasks=2)}/"))


def test_on_hugging_face_markers_are_of_one_job_in_one_number_of_tasks():
    def pickled(tasks, **settings):
        job = Convert(path="piles", out="/data/acts", options=settings)
        return run(job, executor="jobs", tasks=tasks, settings={"bucket": "me/shelf"}, dry_run=True)[0]["command"][-1]

    assert pickled(2) == pickled(2)
    assert len({pickled(2), pickled(3), pickled(2, dtype="float16")}) == 3


def test_settings_of_jobs_on_hugging_face_are_looked_at_before_anything_is_submitted():
    job = Convert(path="piles", out="/data/acts")

    def dry(**settings):
        return run(job, executor="jobs", tasks=5, settings={"bucket": "me/shelf", **settings}, dry_run=True)

    assert [one["labels"]["task"] for one in dry(tasks_per_job=2)] == ["0", "1", "2"]
    for name in ("python", "dependencies", "labels", "flavour"):
        with pytest.raises(ConfigError, match=f"jobs has no setting '{name}'"):
            dry(**{name: "x"})
    with pytest.raises(ConfigError, match="0 tasks per job"):
        dry(tasks_per_job=0)


@pytest.mark.parametrize("fails", [False, True])
def test_a_last_step_that_failed_on_hugging_face_is_no_success(monkeypatch, fails):
    from datatrove.executor import JobsPipelineExecutor, base

    def launch(executor, jobs, *_):
        failed = [0] if fails and executor.tasks == 1 else []
        for rank in range(jobs) if not failed else ():
            executor.mark_rank_as_completed(rank)
            with executor.logging_dir.open(f"stats/{rank:05d}.json", "w") as file:
                file.write("[]")
        return failed

    folder = base.get_datafolder
    monkeypatch.setattr(base, "get_datafolder", lambda path: folder(path.replace("hf://", f"memory://{fails}/")))
    monkeypatch.setattr(JobsPipelineExecutor, "_launch_and_wait", launch)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    job, how = Convert(path="piles", out="/data/acts"), {"executor": "jobs", "tasks": 2, "settings": {"bucket": "me/w"}}
    if fails:
        with pytest.raises(TaskError, match=r"the last step failed: hf://.*/merge/logs/task_00000\.log"):
            run(job, **how)
    else:
        assert run(job, **how) == "hf://buckets/me/w/acts"


def test_slurm_says_what_is_wrong_before_it_enters_a_job_and_shows_the_log_of_the_task_itself(
    world, tmp_path, monkeypatch
):
    from hubsae.scale import launch

    job = index_job(world, tmp_path)
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    with pytest.raises(HubSAEError, match="no sbatch"):
        run(job, executor="slurm", settings={"partition": "x"})
    monkeypatch.setattr(launch.shutil, "which", lambda name: "/usr/bin/" + name)
    with pytest.raises(ConfigError, match="needs a partition"):
        run(job, executor="slurm")
    with pytest.raises(ConfigError, match="has no setting 'tiem'"):
        run(job, executor="slurm", settings={"partition": "x", "tiem": "1:00:00"})
    assert not job.folder.exists()

    def submit(executor):
        logs = Path(executor.slurm_logs_folder)
        logs.mkdir(parents=True)
        (logs / "70_0.out").write_text("of 0 and 1\n")
        (logs / "70_1.out").write_text("of 2 and 3\n")
        (job.folder / "ranks_to_run.json").write_text("[0, 1, 2, 3, 4]")
        executor.job_id = "70"
        executor.save_executor_as_json()

    monkeypatch.setattr("datatrove.executor.SlurmPipelineExecutor.run", submit)
    monkeypatch.setattr(launch, "_queued", lambda number: False)
    with pytest.raises(TaskError) as error:
        run(job, executor="slurm", tasks=5, settings={"partition": "x", "tasks_per_job": 2})
    lines = str(error.value).splitlines()
    assert ["of 0 and 1" in line for line in lines[1:6]] == [True, True, False, False, False]
    assert "70_1.out (of 2 and 3)" in lines[4] and lines[5].endswith(f"task 4 is not done: {job.folder / 'logs'}")

    monkeypatch.setattr(launch, "_queued", lambda number: True)
    with pytest.raises(HubSAEError, match=r"Slurm job 70 still runs this in 5 tasks\n"):
        run(job, tasks=5)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert not launch._queued("70")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_last_step_of_a_job_for_gpus_needs_none(world, tmp_path):
    from dataclasses import replace

    job = Evaluate(
        release=world["release"], activations=world["activations"], config="layers.1", out=str(tmp_path), force=True,
        device="cuda",
    )  # fmt: skip
    with pytest.raises(DataError, match="5 of 5 parts of this evaluation are missing"):
        job.merge()
    index = index_job(world, tmp_path / "index")
    index.task(Ranks())
    assert len(replace(index, device="cuda").merge()) == 2


def test_eval_in_jobs_on_hugging_face_takes_no_folder(world):
    from typer.testing import CliRunner

    from hubsae.cli.main import build

    for target in (world["release"], "/data/release"):
        arguments = ["eval", target, "-a", "/data/acts", "--out", "/data/out", "--executor", "jobs"]
        done = CliRunner().invoke(build(), arguments)
        assert isinstance(done.exception, ConfigError) and "takes a release on the Hub" in str(done.exception)
