"""Publishing: one commit, nothing lost, nothing twice; and the options of a push."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hubsae import HubSAE, Metadata, SAEConfig, list_saes, push
from hubsae.activations.convert import convert
from hubsae.core.errors import ConfigError, FormatError, HubSAEError
from hubsae.formats import Release, package
from hubsae.hub.client import HubClient
from hubsae.hub.errors import RepoNotFoundError
from hubsae.hub.trial import Activations
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder, titles


def test_a_raw_folder_becomes_a_release_in_one_commit(hub: LocalHub, seeds: Path):
    result = push(seeds, "me/raw", **ABOUT)
    assert result.committed and titles("me/raw") == ["Publish 4 SAEs (saes_k64)", "initial commit"]
    tree = HubClient().tree("me/raw")
    folder = "saes_k64/ppo_step10/layer12"
    assert {"README.md", "config.json", f"{folder}/cfg.json", f"{folder}/metadata.json"} <= set(tree)
    assert not [path for path in tree if path.endswith(".pt")]
    assert tree[f"{folder}/sae_weights.safetensors"].sha256


def test_the_default_repo_is_you_and_the_folder(hub: LocalHub, tmp_path: Path):
    source = seed_folder(tmp_path / "named_by_folder", (6,), ("instruct_base",))
    assert push(source, **ABOUT).plan.repo_id == "me/named_by_folder"


def test_an_unchanged_push_makes_no_commit(hub: LocalHub, seeds: Path):
    first = push(seeds, "me/unchanged", **ABOUT)
    again = push(seeds, "me/unchanged", **ABOUT)
    assert not again.committed and again.commit == first.commit
    assert len(titles("me/unchanged")) == 2


def test_a_dry_run_publishes_nothing_and_says_what_it_would_do(hub: LocalHub, seeds: Path):
    result = push(seeds, "me/dry", dry_run=True, **ABOUT)
    assert result.published is None and "a new public repo" in result.plan.summary()[0]
    assert [row.read_as for row in result.plan.rows] == ["rl_chain"] * 4
    with pytest.raises(RepoNotFoundError):
        HubClient().head("me/dry")


def test_declining_the_plan_publishes_nothing(hub: LocalHub, seeds: Path):
    assert push(seeds, "me/declined", confirm=lambda plan: False, **ABOUT).published is None
    with pytest.raises(RepoNotFoundError):
        HubClient().head("me/declined")


def test_only_what_changed_is_sent(hub: LocalHub, seeds: Path):
    push(seeds, "me/partly", **ABOUT)
    seed_folder(seeds, (12,), ("ppo_step10",), seed=9)
    result = push(seeds, "me/partly", **ABOUT)
    changed = {file.path for file in result.plan.diff.changed}
    assert "saes_k64/ppo_step10/layer12/sae_weights.safetensors" in changed
    assert "saes_k64/ppo_step10/layer6/sae_weights.safetensors" not in changed
    assert {row.id: row.on_hub for row in result.plan.rows}["saes_k64/ppo_step10/layer6"] == "same"


def test_a_second_folder_adds_to_the_repo(hub: LocalHub, seeds: Path, tmp_path: Path):
    push(seeds, "me/two", **ABOUT)
    other = seed_folder(tmp_path / "saes_l23_k256", (23,), ("instruct_base",), k=8)
    result = push(other, "me/two", **ABOUT)
    assert len(result.plan.kept) == 4
    assert len(list_saes("me/two")) == 5
    card = HubClient().download("me/two", "README.md", force=True).read_text()
    assert "saes_l23_k256/instruct_base/layer23" in card and "saes_k64/instruct_base/layer6" in card


def test_prune_deletes_what_this_release_does_not_have(hub: LocalHub, seeds: Path, tmp_path: Path):
    push(seeds, "me/pruned", **ABOUT)
    other = seed_folder(tmp_path / "new", (23,), ("instruct_base",))
    push(other, "me/pruned", prune=True, **ABOUT)
    assert [row["id"] for row in list_saes("me/pruned")] == ["new/instruct_base/layer23"]
    assert not [path for path in HubClient().tree("me/pruned") if path.startswith("saes_k64/")]


def test_old_pickles_go_in_the_same_commit(hub: LocalHub, seeds: Path):
    client = HubClient()
    client.ensure_repo("me/migrated")
    client.api.upload_folder(repo_id="me/migrated", folder_path=seeds, path_in_repo="saes_k64")
    before = len(titles("me/migrated"))
    push(seeds, "me/migrated", delete=["*.pt"], **ABOUT)
    assert len(titles("me/migrated")) == before + 1
    assert not [path for path in client.tree("me/migrated") if path.endswith(".pt")]


def test_a_persons_readme_keeps_its_text(hub: LocalHub, seeds: Path):
    client = HubClient()
    client.ensure_repo("me/written")
    mine = b"---\nlicense: mit\ntags:\n- mine\n---\n# My chain\n\nWhat I found, in my words.\n"
    client.api.upload_file(path_or_fileobj=mine, path_in_repo="README.md", repo_id="me/written")
    push(seeds, "me/written", **ABOUT)
    text = client.download("me/written", "README.md").read_text()
    assert "What I found, in my words." in text and "license: mit" in text and "- mine" in text
    assert text.index("What I found") < text.index("## Contents")


def test_tag_and_branch(hub: LocalHub, seeds: Path):
    result = push(seeds, "me/tagged", tag="v1.0", revision="exp", **ABOUT)
    client = HubClient()
    assert client.tags("me/tagged") == {"v1.0": result.commit}
    assert titles("me/tagged") == ["initial commit"]
    assert HubSAE.from_pretrained("me/tagged@v1.0", layer=6, stage="ppo_step10").d_sae == 64
    assert push(seeds, "me/tagged", tag="v1.0", revision="exp", **ABOUT).commit == result.commit
    seed_folder(seeds, (6,), ("ppo_step10",), seed=4)
    with pytest.raises(HubSAEError, match=r"tag 'v1.0' already"):
        push(seeds, "me/tagged", tag="v1.0", revision="exp", **ABOUT)
    assert len(titles("me/tagged", "exp")) == 2, "a tag that cannot be given is found before the upload"


def test_a_pull_request_is_proposed_once(hub: LocalHub, seeds: Path, use):
    push(seeds, "me/proposed", **ABOUT)
    seed_folder(seeds, (6,), ("ppo_step10",), seed=4)
    use(hub, token="hf_other")
    first = push(seeds, "me/proposed", pr=True, **ABOUT)
    again = push(seeds, "me/proposed", pr=True, **ABOUT)
    assert first.published is not None and first.published.revision == "refs/pr/1"
    assert again.url == first.url and not again.committed
    discussions = list(HubClient().api.get_repo_discussions("me/proposed"))
    assert [d.status for d in discussions] == ["open"]
    assert len(titles("me/proposed")) == 2
    assert HubSAE.from_pretrained("me/proposed", layer=6, stage="ppo_step10", revision="refs/pr/1").d_in == 16


def test_a_live_sae_goes_to_the_root_of_its_repo(hub: LocalHub, one: HubSAE):
    result = one.push_to_hub("me/single", license="mit", check_saelens=False)
    assert result.committed
    back = HubSAE.from_pretrained("me/single")
    x = torch.randn(8, 16)
    assert torch.equal(back(x), one(x))
    assert {"cfg.json", "sae_weights.safetensors", "config.json"} <= set(HubClient().tree("me/single"))


def test_a_release_and_a_run_folder(hub: LocalHub, seeds: Path, tmp_path: Path):
    spec = {name: ABOUT[name] for name in ("base_model", "hook", "license")}
    release = package(seeds, tmp_path / "run" / "release", **spec)
    release.add_results("eval", [{"stage": "ppo_step10", "nmse": 0.1}])
    before = {p: p.read_bytes() for p in release.path.rglob("*") if p.is_file()}
    assert push(release.path, "me/release", check_saelens=False).committed
    assert not push(tmp_path / "run", "me/release", check_saelens=False).committed
    assert {p: p.read_bytes() for p in release.path.rglob("*") if p.is_file()} == before
    assert "results/eval.csv" in HubClient().tree("me/release")
    assert "nmse" in HubClient().download("me/release", "README.md").read_text()


def test_a_release_that_was_changed_after_packaging_is_refused(hub: LocalHub, seeds: Path, tmp_path: Path):
    release = package(seeds, tmp_path / "release", base_model="a/b", hook="model.layers.{layer}")
    file = release.folder(release.ids[0]) / "cfg.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(FormatError, match=r"the file that config\.json lists"):
        push(release.path, "me/changed", check_saelens=False)


def test_further_formats_and_the_sources(hub: LocalHub, tmp_path: Path):
    source = seed_folder(tmp_path / "saes", (6,), ("instruct_base",))
    options = {"also": ["pt", "sparsify"], "keep_source": True, "choices": {"topk_relu": True}}
    result = push(source, "me/also", **options, **ABOUT)
    tree = HubClient().tree("me/also")
    assert "saes/instruct_base/layer6/model.pt" in tree and "saes/instruct_base/layer6/sae.safetensors" in tree
    assert "source/sae_instruct_base_layer6.pt" in tree
    assert any("pickle" in note for note in result.plan.notes)
    assert not push(source, "me/also", **options, **ABOUT).committed


def test_a_batch_topk_gets_a_threshold_from_activations(hub: LocalHub, tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    decoder = torch.randn(64, 16, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    state = {"b_pre": torch.zeros(16), "encoder.weight": decoder, "encoder.bias": torch.zeros(64),
             "decoder.weight": decoder.t().contiguous(), "decoder.bias": torch.zeros(16)}  # fmt: skip
    folder = tmp_path / "grid"
    folder.mkdir()
    torch.save(state, folder / "BatchTopK_exp4x_k8.pt")
    acts = tmp_path / "acts.pt"
    torch.save(torch.randn(2048, 16, generator=generator), acts)
    about = {**ABOUT, "hook": "model.layers.12"}
    without = push(folder, "me/grid", dry_run=True, **about)
    assert any("no inference threshold" in note for note in without.plan.notes)
    result = push(folder, "me/grid", activations=acts, **about)
    sae = HubSAE.from_pretrained("me/grid")
    assert sae.config.threshold is not None
    said = next(note for note in result.plan.notes if "L0" in note)
    assert "MSE" in said and "batch rule" in said
    assert result.plan.rows[0].check.l0 == pytest.approx(8, rel=0.05)


def test_an_sae_is_not_checked_on_activations_of_another_place_in_its_block(tmp_path: Path):
    torch.save(torch.randn(64, 8), tmp_path / "acts.pt")
    convert(tmp_path / "acts.pt", tmp_path / "acts", config="layers.3")
    given = Activations(tmp_path / "acts")
    record = Metadata(config=SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2))
    record.hook.layer = 3
    vectors = given.of(record, only_place=False)
    assert vectors is not None and vectors.shape == (64, 8)
    record.hook.kind = "mlp_out"
    assert given.of(record, only_place=False) is None
    record.hook.kind, record.hook.layer = "resid_post", 4
    assert given.of(record, only_place=False) is None


def test_signed_top_k_is_told_with_numbers(hub: LocalHub, tmp_path: Path):
    source = seed_folder(tmp_path / "signed", (6,), ("instruct_base",))
    acts = torch.randn(512, 16)
    result = push(source, "me/signed", activations=acts, dry_run=True, **ABOUT)
    assert any("no negative latent is selected" in note and "topk_relu=true" in note for note in result.plan.notes)
    all_negative = seed_folder(tmp_path / "negative", (6,), ("instruct_base",), k=60)
    result = push(all_negative, "me/signed", activations=acts, dry_run=True, **ABOUT)
    assert any("the sign matters" in note for note in result.plan.notes)


def test_a_repo_of_another_kind_is_not_overwritten(hub: LocalHub, seeds: Path):
    client = HubClient()
    client.ensure_repo("me/model")
    config = json.dumps({"model_type": "qwen2"}).encode()
    client.api.upload_file(path_or_fileobj=config, path_in_repo="config.json", repo_id="me/model")
    with pytest.raises(HubSAEError, match="not a release manifest"):
        push(seeds, "me/model", **ABOUT)
    assert push(seeds, "me/model", overwrite_config=True, **ABOUT).committed


def test_what_cannot_be_known_is_asked_for_before_anything_is_sent(hub: LocalHub, seeds: Path):
    requests = len(hub.requests)
    with pytest.raises(ConfigError, match="--base-model, --hook"):
        push(seeds, "me/unknown", check_saelens=False)
    with pytest.raises(ConfigError, match="push has no option 'privat'"):
        push(seeds, "me/unknown", privat=True)
    assert not [r for r in hub.requests[requests:] if r[0] != "GET"]


def test_staging_is_removed(hub: LocalHub, seeds: Path, tmp_path: Path):
    push(seeds, "me/tidy", dry_run=True, **ABOUT)
    assert list((tmp_path / "hf" / "hubsae" / "staging").iterdir()) == []


def test_720_files_are_one_commit(lfs_hub: LocalHub, tmp_path: Path, one: HubSAE):
    release = Release.create(tmp_path / "many", name="many", base_model="a/b")
    entry = release.add(one, "many/layer0")
    for i in range(1, 240):
        shutil.copytree(release.folder("many/layer0"), release.path / f"many/layer{i}")
    ids = [f"many/layer{i}" for i in range(240)]
    release.manifest.saes = [entry.model_copy(update={"id": id, "path": id}) for id in ids]
    release.refresh()
    requests = len(lfs_hub.requests)
    push(release.path, "me/many", check_saelens=False)
    assert len(HubClient().tree("me/many")) >= 722
    assert len(titles("me/many")) == 2
    assert len([r for r in lfs_hub.requests[requests:] if r[0] == "POST" and "/commit/" in r[1]]) == 1
