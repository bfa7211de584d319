"""A request that fails for good is sent at most six times, whatever layer repeats it, and changes nothing else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from hubsae import HubSAE, push
from hubsae.core.errors import HubSAEError
from hubsae.hub import retry
from hubsae.hub.client import HubClient
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder

MOST_TRIES = 6
MOST_SECONDS = 60.0
"""Of pauses in all; without a pause that the server itself asks for."""


FRESH = count(1000)
"""Seeds of content that no storage holds yet."""


def first_push(source: Path) -> None:
    push(source, "me/bounded", **ABOUT)


def again(**options: object) -> Callable[[Path], None]:
    def act(source: Path) -> None:
        seed_folder(source, (6,), ("later",), seed=next(FRESH))
        push(source, "me/bounded", **ABOUT, **options)  # type: ignore[arg-type]

    return act


def load(source: Path) -> None:
    HubSAE.from_pretrained("me/bounded", layer=6, stage="instruct_base", force_download=True)


# kind of request: (method, pattern, storage, whether the repo is there before, what is done)
KINDS = {
    "info": ("GET", r"/api/models/me/[^/]+$", "xet", False, first_push),
    "whoami": ("GET", r"/api/whoami", "xet", False, first_push),
    "create": ("POST", r"/api/repos/create", "xet", False, first_push),
    "head": ("GET", r"/revision/main", "xet", True, again()),
    "tree": ("GET", r"/tree/", "xet", True, again()),
    "refs": ("GET", r"/refs", "xet", True, again(tag="v2")),
    "validate-yaml": ("POST", r"/api/validate-yaml", "xet", True, again()),
    "preupload": ("POST", r"/preupload/", "xet", True, again()),
    "commit": ("POST", r"/commit/", "xet", True, again()),
    "branch": ("POST", r"/branch/", "xet", True, again(revision="next")),
    "tag": ("POST", r"/tag/", "xet", True, again(tag="v3")),
    "pull request": ("POST", r"/discussions$", "xet", True, again(pr=True)),
    "xet-token": ("GET", r"/xet-write-token/", "xet", True, again()),
    "xorb": ("POST", r"/xorbs/", "xet", True, again()),
    "shard": ("POST", r"/v1/shards", "xet", True, again()),
    "lfs-batch": ("POST", r"/info/lfs/objects/batch", "lfs", True, again()),
    "lfs-put": ("PUT", r"/storage/", "lfs", True, again()),
    "metadata of a file": ("HEAD", r"/resolve/", "xet", True, load),
    "download": ("GET", r"/resolve/", "lfs", True, load),
}
XET = ("xet-token", "xorb", "shard")
"""Where LFS takes over, so that the push succeeds."""
ORDINARY = ("tree", "preupload", "commit", "lfs-put", "xet-token", "validate-yaml")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that were asked for, of the client library and our own; nobody waits for them."""
    from huggingface_hub.utils import _http

    pauses: list[float] = []

    class Clock:
        def __getattr__(self, name: str):
            return pauses.append if name == "sleep" else getattr(time, name)

    monkeypatch.setattr(_http, "time", Clock())
    monkeypatch.setattr(retry.RetryPolicy, "from_environment", classmethod(lambda cls: cls(sleep=pauses.append)))
    return pauses


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        pytest.param(kind, status, marks=[] if status == 500 and kind in ORDINARY else pytest.mark.slow)
        for kind in KINDS
        for status in (500, 503, 429)
    ],
)
def test_a_request_that_fails_for_good(
    kind: str,
    status: int,
    hubs: Callable[..., LocalHub],
    use: Callable[..., None],
    tmp_path: Path,
    slept: list[float],
    record_property: Callable[[str, object], None],
):
    from huggingface_hub import constants

    method, pattern, storage, before, act = KINDS[kind]
    hub = hubs(xet=storage == "xet")
    use(hub, xet=storage == "xet")
    source = seed_folder(tmp_path / "saes", (6, 12), ("instruct_base",), seed=len(hub.requests))
    client = HubClient()
    client.api.delete_repo("me/bounded", missing_ok=True)
    if before:
        first_push(source)
    disabled, commits = constants.HF_HUB_DISABLE_XET, len(client.api.list_repo_commits("me/bounded")) if before else 0
    fault = hub.inject_fault(pattern, method=method, status=status, count=None)
    start = len(hub.requests)
    slept.clear()
    try:
        if kind in XET:
            act(source)
        else:
            with pytest.raises(HubSAEError, match=str(status)) as caught:
                act(source)
            assert caught.value.hint
    finally:
        hub.clear_faults()
    sent = Counter((m, path) for m, path, answer in hub.requests[start:] if answer == status)
    assert fault.hits, "no such request was made"
    for request, times in sent.items():
        assert times <= MOST_TRIES, f"{request} was sent {times} times"
    assert sum(slept) <= MOST_SECONDS
    assert disabled == constants.HF_HUB_DISABLE_XET, "a failure changed a setting of the process"
    record_property("requests", max(sent.values(), default=0))
    record_property("seconds", round(sum(slept), 1))
    print(f"| {kind} | {status} | {max(sent.values(), default=0)} | {sum(slept):.0f} |")
    act(source)  # the next time all is well
    if kind not in ("branch", "pull request") and act is not load:
        assert len(client.api.list_repo_commits("me/bounded")) in (commits + 1, commits + 2)
