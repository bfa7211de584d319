"""kill -9 while clients push: what was acknowledged is there, and git finds nothing wrong."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

# loads the server once and forks a fresh one for every line it reads: starting Python anew takes longer than serving
SERVE = """
import os, sys
from pathlib import Path
import uvicorn
import hubsae.localhub.app
from hubsae.localhub import LocalHub, Settings, Token
for _ in sys.stdin:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        print("gone", flush=True)
        continue
    hub = LocalHub(Settings(root=Path(sys.argv[1]), port=int(sys.argv[2]), tokens=(Token("local", "t"),), fsync=False))
    hub.start()
    print(os.getpid(), flush=True)
    hub._thread.join()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Pusher(threading.Thread):
    """Commits, branches, tags and PRs as fast as the server takes them; remembers what was acknowledged."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.number = number
        self.stop = False
        self.commits: list[tuple[str, str, bytes]] = []  # revision, path, content
        self.refs: list[tuple[str, str]] = []
        self.rng = random.Random(number)

    def call(self, method: str, path: str, body: bytes) -> dict:
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            line.request(method, path, body, {"Authorization": "Bearer t"})
            got = line.getresponse()
            answer = got.read()
            return json.loads(answer) if got.status == 200 else {}
        finally:
            line.close()

    def run(self) -> None:
        count = 0
        while not self.stop:
            count += 1
            path, content = (
                f"{self.number}/f{self.rng.randrange(10**9)}",
                self.rng.randbytes(self.rng.choice([10, 3000, 200_000])),
            )
            lines = [
                {"key": "header", "value": {"summary": f"{self.number}.{count}"}},
                {
                    "key": "file",
                    "value": {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"},
                },
            ]
            body = "\n".join(map(json.dumps, lines)).encode()
            pr = count % 7 == 0
            try:
                got = self.call("POST", f"/api/models/local/x/commit/main{'?create_pr=1' if pr else ''}", body)
                if got:
                    self.commits.append((got["commitOid"], path, content))
                    if pr:
                        self.refs.append((f"refs/pr/{got['pullRequestUrl'].rsplit('/', 1)[1]}", got["commitOid"]))
                name = f"{self.number}-{path.split('/')[1]}"
                if count % 3 == 0 and self.call(
                    "POST", "/api/models/local/x/tag/main", json.dumps({"tag": name}).encode()
                ):
                    self.refs.append((f"refs/tags/{name}", ""))
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(0.01)


def git(path: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-c", "safe.directory=*", *args], cwd=path, capture_output=True)


def kill_and_check(root: Path, kills: int, check_every: int) -> int:
    """Serve, kill at a random moment, check, serve again; the number of acknowledged commits."""
    port = free_port()
    rng = random.Random(7)
    repo = root / "models" / "local" / "x.git"
    pushers: list[Pusher] = []
    seen = 0
    command = [sys.executable, "-c", SERVE, str(root), str(port)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    for round_number in range(kills):
        server.stdin.write("\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        if round_number == 0:
            line = http.client.HTTPConnection("127.0.0.1", port)
            line.request("POST", "/api/repos/create", b'{"name": "x"}', {"Authorization": "Bearer t"})
            assert line.getresponse().status == 200
            pushers = [Pusher(port, n) for n in range(3)]
            for pusher in pushers:
                pusher.start()
        time.sleep(rng.random() * 0.25)
        os.kill(pid, signal.SIGKILL)
        assert server.stdout.readline() == "gone\n"
        if round_number % check_every == check_every - 1 or round_number == kills - 1:
            done = git(repo, "fsck", "--strict", "--full", "--no-dangling")
            assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr
            reachable = set(git(repo, "rev-list", "--all").stdout.decode().split())
            for pusher in pushers:
                for sha, path, content in list(pusher.commits)[-20 if round_number < kills - 1 else 0 :]:
                    assert sha in reachable, f"acknowledged commit {sha} is gone after kill {round_number}"
                    assert git(repo, "cat-file", "blob", f"{sha}:{path}").stdout == content
                for ref, sha in list(pusher.refs):
                    found = git(repo, "rev-parse", "--verify", ref).stdout.decode().strip()
                    assert found and (not sha or found == sha), f"acknowledged {ref} is gone"
            seen = sum(len(p.commits) for p in pushers)
    server.communicate()
    for pusher in pushers:
        pusher.stop = True
    for pusher in pushers:
        pusher.join(10)
    return seen


def test_killed_server_keeps_every_acknowledged_commit(tmp_path):
    assert kill_and_check(tmp_path / "root", kills=20, check_every=10) >= 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_kills(tmp_path):
    assert kill_and_check(tmp_path / "root", kills=1000, check_every=50) >= 300


def test_a_folder_is_served_by_one_process(local_hub):
    from hubsae.localhub import LocalHubError, running

    with pytest.raises(LocalHubError, match="another process"), running(root=local_hub.root):
        pass


def test_a_restart_finds_everything_again(local_hub_factory, raw_for, tmp_path):
    from hubsae.localhub import running

    with running(root=tmp_path / "data", tokens={"local": "t"}) as hub:
        raw = raw_for(hub)
        raw.create(private=True)
        raw.commit_lfs("w.bin", b"weights")
        raw.commit({"a.txt": b"1"}, query="?create_pr=1")
        raw("POST", "/api/repos/move", {"fromRepo": "local/x", "toRepo": "local/y", "type": "model"})
        raw("POST", "/api/collections", {"title": "SAEs", "namespace": "local"})
        before = raw("GET", "/api/models/local/y").json
        admin = hub.hub.admin_token
        (hub.root / "tmp" / "left-over").write_text("half an upload")
    with running(root=tmp_path / "data", tokens={"local": "t"}) as hub:
        raw = raw_for(hub)
        assert raw("GET", "/api/models/local/y").json == before
        assert raw("GET", "/api/models/local/x").status == 307
        assert raw("GET", "/local/y/resolve/main/w.bin").body == b"weights"
        assert raw("GET", "/api/models/local/y/discussions/1").json["status"] == "open"
        assert [c["title"] for c in raw("GET", "/api/collections").json] == ["SAEs"]
        assert hub.hub.admin_token == admin
        assert not list((hub.root / "tmp").iterdir())
