"""Every request of a push fails in turn, in four ways; afterwards exactly one new commit, and never a mix."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hubsae import HubSAE, push
from hubsae.core.errors import ConfigError, HubRequestError, HubSAEError
from hubsae.hub.client import HubClient
from hubsae.hub.retry import RetryPolicy
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder, titles

# the requests of a push: (method, pattern, part of the Xet or LFS path only)
REQUESTS = {
    "info": ("GET", r"/api/models/me/[^/]+$", None),
    "create": ("POST", r"/api/repos/create", None),
    "head": ("GET", r"/revision/main", None),
    "tree": ("GET", r"/tree/", None),
    "validate": ("POST", r"/api/validate-yaml", None),
    "preupload": ("POST", r"/preupload/", None),
    "commit": ("POST", r"/commit/", None),
    "xet-token": ("GET", r"/xet-write-token/", "xet"),
    "xorb": ("POST", r"/xorbs/", "xet"),
    "shard": ("POST", r"/v1/shards", "xet"),
    "lfs-batch": ("POST", r"/info/lfs/objects/batch", "lfs"),
    "lfs-put": ("PUT", r"/storage/", "lfs"),
}
FAULTS = {
    "429": {"status": 429, "rate_limit": 0},
    "500": {"status": 500},
    "dropped": {"drop": "before"},
    "lost": {"drop": "after"},
}
CASES = [
    pytest.param(storage, name, fault, id=f"{storage}-{name}-{fault}",
                 marks=[] if name in ("commit", "create", "shard", "lfs-put") and fault != "429" else pytest.mark.slow)
    for storage in ("xet", "lfs")
    for name, (_, _, only) in REQUESTS.items()
    if only in (None, storage)
    for fault in FAULTS
]  # fmt: skip


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library's own pauses are seconds; the order of things is what is tested here."""
    from huggingface_hub.utils import _http

    class Clock:
        def __getattr__(self, name: str):
            import time

            return (lambda seconds: None) if name == "sleep" else getattr(time, name)

    monkeypatch.setattr(_http, "time", Clock())


@contextmanager
def reader(hub: LocalHub, repo: str) -> Iterator[list[frozenset[tuple[str, str]]]]:
    """Somebody who looks at main all the time, and every different state they saw."""
    seen: list[frozenset[tuple[str, str]]] = []
    stop = threading.Event()
    client = HubClient(token="hf_me", endpoint=hub.url)

    def look() -> None:
        while not stop.is_set():
            try:
                tree = client.api.list_repo_tree(repo, recursive=True)
                state = frozenset((e.path, e.blob_id) for e in tree if hasattr(e, "blob_id"))
            except Exception:
                continue  # no repo yet, or the fault hit the reader
            if not seen or seen[-1] != state:
                seen.append(state)
            stop.wait(0.01)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(20)


def push_until_done(source: Path, repo: str, tries: int = 3) -> None:
    """What a person does: run the command again."""
    for attempt in range(tries):
        try:
            push(source, repo, message="the release", **ABOUT)
            return
        except HubRequestError:
            if attempt == tries - 1:
                raise


def check_result(repo: str, seen: list[frozenset[tuple[str, str]]]) -> None:
    assert titles(repo)[:-1] == ["the release"]
    client = HubClient()
    final = frozenset((f.path, f.git_oid) for f in client.tree(repo).values())
    weights = [path for path, _ in final if path.endswith("sae_weights.safetensors")]
    assert len(weights) == 2
    assert all(state == final or len(state) <= 1 for state in seen), "a reader of main saw a half release"
    assert HubSAE.from_pretrained(repo, layer=12).d_sae == 64


@pytest.mark.parametrize(("storage", "name", "fault"), CASES)
def test_one_failing_request(
    storage: str,
    name: str,
    fault: str,
    hubs: Callable[..., LocalHub],
    use: Callable[..., None],
    tmp_path: Path,
    fast: None,
):
    hub = hubs(xet=storage == "xet")
    use(hub, xet=storage == "xet")
    source = seed_folder(tmp_path / "saes", (6, 12), ("instruct_base",), seed=len(hub.requests))
    method, pattern, _ = REQUESTS[name]
    repo = f"me/{storage}-{name}-{fault}"
    injected = hub.inject_fault(pattern, method=method, **FAULTS[fault])
    try:
        with reader(hub, repo) as seen:
            push_until_done(source, repo)
        assert injected.hits == 1, "the push made no such request"
        check_result(repo, seen)
    finally:
        hub.clear_faults()


def test_a_number_of_attempts_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("HUBSAE_RETRY_ATTEMPTS", "many")
    with pytest.raises(ConfigError, match="HUBSAE_RETRY_ATTEMPTS is 'many'"):
        RetryPolicy.from_environment()


def test_a_hub_that_is_down_for_good_publishes_nothing(hub: LocalHub, seeds: Path, fast: None, monkeypatch):
    monkeypatch.setenv("HUBSAE_RETRY_ATTEMPTS", "2")
    hub.inject_fault(r"/commit/", method="POST", status=503, count=None)
    with pytest.raises(HubRequestError, match="503") as caught:
        push(seeds, "me/down", **ABOUT)
    assert "run the same command again" in str(caught.value)
    assert titles("me/down") == ["initial commit"]
    hub.clear_faults()
    assert push(seeds, "me/down", **ABOUT).committed
    assert len(titles("me/down")) == 2


def test_the_servers_pause_is_kept(hub: LocalHub, seeds: Path, monkeypatch):
    from hubsae.hub import retry

    slept: list[float] = []
    monkeypatch.setattr(retry.RetryPolicy, "from_environment", classmethod(lambda cls: cls(sleep=slept.append)))
    hub.inject_fault(r"/commit/", method="POST", status=429, rate_limit=7)
    push(seeds, "me/limited", **ABOUT)
    assert 8.0 in slept


def test_a_concurrent_writer_is_built_upon(hub: LocalHub, seeds: Path):
    push(seeds, "me/busy", **ABOUT)
    seed_folder(seeds, (6,), ("ppo_step10",), seed=2)
    other = HubClient()
    wrote = threading.Event()

    def interfere(line: str) -> None:
        pass

    original = HubClient.tree

    def tree(self: HubClient, *args: object, **options: object):
        found = original(self, *args, **options)  # type: ignore[arg-type]
        if not wrote.is_set():
            wrote.set()
            other.api.upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.txt", repo_id="me/busy")
        return found

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        # the other writer comes between our look at the plan and our commit
        patch.setattr(HubClient, "tree", tree)
        assert push(seeds, "me/busy", message="mine", notify=said.append, **ABOUT).committed
    assert titles("me/busy")[0] == "mine" and len(titles("me/busy")) == 4
    assert "notes.txt" in original(other, "me/busy")


def test_two_pushes_at_once_both_arrive(hub: LocalHub, tmp_path: Path):
    push(seed_folder(tmp_path / "start", (1,), ("base",)), "me/race", **ABOUT)
    sources = [seed_folder(tmp_path / f"part{i}", (i + 2,), ("base",), seed=i) for i in range(3)]
    failures: list[Exception] = []

    def run(source: Path) -> None:
        try:
            push(source, "me/race", **ABOUT)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    from hubsae import list_saes

    assert sorted(row["layer"] for row in list_saes("me/race")) == [1, 2, 3, 4]
    assert len(titles("me/race")) == 5


def test_a_hub_without_xet_gets_lfs_with_one_line(hubs: Callable[..., LocalHub], use: Callable[..., None], seeds: Path):
    hub = hubs(xet=False)
    use(hub, xet=True)
    said: list[str] = []
    assert push(seeds, "me/no-xet", notify=said.append, **ABOUT).committed
    assert len([line for line in said if "has no Xet storage; uploading by LFS" in line]) == 1
    assert HubSAE.from_pretrained("me/no-xet", layer=6, stage="ppo_step10").d_sae == 64


def test_xet_storage_that_does_not_answer_gets_lfs(hub: LocalHub, seeds: Path, fast: None, monkeypatch):
    monkeypatch.setenv("HUBSAE_RETRY_ATTEMPTS", "1")
    hub.inject_fault(r"/xet-write-token/", status=503, count=None)
    said: list[str] = []
    assert push(seeds, "me/bad-xet", notify=said.append, **ABOUT).committed
    assert any("does not answer for Xet storage" in line for line in said)


def test_no_write_access_says_so_and_names_the_way(hub: LocalHub, seeds: Path, use: Callable[..., None]):
    push(seeds, "me/mine", **ABOUT)
    seed_folder(seeds, (6,), ("ppo_step10",), seed=2)
    use(hub, token="hf_other")
    with pytest.raises(HubSAEError, match=re.compile("may not write.*--pr", re.S)):
        push(seeds, "me/mine", **ABOUT)
