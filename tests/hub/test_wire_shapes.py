"""A push sends no request that the stock client would not send: a hub that takes the one takes the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from hubsae import HubSAE, push
from hubsae.hub.client import HubClient
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder
from tests.hub.recorder import Recorder, recording

LARGE = b"\x00" * (1 << 20)


@pytest.fixture
def recorder(lfs_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    with recording(lfs_hub.url) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def stock(url: str, folder: Path) -> None:
    """What a person does with nothing but huggingface_hub: commits, a branch, a tag, a README, a pull request."""
    (folder / "weights.safetensors").write_bytes(LARGE)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# hello\n")
    api, repo = HfApi(endpoint=url, token="hf_me"), "me/stock"
    api.whoami()
    for kind in ("model", "dataset"):
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info("me/nothing-there", repo_type=kind)
    api.create_repo(repo, repo_type="model", exist_ok=True)
    api.create_repo("me/stock-private", repo_type="model", private=True, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder)
    head = str(api.repo_info(repo, revision="main").sha)
    operations = [CommitOperationAdd("more.bin", LARGE + b"1"), CommitOperationDelete("weights.safetensors")]
    api.preupload_lfs_files(repo, operations[:1])
    api.create_commit(repo, operations, commit_message="m", revision="main", parent_commit=head)
    list(api.list_repo_tree(repo, recursive=True, revision=str(api.repo_info(repo).sha)))
    api.hf_hub_download(repo, "config.json", revision=head, cache_dir=folder / "cache")
    list(api.list_repo_commits(repo, revision=head))
    api.create_branch(repo, branch="exp", exist_ok=True)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=repo, revision="exp", parent_commit=None)
    here = str(api.repo_info(repo, revision="exp").sha)
    exp = [CommitOperationAdd("b.bin", LARGE + b"2"), CommitOperationDelete("a.txt")]
    api.preupload_lfs_files(repo, exp[:1], revision="exp")
    api.create_commit(repo, exp, commit_message="m", revision="exp", parent_commit=here)
    api.create_tag(repo, tag="v1", revision=here, exist_ok=True)
    api.list_repo_refs(repo)
    api.list_repo_refs(repo, include_pull_requests=True)
    list(api.list_models(author="me", limit=50))
    api.hf_hub_download(repo, "README.md", cache_dir=folder / "cache")
    made = api.create_pull_request(repo, title="proposal", description="words")
    ref = f"refs/pr/{made.num}"
    list(api.get_repo_discussions(repo, author="me", discussion_type="pull_request"))
    api.get_discussion_details(repo, made.num)
    base = str(api.repo_info(repo, revision=ref).sha)
    proposed = [CommitOperationAdd("c.bin", LARGE + b"3"), CommitOperationAdd("c.json", b"{}")]
    api.preupload_lfs_files(repo, proposed, revision=ref)
    api.create_commit(
        repo, [*proposed, CommitOperationDelete("more.bin")], commit_message="m", revision=ref, parent_commit=base
    )
    api.change_discussion_status(repo, made.num, "open")


def test_no_request_that_the_stock_client_would_not_send(recorder: Recorder, tmp_path: Path, seeds: Path):
    (tmp_path / "stock").mkdir()
    stock(recorder.url, tmp_path / "stock")
    known = recorder.take()
    push(seeds, "me/shapes", **ABOUT)
    push(seeds, "me/shapes-private", private=True, **ABOUT)
    seed_folder(seeds, (6,), ("ppo_step10",), seed=4)
    push(seeds, "me/shapes", revision="exp", tag="v1.0", **ABOUT)
    push(seeds, "me/shapes", pr=True, prune=True, **ABOUT)
    push(seeds, "me/shapes", pr=True, prune=True, **ABOUT)
    push(seed_folder(tmp_path / "other", (1,), seed=5), "me/shapes", delete=["*.nothing"], prune=True, **ABOUT)
    assert HubSAE.from_pretrained("me/shapes", layer=1, stage="ppo_step10").d_sae == 64
    sent = recorder.take()
    assert any("/commit/PR" in shape.path for shape in sent) and any("/tag/" in shape.path for shape in sent)
    assert not sent - known, "\n".join(str(shape) for shape in sorted(sent - known))


@pytest.mark.parametrize("token", ["hf_me", "hf_other"], ids=["writer", "stranger"])
def test_a_pull_request_twice_in_a_row_is_one(
    lfs_hub: LocalHub, seeds: Path, use: Callable[..., None], token: str, tmp_path: Path
):
    repo = f"me/twice-{token[3:]}"
    push(seeds, repo, **ABOUT)
    seed_folder(seeds, (6,), ("ppo_step10",), seed=4)
    use(lfs_hub, xet=False, token=token)
    with recording(lfs_hub.url) as recorder:
        first = push(seeds, repo, pr=True, endpoint=recorder.url, **ABOUT)
        again = push(seeds, repo, pr=True, endpoint=recorder.url, **ABOUT)
        for shape in recorder.take():
            query = dict(shape.query)
            assert "create_pr" not in query or "PR" not in shape.path, f"its base is no branch: {shape}"
    assert first.committed and not again.committed and first.url == again.url
    found = list(HubClient().api.get_repo_discussions(repo))
    assert [(pr.num, pr.status) for pr in found] == [(1, "open")]
