"""What a new user meets: each error is one readable message with the nearest choices and the next command."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest

from hubsae import HubSAE, push
from hubsae.core.errors import ConfigError, HubRequestError, HubSAEError, NotFoundError
from hubsae.hub import errors
from hubsae.hub.catalog import units
from hubsae.hub.client import HubClient, split_repo
from hubsae.hub.retry import RetryPolicy, asked_pause, retrying
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT


@pytest.fixture
def chain(hub: LocalHub, seeds: Path) -> str:
    push(seeds, "me/chain-errors", **ABOUT)
    return "me/chain-errors"


def said(call: object, *args: object, **options: object) -> str:
    with pytest.raises(HubSAEError) as caught:
        call(*args, **options)  # type: ignore[operator]
    text = str(caught.value)
    assert "Traceback" not in text and len(text) < 1500
    return text


def test_wrong_repo_names_the_nearest(hub: LocalHub, chain: str):
    text = said(HubSAE.from_pretrained, "me/chain-eror")
    assert "there is no repo me/chain-eror" in text and "me/chain-errors" in text and "logged in as 'me'" in text


def test_wrong_revision_names_the_nearest(hub: LocalHub, chain: str):
    HubClient().api.create_tag(chain, tag="v1.0")
    assert "revisions there: v1.0" in said(HubSAE.from_pretrained, f"{chain}@v1.1")


def test_a_dataset_is_recognised(hub: LocalHub):
    HubClient().ensure_repo("me/acts", repo_type="dataset")
    text = said(HubSAE.from_pretrained, "me/acts")
    assert "is a dataset" in text and "ActivationDataset.open" in text


def test_a_wrong_token_names_the_login_command(hub: LocalHub, chain: str):
    assert "hf auth login" in said(HubSAE.from_pretrained, chain, layer=6, token="hf_wrong")


@pytest.mark.parametrize(
    ("endpoint", "words"), [("huggingface.co", "needs the scheme"), ("http://127.0.0.1:9", "cannot reach")]
)
def test_a_wrong_endpoint(hub: LocalHub, endpoint: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    text = said(HubSAE.from_pretrained, "me/any", endpoint=endpoint)
    assert words in text and "HF_ENDPOINT" in text


def test_misspelt_options_are_refused_before_anything_is_asked(hub: LocalHub):
    start = len(hub.requests)
    assert "nearest: layer" in said(HubSAE.from_pretrained, "me/any", layr=6)
    assert "floating-point" in said(HubSAE.from_pretrained, "me/any", dtype="float31")
    assert "is no device" in said(HubSAE.from_pretrained, "me/any", device="gpu0")
    assert len(hub.requests) == start


def test_paths_and_ids_that_look_like_something_else(hub: LocalHub, chain: str):
    text = said(HubSAE.from_pretrained, f"{chain}/saes_k64/ppo_step10/layer6")
    assert f"from_pretrained('{chain}', 'saes_k64/ppo_step10/layer6')" in text
    assert "neither a folder here nor a repo id" in said(HubSAE.from_pretrained, "not a repo")
    assert "there is no folder or file" in said(HubSAE.from_pretrained, "./nowhere")
    assert "two revisions" in said(HubSAE.from_pretrained, f"{chain}@a", revision="b")


def test_disk_full_while_caching_leaves_nothing_behind(
    hub: LocalHub, chain: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from huggingface_hub import file_download

    def full(*args: object, **options: object) -> None:
        Path(str(options["incomplete_path"])).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(options["incomplete_path"]))

    def full_http(url: str, file: object, **options: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    HubSAE.from_pretrained(chain, layer=12, stage="ppo_step10")
    monkeypatch.setattr(file_download, "xet_get", full)
    monkeypatch.setattr(file_download, "http_get", full_http)
    text = said(HubSAE.from_pretrained, chain, layer=6, stage="ppo_step10")
    assert "the disk is full" in text and "HF_HOME" in text
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    monkeypatch.undo()


def test_a_new_repo_in_a_namespace_that_is_not_ours(hub: LocalHub, seeds: Path):
    start = len(hub.requests)
    text = said(push, seeds, "nobody/x", **ABOUT)
    assert "logged in as 'me'" in text and "namespaces you can create repos in: me" in text
    assert all(method == "GET" for method, _, _ in hub.requests[start:])


def test_a_push_offline_says_so(hub: LocalHub, seeds: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "unset HF_HUB_OFFLINE" in said(push, seeds, "me/offline", **ABOUT)


def test_the_command_line(hub: LocalHub, chain: str, tmp_path: Path, monkeypatch, capsys):
    from hubsae.cli.main import main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hubsae", *words])
        try:
            main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, _, err = run("ls", f"{chain}@v9")
    assert code == 1 and "has no revision 'v9'" in err and "Traceback" not in err
    code, out, _ = run("ls", chain, "--layer", "6", "--json")
    assert code == 0 and [row["stage"] for row in json.loads(out)] == ["instruct_base", "ppo_step10"]
    folder = tmp_path / "out"
    assert run("pull", chain, "saes_k64/ppo_step10/layer6", "--out", str(folder))[0] == 0
    assert (folder / "config.json").is_file()
    code, out, _ = run("push", str(folder), "--repo-id", "me/cli", "--dry-run", "--no-saelens-check")
    assert code == 0 and "a new public repo" in out and "topk(k=4)" in out
    code, _, err = run("push", str(folder), "--repo-id", "me/cli", "--no-saelens-check")
    assert code == 1 and "--yes" in err, "nobody there to say yes"
    code, out, _ = run("push", str(folder), "--repo-id", "me/cli", "--yes", "--json", "--no-saelens-check")
    assert code == 0 and json.loads(out)["committed"] is True
    code, out, _ = run("show", "me/cli/saes_k64/ppo_step10/layer6")
    assert code == 0 and "W_enc [16, 64] F32" in out
    assert run("card", str(folder), "--repo-id", "me/cli", "--preview")[0] == 0
    assert (folder / ".card-preview.html").is_file()


def test_every_typed_error_is_a_hubsae_error():
    for name in ("RepoNotFoundError", "RevisionNotFoundError"):
        assert issubclass(getattr(errors, name), NotFoundError)
    for name in ("AccessError", "OfflineError", "ConflictError", "IntegrityError"):
        assert issubclass(getattr(errors, name), HubRequestError)
    assert split_repo("a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert issubclass(errors.DiskFullError, OSError) and issubclass(ConfigError, HubSAEError)


# -- the small parts ---------------------------------------------------------------------------------------------


def test_retry_waits_as_told_and_gives_up():
    slept: list[float] = []
    policy = RetryPolicy(attempts=3, base=1.0, jitter=0.0, sleep=slept.append)
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError):
        retrying(fail, policy=policy)
    assert calls == 3 and slept == [1.0, 2.0]
    with pytest.raises(KeyError):
        retrying(lambda: {}["x"], policy=policy)
    assert slept == [1.0, 2.0], "what cannot get better is not repeated"


def test_pauses_in_headers():
    assert asked_pause({"ratelimit": '"api";r=0;t=3'}) == 4.0
    assert asked_pause({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert asked_pause({"Retry-After": "soon"}) is None and asked_pause({}) is None


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (["ae.pt", "config.json"], ["."]),
        (["layers.6/cfg.json", "layers.6/sae.safetensors", "layers.12/cfg.json", "layers.12/sae.safetensors"],
         ["layers.6", "layers.12"]),
        (["layer_1/width_16k/average_l0_9/params.npz"], ["layer_1/width_16k/average_l0_9"]),
        (["model.safetensors", "model.metadata.json", "model.pt", "model.onnx", "W_enc.npy"], ["."]),
        (["layer0.sae.pt", "layer10.sae.pt", "layer2.sae.pt"], ["layer0.sae.pt", "layer2.sae.pt", "layer10.sae.pt"]),
        (["x/hyperparams.json", "x/checkpoints/final.safetensors"], ["x"]),
        (["optimizer.pt", "pytorch_model.bin", "README.md"], []),
    ],
)  # fmt: skip
def test_a_file_list_is_grouped_into_saes(paths: list[str], ids: list[str]):
    assert list(units(paths)) == ids
