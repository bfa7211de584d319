"""kill -9 at every request of a push: the next push completes it, with exactly one commit and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hubsae import HubSAE, push
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder, titles
from tests.hub.test_faults import REQUESTS, check_result, reader

SCRIPT = """
import sys
from hubsae import push
push(sys.argv[1], sys.argv[2], message="the release", base_model="Qwen/Qwen2.5-0.5B-Instruct",
     hook="model.layers.{layer}", license="apache-2.0", check_saelens=False)
"""
ORDINARY = {("xet", "commit"), ("xet", "shard"), ("lfs", "lfs-put")}
CASES = [
    pytest.param(storage, name, id=f"{storage}-{name}", marks=[] if (storage, name) in ORDINARY else pytest.mark.slow)
    for storage in ("xet", "lfs")
    for name, (_, _, only) in REQUESTS.items()
    if only in (None, storage)
]  # fmt: skip


@pytest.mark.parametrize(("storage", "name"), CASES)
def test_killed_during_a_request(
    storage: str, name: str, hubs: Callable[..., LocalHub], use: Callable[..., None], tmp_path: Path
):
    hub = hubs(xet=storage == "xet")
    use(hub, xet=storage == "xet")
    source = seed_folder(tmp_path / "saes", (6, 12), ("instruct_base",), seed=len(hub.requests))
    repo = f"me/killed-{storage}-{name}"
    method, pattern, _ = REQUESTS[name]
    fault = hub.inject_fault(pattern, method=method, delay=1.0)
    env = hub.env(tmp_path / "child", HF_TOKEN="hf_me", HUBSAE_RETRY_BASE="0.01", OMP_NUM_THREADS="1")
    env["HF_HUB_DISABLE_XET"] = "0" if storage == "xet" else "1"
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(source), repo], env=env, stderr=subprocess.PIPE)
    try:
        with reader(hub, repo) as seen:
            deadline = time.monotonic() + 120
            while fault.hits == 0 and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert fault.hits == 1, child.stderr.read().decode() if child.stderr else "the request was never made"
            os.kill(child.pid, signal.SIGKILL)
            assert child.wait(30) == -signal.SIGKILL
            push(source, repo, message="the release", **ABOUT)
            time.sleep(1.2)  # whatever the hub was still doing for the dead one
            push(source, repo, message="the release", **ABOUT)
        check_result(repo, seen)
    finally:
        hub.clear_faults()
        child.kill()
        child.wait()
        if child.stderr:
            child.stderr.close()


def test_the_staging_of_a_killed_push_is_removed_by_the_next(hub: LocalHub, seeds: Path, tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    left = tmp_path / "hf" / "hubsae" / "staging" / f"{dead.pid}-abc"
    left.mkdir(parents=True)
    (left / "big").write_bytes(b"x")
    push(seeds, "me/cleaned", **ABOUT)
    assert not left.exists()


def test_a_resumed_push_does_not_send_objects_twice(lfs_hub: LocalHub, seeds: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HUBSAE_RETRY_ATTEMPTS", "1")
    lfs_hub.inject_fault(r"/commit/", method="POST", status=500)
    with pytest.raises(Exception, match="500"):
        push(seeds, "me/resumed", **ABOUT)
    start = len(lfs_hub.requests)
    push(seeds, "me/resumed", **ABOUT)
    assert not [r for r in lfs_hub.requests[start:] if r[0] == "PUT"]
    assert titles("me/resumed")[1:] == ["initial commit"]
    assert HubSAE.from_pretrained("me/resumed", layer=6, stage="ppo_step10").d_sae == 64
