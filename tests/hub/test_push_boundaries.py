"""What a push takes along and what it leaves: links, strays, secrets; piles on the Hub; what is read how often."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hubsae import HubSAE, list_saes, package, push
from hubsae.core.errors import FormatError, HubSAEError
from hubsae.core.metadata import Metric
from hubsae.evals.record import record_metrics
from hubsae.formats import Release
from hubsae.hub.client import HubClient
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder

TOKEN = "hf_" + "abcdefghij" * 3 + "ABCD"
SPEC = {name: ABOUT[name] for name in ("base_model", "hook", "license")}


@pytest.fixture
def release(seeds: Path, tmp_path: Path) -> Release:
    return package(seeds, tmp_path / "release", **SPEC)


def remote(repo: str, path: str) -> bytes:
    return HubClient().download(repo, path, force=True).read_bytes()


# -- links -------------------------------------------------------------------------------------------------------


def test_a_link_out_of_a_raw_folder_publishes_nothing_of_its_target(hub: LocalHub, seeds: Path, tmp_path: Path):
    outside = tmp_path / "private"
    outside.mkdir()
    (outside / "salaries.csv").write_text("name,salary\nann,71234\n")
    (outside / "secret.png").write_bytes(b"\x89PNG secret")
    shutil.move(seeds / "sae_ppo_step10_layer12.pt", outside / "sae.pt")
    (seeds / "results.csv").symlink_to(outside / "salaries.csv")
    (seeds / "plot.png").symlink_to(outside / "secret.png")
    (seeds / "sae_ppo_step10_layer12.pt").symlink_to(outside / "sae.pt")
    (seeds / "more").symlink_to(outside)
    result = push(seeds, "me/links", keep_source=True, **ABOUT)
    tree = HubClient().tree("me/links")
    assert not [path for path in tree if "csv" in path or "png" in path or "ppo_step10/layer12" in path]
    assert b"71234" not in b"".join(remote("me/links", path) for path in tree if path.endswith(("md", "json")))
    assert sum("leads out of the folder" in note for note in result.plan.notes) == 3


def test_a_link_inside_the_folder_is_followed(hub: LocalHub, seeds: Path):
    (seeds / "numbers").mkdir()
    (seeds / "numbers" / "all.csv").write_text("a,b\n1,2\n")
    (seeds / "results.csv").symlink_to(seeds / "numbers" / "all.csv")
    push(seeds, "me/inner-links", **ABOUT)
    assert "results/results.csv" in HubClient().tree("me/inner-links")


def test_a_folder_that_is_one_sae_holds_no_link_to_elsewhere(hub: LocalHub, one: HubSAE, tmp_path: Path):
    one.save_pretrained(tmp_path / "saes" / "mine")
    shutil.move(tmp_path / "saes" / "mine" / "cfg.json", tmp_path / "cfg.json")
    (tmp_path / "saes" / "mine" / "cfg.json").symlink_to(tmp_path / "cfg.json")
    with pytest.raises(FormatError, match="a link to"):
        push(tmp_path / "saes", "me/linked-part", check_saelens=False)


def test_a_link_out_of_a_release_is_not_published(hub: LocalHub, release: Release, tmp_path: Path):
    (tmp_path / "private.txt").write_text("mine alone")
    (release.path / "notes.txt").symlink_to(tmp_path / "private.txt")
    (release.path / "README.md").symlink_to(tmp_path / "private.txt")
    push(release.path, "me/release-links", license="mit", check_saelens=False)
    tree = HubClient().tree("me/release-links")
    assert "notes.txt" not in tree and b"mine alone" not in remote("me/release-links", "README.md")
    listed = release.path / release.manifest.all_files[0].path
    listed.rename(tmp_path / "moved")
    listed.symlink_to(tmp_path / "moved")
    with pytest.raises(FormatError, match="a link that leads out of the release"):
        push(release.path, "me/release-links", check_saelens=False)


def test_a_release_in_the_cache_is_published_from_there(hub: LocalHub, release: Release):
    push(release.path, "me/original", check_saelens=False)
    client = HubClient()
    for path in client.tree("me/original"):
        place = client.download("me/original", path)
    root = client.cached_snapshot("me/original", client.head("me/original"))
    assert place.is_symlink() and push(root, "me/copy", check_saelens=False).committed
    assert len(list_saes("me/copy")) == 4


# -- strays and secrets ------------------------------------------------------------------------------------------


def test_the_plan_names_every_file_that_is_no_sae_with_its_size(hub: LocalHub, release: Release):
    release.add_results("eval", [{"a": 1}])
    (release.path / "draft.txt").write_text("not for anybody")
    plan = push(release.path, "me/strays", dry_run=True, check_saelens=False).plan
    assert plan.others == [("results/eval.csv", 4), ("draft.txt", 15)]
    assert any("draft.txt (15 B)" in line for line in plan.summary())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", f"token: {TOKEN}"),
        ("results/run.csv", f"a,b\n1,{TOKEN}\n"),
        ("key.txt", "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn"),
        ("prod.env", "PASSWORD=1"),
        ("id_ed25519", "whatever"),
    ],
)
def test_what_looks_like_a_secret_is_refused(hub: LocalHub, release: Release, name: str, content: str):
    (release.path / "results").mkdir(exist_ok=True)
    (release.path / name).write_text(content)
    repo = "me/secret-" + name.replace("/", "-").replace(".", "-")
    with pytest.raises(HubSAEError, match="looks like a secret") as caught:
        push(release.path, repo, check_saelens=False)
    assert name in str(caught.value) and TOKEN not in str(caught.value) and "--allow-secrets" in str(caught.value)
    assert not [r for r in hub.requests if r[0] != "GET" and repo in r[1]], "it was found before anything was sent"
    assert push(release.path, repo, allow_secrets=True, check_saelens=False).committed


def test_a_token_in_a_description_is_refused_and_hidden_files_stay_at_home(hub: LocalHub, release: Release):
    (release.path / ".env").write_text(f"HF_TOKEN={TOKEN}")
    assert push(release.path, "me/hidden", check_saelens=False).committed
    assert ".env" not in HubClient().tree("me/hidden")
    with pytest.raises(HubSAEError, match=r"config\.json \(a Hugging Face token\)"):
        push(release.path, "me/hidden", description=f"made with {TOKEN}", check_saelens=False)


# -- piles on the Hub --------------------------------------------------------------------------------------------


def test_a_pile_on_the_hub_becomes_a_release_as_a_pull_request(
    hub: LocalHub, seeds: Path, use: Callable[..., None], tmp_path: Path
):
    client = HubClient()
    client.ensure_repo("me/pile")
    client.api.upload_folder(repo_id="me/pile", folder_path=seeds, path_in_repo="saes_k64")
    use(hub, token="hf_other")  # who may not write there
    first = push("me/pile", pr=True, **ABOUT)
    again = push("me/pile", pr=True, **ABOUT)
    assert first.url == again.url and first.published is not None and first.published.revision == "refs/pr/1"
    assert len(list(HubClient().api.get_repo_discussions("me/pile"))) == 1
    ids = [row["id"] for row in list_saes("me/pile", revision="refs/pr/1")]
    assert "saes_k64/ppo_step10/layer12" in ids and len(ids) == 4
    theirs = HubSAE.from_pretrained("me/pile", "saes_k64/ppo_step10/layer12", revision="refs/pr/1")
    assert theirs.metadata.provenance.source_file == "saes_k64/sae_ppo_step10_layer12.pt"


def hubsae(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line in this process; its exit code."""
    from hubsae.cli.main import main

    monkeypatch.setattr(sys, "argv", ["hubsae", *words])
    try:
        main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_the_command_line_takes_the_repo_second_and_converts_from_the_hub(
    hub: LocalHub, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    about = ["--base-model", "a/b", "--hook", "model.layers.{layer}", "--no-check-saelens", "--yes"]
    assert hubsae(monkeypatch, "push", str(seeds), "me/second", *about) == 0
    assert len(list_saes("me/second")) == 4
    assert hubsae(monkeypatch, "push", str(seeds), "me/second", "--repo-id", "me/other", *about) == 2
    out = tmp_path / "theirs"
    id = "saes_k64/ppo_step10/layer12"
    assert hubsae(monkeypatch, "convert", f"me/second@main/{id}", str(out), "--to", "raw") == 0
    assert any(out.iterdir()) and "topk" in capsys.readouterr().out
    assert hubsae(monkeypatch, "convert", str(seeds / "sae_ppo_step10_layer12.pt"), str(tmp_path / "local")) == 0
    here, there = HubSAE.from_pretrained(tmp_path / "local"), HubSAE.from_pretrained("me/second", id)
    assert here.config.k == there.config.k == 4


def test_what_is_no_folder_and_no_repo_is_said_so_at_once(hub: LocalHub, tmp_path: Path):
    before = len(hub.requests)
    with pytest.raises(HubSAEError, match="there is no folder or file"):
        push(tmp_path / "nowhere", "me/x", **ABOUT)
    assert len(hub.requests) == before
    with pytest.raises(HubSAEError, match="which repo"):
        push(HubSAE.from_pretrained(_saved(tmp_path)))


def _saved(folder: Path) -> str:
    from hubsae import SAEConfig

    HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2)).save_pretrained(folder / "saved")
    return str(folder / "saved")


# -- what is read and written how often --------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was hashed, by name."""
    import hashlib

    seen: Counter[str] = Counter()
    original = hashlib.file_digest

    def digest(file: io.BufferedReader, name: str):
        seen[os.path.basename(os.path.dirname(file.name)) + "/" + os.path.basename(file.name)] += 1
        return original(file, name)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return seen


def test_packaged_bytes_are_hashed_once(hub: LocalHub, seeds: Path, hashed: Counter[str]):
    push(seeds, "me/hashed", dry_run=True, **ABOUT)
    weights = {name: count for name, count in hashed.items() if name.endswith((".safetensors", ".pt"))}
    assert len(weights) == 6 and set(weights.values()) <= {1, 2}
    assert all(count == 1 for name, count in weights.items() if name.endswith(".pt"))
    # layer6 and layer12 exist for two stages each
    assert all(count == 2 for name, count in weights.items() if name.endswith(".safetensors"))


def test_recording_a_metric_reads_no_weights(release: Release, hashed: Counter[str]):
    id = release.ids[1]
    record_metrics(release, {id: [Metric(name="fvu", value=0.25)]})
    assert hashed == {f"{Path(id).name}/metadata.json": 1}
    assert Release.open(release.path).entry(id).metrics == {"fvu": 0.25}
    release.verify()


def test_the_manifest_of_a_package_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = seed_folder(tmp_path / "many", tuple(range(8)))
    written: list[str] = []
    original = os.replace

    def replace(old, new):
        written.append(os.path.basename(new))
        original(old, new)

    monkeypatch.setattr(os, "replace", replace)
    package(source, tmp_path / "release", **SPEC)
    # one that is empty when the folder is made, and the one that counts
    assert written.count("config.json") == 2 and written.count("metadata.json") == 16
