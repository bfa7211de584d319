"""The same jobs on real engines, started here: Slurm (Debian's slurm-wlm, as root) and Ray, with one task killed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the engine of tasks, pip install 'hubsae[scale]'")
from worlds import DyingHarvest, DyingIndex, contents, harvest_job, index_job

from hubsae.core.errors import HubSAEError
from hubsae.scale import TaskError, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

SLURM = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000
PartitionName=tests Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, object]]:
    """A cluster of one node, as long as these tests run."""
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]:
        pytest.skip(f"no {missing[0]} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts tasks as other users, which takes root")
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # the path of a socket is short
    (root / "state").mkdir()
    (root / "spool").mkdir()
    conf, key = root / "slurm.conf", root / "munge.key"
    conf.write_text(SLURM.format(host=socket.gethostname().split(".")[0], root=root, ports=free_ports(2)))
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={root}/munge.socket"]
    munged += [f"--{name}-file={root}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons = []
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    try:
        for command in (munged, ["slurmctld", "-D", "-f", conf], ["slurmd", "-D", "-f", conf]):
            with open(root / "daemons.log", "ab") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(1)
        for _ in range(120):
            state = subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout.strip()
            if state == "idle":
                break
            time.sleep(0.5)
        else:
            logs = [p.read_text(errors="replace")[-2000:] for p in sorted(root.glob("*.log"))]
            pytest.fail("\n".join([f"the node is {state!r}", *logs]))
        yield {"partition": "tests", "time": "1:00:00", "mem_per_cpu_gb": 1}
    finally:
        subprocess.run(["scancel", "-u", "root"], capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(root, ignore_errors=True)
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)


@pytest.fixture
def ray(_parts: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A cluster on this machine."""
    ray = pytest.importorskip("ray", reason="pip install ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else on a busy machine it takes all day
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield {"mem_per_cpu_gb": 0.1}
    ray.shutdown()


@pytest.mark.parametrize(("job", "kind"), [(harvest_job, DyingHarvest), (index_job, DyingIndex)])
@pytest.mark.parametrize("executor", ["slurm", "ray"])
def test_four_tasks_one_of_them_killed_leave_the_bytes_of_one_process(
    world, tmp_path, request, executor, job, kind
) -> None:
    settings = request.getfixturevalue(executor)
    run(job(world, tmp_path / "one"), tasks=1)
    dying = job(world, tmp_path / "out", kind)
    with pytest.raises(TaskError, match=r"1 of 4 tasks failed:\n  task 1 .*task_00001\.log"):
        run(dying, executor=executor, tasks=4, workers=2, settings=settings)
    done = {path: path.stat().st_mtime_ns for path in (dying.folder / "completions").iterdir()}
    assert sorted(path.name for path in done) == ["00000", "00002", "00003"]
    run(dying, executor=executor, tasks=4, workers=2, settings=settings)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    for tasks in (1, 7):
        (tmp_path / f"{tasks}").mkdir()
        (tmp_path / f"{tasks}" / ".died").touch()  # none is killed any more
        run(job(world, tmp_path / f"{tasks}", kind), executor=executor, tasks=tasks, settings=settings)
        assert contents(tmp_path / f"{tasks}") == contents(tmp_path / "one")


def test_a_job_that_is_still_in_the_queue_is_not_cut_otherwise(world, tmp_path, slurm):
    held = subprocess.run(
        ["sbatch", "--hold", "--parsable", "--wrap", "true"], capture_output=True, text=True, check=True
    )
    number = held.stdout.strip()
    job = index_job(world, tmp_path)
    job.folder.mkdir(parents=True)
    (job.folder / "job.json").write_text(json.dumps({"job": job.record(), "tasks": 4}))
    (job.folder / "slurm_job").write_text(number)
    with pytest.raises(HubSAEError, match=f"Slurm job {number} still runs this in 4 tasks, not 7"):
        run(job, executor="slurm", tasks=7, settings=slurm)
    subprocess.run(["scancel", number], check=True)
