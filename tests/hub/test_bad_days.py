"""Networks, caches and repos on a bad day: one readable, typed message that says what it is, and no more than that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hubsae import HubSAE, SAEConfig, list_saes, push
from hubsae.core.errors import HubRequestError, HubSAEError, MetadataError
from hubsae.formats import Release
from hubsae.hub.client import HubClient
from hubsae.hub.errors import CacheError, OfflineError
from hubsae.hub.listing import describe
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT

ESCAPE = "\x1b[31m"


@pytest.fixture
def portal() -> Iterator[str]:
    """A network that answers everything with its login page."""

    class Page(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = b"<html><title>Welcome to the hotel</title></html>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBSAE_RETRY_ATTEMPTS", "1")


def test_a_login_page_is_not_called_offline(hub: LocalHub, portal: str, quick: None, seeds: Path):
    for act in (lambda: HubSAE.from_pretrained("me/any", endpoint=portal), lambda: HubClient(endpoint=portal).whoami()):
        with pytest.raises(HubRequestError, match="not as a Hub does") as caught:
            act()
        assert not isinstance(caught.value, OfflineError) and "browser" in str(caught.value)
    with pytest.raises(HubRequestError, match="not as a Hub does"):
        push(seeds, "me/any", endpoint=portal, **ABOUT)


def test_a_password_in_the_endpoint_is_not_shown(hub: LocalHub, quick: None):
    with pytest.raises(HubSAEError) as caught:
        HubSAE.from_pretrained("me/any", endpoint="http://me:secret@127.0.0.1:9")
    assert "127.0.0.1:9" in str(caught.value) and "secret" not in str(caught.value)
    assert "secret" not in HubClient(endpoint="http://me:secret@127.0.0.1:9").page("me/any")


@pytest.mark.parametrize(("proxy", "words"), [("http://127.0.0.1:9", "through the proxy"), ("foo://x", "the proxy")])
def test_a_proxy_that_is_dead_or_no_proxy_is_named(proxy: str, words: str, tmp_path: Path):
    code = "from hubsae import HubSAE; HubSAE.from_pretrained('me/any')"
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HTTP_PROXY": proxy, "HF_ENDPOINT": "http://hub.invalid", "HF_HOME": str(tmp_path)}
    env |= {"HUBSAE_RETRY_ATTEMPTS": "1", "HF_HUB_OFFLINE": "0"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stderr
    last = said.strip().splitlines()[-2:]
    assert words in " ".join(last) and proxy in " ".join(last)
    assert "HubRequestError" in said


def test_a_cache_that_cannot_be_written(hub: LocalHub, one: HubSAE):
    if not Path("/sys").is_dir():
        pytest.skip("no folder here that nobody can write to")
    one.push_to_hub("me/readable", check_saelens=False)
    with pytest.raises(CacheError, match="cache cannot be written") as caught:
        HubSAE.from_pretrained("me/readable", cache_dir="/sys/hubsae-cache")
    assert "HF_HOME" in str(caught.value)


def test_a_cache_whose_branch_names_no_commit(hub: LocalHub, one: HubSAE, monkeypatch: pytest.MonkeyPatch):
    one.push_to_hub("me/garbled", check_saelens=False)
    HubSAE.from_pretrained("me/garbled")
    client = HubClient()
    refs = client.cached_snapshot("me/garbled", "x").parents[1] / "refs" / "main"
    refs.write_bytes(b"\xff\xfe\x00garbage")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubSAEError, match="cache"):
        HubSAE.from_pretrained("me/garbled")


# -- text of strangers --------------------------------------------------------------------------------------------


def evil(folder: Path, **fields: str) -> Path:
    """A release whose manifest was changed by somebody."""
    release = Release.create(folder, name="r", base_model="a/b")
    from hubsae import SAEConfig

    release.add(HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2)), "a/layer1")
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["saes"][0] |= fields
    file.write_text(json.dumps(content))
    return folder


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hubsae.cli.main", *words], capture_output=True, text=True)


def test_control_characters_of_a_manifest_do_not_reach_the_terminal(tmp_path: Path):
    folder = evil(tmp_path / "r", stage=f"ppo{ESCAPE}", hook_point="model\u202elayers", base_model=ESCAPE)
    for words in (("ls", folder), ("ls", folder, "--all"), ("show", folder), ("ls", folder, "--layer", "7")):
        done = run(*map(str, words))
        assert "\x1b" not in done.stdout + done.stderr and "\u202e" not in done.stdout + done.stderr
    assert "ppo\\x1b[31m" in run("ls", str(folder)).stdout


@pytest.mark.parametrize("id", [f"a{ESCAPE}", "a\nb", "layer\u202e1", "x\ud800"])
def test_control_characters_in_an_id_are_refused(tmp_path: Path, id: str):
    with pytest.raises(MetadataError) as caught:
        list_saes(evil(tmp_path / "r", id=id))
    assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)


def test_tensor_names_of_a_file_are_shown_escaped(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    save_file({f"W{ESCAPE}": torch.zeros(2)}, tmp_path / "x.safetensors")
    done = run("show", str(tmp_path / "x.safetensors"))
    assert "\x1b" not in done.stdout + done.stderr and "W\\x1b" in done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"kind": "hubsae-release", "format_version": ' + "1" * 10_000 + "}",
        '{"kind": "\\ud800"}',
        "\x00",
    ],
    ids=["deep", "long number", "lone surrogate", "no JSON"],
)
def test_a_manifest_of_any_content_is_read_or_refused(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    for act in (list_saes, describe, HubSAE.from_pretrained):
        with pytest.raises(HubSAEError):
            act(tmp_path)


@pytest.mark.parametrize("kind", ["hub", "lfs_hub"])
def test_a_full_disk_in_a_download_is_said_with_the_folder_and_leaves_nothing_half(kind, request, tmp_path):
    """A file system of its own, too small for the weights: what a real full disk answers to the client's Xet code."""
    request.getfixturevalue(kind)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        sae = HubSAE.random(SAEConfig(architecture="topk", d_in=256, d_sae=2048, k=8))
        sae.push_to_hub("me/large", bar=False, check_saelens=False)
        with pytest.raises(HubSAEError, match="disk is full") as caught:
            HubSAE.from_pretrained("me/large", cache_dir=small)
        assert str(small) in str(caught.value)
        assert not [p for p in small.rglob("*.safetensors") if p.resolve().stat().st_size]
    finally:
        subprocess.run(["umount", str(small)], check=True)
