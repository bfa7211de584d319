"""Throughput and memory of the local hub, with the stock huggingface_hub client.

    python benchmarks/localhub.py [--quick]

Throughput: 600 MB in 6 files up and down over loopback, against copying and hashing (sha256) the same files right
before; the ratio is what counts, seconds differ per machine. What is counted is the client's own call,
`upload_folder` and `snapshot_download`, timed inside its process: all it does for them (with Xet it cuts, hashes and
compresses everything before a byte leaves it) and all the server does, fsync included; the copy has no fsync. The
second ratio is for the whole process, with the start of Python and the import of huggingface_hub.
Files are made once per mode; each round has a new hub and new caches, so nothing is known to either side. The copy is
repeated until it gets no faster, and the last one counts: a virtual machine that handed free memory back to its host
pays for it at the first writes.

Memory: ten clients push 100 MB each at the same time and then load each other's; the server's peak resident memory,
above what it had after start.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# each prints the seconds of its call
UP = """
import sys, time
from huggingface_hub import HfApi
api, start = HfApi(), time.perf_counter()
api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
print(time.perf_counter() - start)
"""
DOWN = """
import sys, time
from huggingface_hub import snapshot_download
start = time.perf_counter()
snapshot_download(sys.argv[1], cache_dir=sys.argv[2])
print(time.perf_counter() - start)
"""
CREATE = "import sys\nfrom huggingface_hub import create_repo\ncreate_repo(sys.argv[1])"
MB = 1_000_000


@contextmanager
def serving(folder: Path, *args: str) -> Iterator[tuple[int, dict[str, str]]]:
    """`hubsae hub serve` in a process of its own: its pid and the environment for clients."""
    command = [sys.executable, "-m", "hubsae.cli.main", "hub", "serve", "--root", str(folder), "--port", "0", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        words: dict[str, str] = {}
        for line in process.stderr:
            if "HF_ENDPOINT=" in line:
                words = dict(word.split("=", 1) for word in line.split() if "=" in word)
                break
        env = {**os.environ, **words, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if "--no-xet" in args:
            env["HF_HUB_DISABLE_XET"] = "1"
        yield process.pid, env
    finally:
        process.terminate()
        process.wait(20)


def client(code: str, env: dict[str, str], home: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *args]
    return subprocess.Popen(command, env={**env, "HF_HOME": str(home)}, stdout=subprocess.PIPE, text=True)


def timed(process: subprocess.Popen, start: float) -> tuple[float, float]:
    """Seconds of the client's call, and of its process since `start`."""
    text, _ = process.communicate()
    assert process.returncode == 0
    return float(text.split()[-1]), time.perf_counter() - start


def make_files(folder: Path, count: int, size: int) -> None:
    """Half random bytes (weights), half repetitive (tables), as releases are."""
    folder.mkdir(parents=True)
    for i in range(count):
        data = os.urandom(size) if i % 2 == 0 else (b"%d," % i + os.urandom(50_000)) * (size // 50_000)
        (folder / f"file{i}.safetensors").write_bytes(data[:size])


def copy_and_hash(source: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in sorted(target.iterdir()):
        with open(path, "rb") as handle:
            hashlib.file_digest(handle, "sha256")
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def settled(source: Path, target: Path) -> float:
    """Seconds of copying and hashing once repeating it makes it no faster."""
    last = copy_and_hash(source, target)
    for _ in range(6):
        before, last = last, copy_and_hash(source, target)
        if last > 0.95 * before:
            break
    return last


def throughput(work: Path, mode: str, size: int, rounds: int) -> None:
    args = [] if mode == "xet" else ["--no-xet"]
    seconds: dict[str, list[float]] = {"copy and hash": [], "up": [], "down": []}
    calls: dict[str, list[float]] = {"up": [], "down": []}
    processes: dict[str, list[float]] = {"up": [], "down": []}
    files = work / "files"
    make_files(files, 6, size // 6)
    for _ in range(rounds):
        with serving(work / "hub", *args) as (_, env):
            assert client(CREATE, env, work / "home", "local/x").wait() == 0
            for name, code, folder in (("up", UP, files), ("down", DOWN, work / "cache")):
                os.sync()
                base = settled(files, work / "copy")
                start = time.perf_counter()
                call, process = timed(client(code, env, work / "home", "local/x", str(folder)), start)
                seconds["copy and hash"].append(base)
                seconds[name].append(call)
                calls[name].append(call / base)
                processes[name].append(process / base)
        found = next((work / "cache").glob("models--local--x/snapshots/*/file1.safetensors"))
        assert found.read_bytes() == (files / "file1.safetensors").read_bytes()
        for folder in (work / "hub", work / "cache", work / "home"):
            shutil.rmtree(folder, ignore_errors=True)  # without Xet the client makes no home
    shutil.rmtree(files)
    middle = statistics.median
    shown = ", ".join(f"{name} {middle(values):.2f} s" for name, values in seconds.items())
    print(f"{mode:4} {size // MB} MB: {shown} (load average {os.getloadavg()[0]:.1f})")
    print(
        f"     up {middle(calls['up']):.2f}x, down {middle(calls['down']):.2f}x of copying and hashing; "
        f"with the client's start {middle(processes['up']):.2f}x and {middle(processes['down']):.2f}x"
    )


def resident(pid: int, name: str) -> float:
    """VmRSS or VmHWM of a process in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1000
    raise RuntimeError(f"no {name} for process {pid}")


def memory(work: Path, mode: str, clients: int, size: int) -> float:
    args = [] if mode == "xet" else ["--no-xet"]
    for n in range(clients):
        make_files(work / f"push{n}", 2, size // 2)
    with serving(work / "hub", *args) as (pid, env):
        for n in range(clients):
            assert client(CREATE, env, work / "home", f"local/x{n}").wait() == 0
        start = resident(pid, "VmRSS")
        for code, argument in ((UP, "push"), (DOWN, "cache")):
            running = [
                client(code, env, work / f"home{n}", f"local/x{n}", str(work / f"{argument}{n}"))
                for n in range(clients)
            ]
            assert [p.wait() for p in running] == [0] * clients
        peak = resident(pid, "VmHWM")
    for folder in work.iterdir():
        shutil.rmtree(folder)
    used = f"{start:.0f} MB after start, peak {peak:.0f} MB (+{peak - start:.0f})"
    print(f"{mode:4} {clients} clients x {size // MB} MB: {used}")
    return peak - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the bytes, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", choices=("lfs", "xet"), help="one way of sending files only")
    parser.add_argument("--only", choices=("throughput", "memory"))
    args = parser.parse_args()
    size, rounds, clients = (60 * MB, 1, 3) if args.quick else (600 * MB, args.rounds, 10)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    print(json.dumps({"cpu": cpu[0] if cpu else "unknown", "cores": os.cpu_count()}))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for mode in [args.mode] if args.mode else ["lfs", "xet"]:
            if args.only != "memory":
                throughput(work, mode, size, rounds)
            if args.only != "throughput":
                memory(work, mode, clients, 100 * MB if not args.quick else 10 * MB)


if __name__ == "__main__":
    main()
