"""Throughput and memory of the local hub, with the stock huggingface_hub client.

    python benchmarks/localhub.py [--quick]

Throughput: 600 MB in 6 files up (`upload_folder`) and down (`snapshot_download`) over loopback, against copying and
hashing (sha256) the same files, interleaved; the ratio is what counts, seconds differ per machine. The client's own
work is included: with Xet it cuts, hashes and compresses everything before a byte leaves it.

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

UP = (
    "import sys\nfrom huggingface_hub import HfApi\nHfApi().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
)
DOWN = (
    "import sys\nfrom huggingface_hub import snapshot_download\nsnapshot_download(sys.argv[1], cache_dir=sys.argv[2])"
)
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
    return subprocess.Popen([sys.executable, "-c", code, *args], env={**env, "HF_HOME": str(home)})


def timed(process: subprocess.Popen, start: float) -> float:
    assert process.wait() == 0
    return time.perf_counter() - start


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


def throughput(work: Path, mode: str, size: int, rounds: int) -> None:
    args = [] if mode == "xet" else ["--no-xet"]
    ratios: dict[str, list[float]] = {"up": [], "down": []}
    seconds: dict[str, list[float]] = {"copy and hash": [], "up": [], "down": [], "client start": []}
    for number in range(rounds):
        files = work / f"files{number}"
        make_files(files, 6, size // 6)  # fresh content each round: nothing is known to the hub or the client
        base = copy_and_hash(files, work / "copy")
        with serving(work / f"hub{number}", *args) as (_, env):
            assert client(CREATE, env, work / "home", "local/x").wait() == 0
            start = time.perf_counter()
            idle = timed(client("import huggingface_hub.hf_api, hf_xet", env, work / "home"), start)
            start = time.perf_counter()
            up = timed(client(UP, env, work / "home", "local/x", str(files)), start)
            start = time.perf_counter()
            down = timed(client(DOWN, env, work / "home", "local/x", str(work / "cache")), start)
        found = next((work / "cache").glob("models--local--x/snapshots/*/file1.safetensors"))
        assert found.read_bytes() == (files / "file1.safetensors").read_bytes()
        base = min(base, copy_and_hash(files, work / "copy")) if number else base
        for name, value in (("copy and hash", base), ("up", up), ("down", down), ("client start", idle)):
            seconds[name].append(value)
        ratios["up"].append(up / base)
        ratios["down"].append(down / base)
        for folder in (files, work / f"hub{number}", work / "cache", work / "home"):
            shutil.rmtree(folder)
    shown = ", ".join(f"{name} {statistics.median(values):.2f} s" for name, values in seconds.items())
    both = statistics.median((u + d) / 2 for u, d in zip(ratios["up"], ratios["down"], strict=True))
    print(f"{mode:4} {size // MB} MB: {shown}")
    print(
        f"     up {statistics.median(ratios['up']):.2f}x, down {statistics.median(ratios['down']):.2f}x of copying and "
        f"hashing (mean of both {both:.2f}x)"
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
    parser.add_argument("--only", choices=("throughput", "memory"))
    args = parser.parse_args()
    size, rounds, clients = (60 * MB, 1, 3) if args.quick else (600 * MB, args.rounds, 10)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    print(json.dumps({"cpu": cpu[0] if cpu else "unknown", "cores": os.cpu_count()}))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for mode in ("lfs", "xet"):
            if args.only != "memory":
                throughput(work, mode, size, rounds)
            if args.only != "throughput":
                memory(work, mode, clients, 100 * MB if not args.quick else 10 * MB)


if __name__ == "__main__":
    main()
