"""Folders of SAE files become releases; releases are opened, changed and checked."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import ConfigError, FormatError, MetadataError, NotFoundError
from hubsae.core.metadata import Metric
from hubsae.formats import Manifest, Release, package, plan, read, write
from hubsae.formats.manifest import ManifestWarning
from hubsae.formats.package import PackageWarning
from hubsae.formats.spec import PackageSpec

BASE = "Qwen/Qwen2.5-0.5B-Instruct"


def chain_file(path, seed, d_in=16, d_sae=64, k=4):
    g = torch.Generator().manual_seed(seed)
    state = {
        "b_pre": torch.randn(d_in, generator=g), "encoder.weight": torch.randn(d_sae, d_in, generator=g),
        "encoder.bias": torch.randn(d_sae, generator=g), "decoder.weight": torch.randn(d_in, d_sae, generator=g),
        "decoder.bias": torch.randn(d_in, generator=g),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "config": {"d_model": d_in, "d_sae": d_sae, "k": k}}, path)


@pytest.fixture
def chains(tmp_path):
    folder = tmp_path / "saes_k64"
    for i, (stage, layer) in enumerate((s, n) for s in ("instruct_base", "ppo_step116") for n in (6, 18)):
        chain_file(folder / f"sae_{stage}_layer{layer}.pt", i)
    return folder


def test_folder_of_checkpoints_becomes_a_release(chains, tmp_path):
    (chains / "results.csv").write_text("layer,mse\n6,0.02\n")
    (chains / "mse.png").write_bytes(b"\x89PNG")
    (chains / "notes.txt").write_text("not a tensor")
    release = package(chains, tmp_path / "release", base_model=BASE, license="apache-2.0", datasets=["openai/gsm8k"])
    assert release.ids == [f"saes_k64/{s}/layer{n}" for s in ("instruct_base", "ppo_step116") for n in (6, 18)]
    entry = release.entry(layer=18, stage="ppo_step116")
    assert (entry.architecture, entry.k, entry.d_sae, entry.base_model) == ("topk", 4, 64, BASE)
    assert entry.hook_point == "model.layers.18"
    assert [p.name for p in release.results] == ["results.csv"] and [p.name for p in release.plots] == ["mse.png"]
    assert {f.path for f in release.manifest.files} == {"results/results.csv", "plots/mse.png"}
    release.verify()
    x = torch.randn(40, 16)
    for e in release:
        source = chains / f"sae_{e.stage}_layer{e.layer}.pt"
        assert torch.equal(release.load(e.id).encode(x), read(source).encode(x))
        record = release.metadata(e.id)
        assert record.provenance.source_file == source.name and len(record.provenance.source_sha256) == 64
        assert record.id == e.id
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "scratch folders must be gone"


def test_packaging_twice_gives_the_same_bytes(chains, tmp_path):
    a = package(chains, tmp_path / "a", base_model=BASE)
    b = package(chains, tmp_path / "b", base_model=BASE)
    files = sorted(p.relative_to(a.path) for p in a.path.rglob("*") if p.is_file())
    assert all((a.path / f).read_bytes() == (b.path / f).read_bytes() for f in files) and len(files) == 13


def test_what_is_not_known_is_asked_for_before_anything_is_written(chains, tmp_path):
    with pytest.raises(ConfigError, match="the base model cannot be known") as caught:
        package(chains, tmp_path / "release")
    assert "hubsae.yaml" in caught.value.hint and "--base-model" in caught.value.hint
    assert not (tmp_path / "release").exists() and len(list(tmp_path.iterdir())) == 1
    folder = tmp_path / "plain"
    write(HubSAE.random(SAEConfig(architecture="relu", d_in=4, d_sae=8)), folder / "mine.pt", "pt")
    with pytest.raises(ConfigError, match="the hook point"):
        package(folder, tmp_path / "release", base_model=BASE)
    done = package(folder, tmp_path / "release", base_model=BASE, hook="model.layers.3.mlp")
    assert done.metadata("plain/mine").hook.transformer_lens == "blocks.3.hook_mlp_out"


def test_hubsae_yaml_beside_the_files(chains, tmp_path):
    chain_file(chains / "sae_ppo_step116_layer23.pt", 9, k=8)
    torch.save(torch.zeros(3), chains / "acts_val.pt")
    (chains / "hubsae.yaml").write_text(
        textwrap.dedent(f"""
        name: my-chains
        base_model: {BASE}
        base_model_revision: abc123
        license: apache-2.0
        training: {{optimizer: adam, lr: 1.0e-4}}
        files:
          "*_layer23.pt": {{stage: final, choices: {{topk_relu: true}}}}
          "sae_instruct_base_*.pt": {{skip: true}}
        """)
    )
    with pytest.warns(PackageWarning, match="acts_val.pt"):
        release = package(chains, tmp_path / "release")
    assert release.name == "my-chains"
    assert release.ids == ["my-chains/final/layer23", "my-chains/ppo_step116/layer6", "my-chains/ppo_step116/layer18"]
    record = release.metadata("my-chains/final/layer23")
    assert (record.config.topk_relu, record.base_model.revision, record.training.lr) == (True, "abc123", 1e-4)
    assert release.load("my-chains/ppo_step116/layer6").config.topk_relu is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_modle: x", "base_modle"),
        ("choices: {kk: 3}", "kk"),
        ("- a\n- b", "mapping"),
        ("a: [", "YAML"),
        ("a: b: c", "line 1"),
    ],
)
def test_hubsae_yaml_with_a_mistake_is_named(chains, tmp_path, text, message):
    (chains / "hubsae.yaml").write_text(text)
    with pytest.raises((ConfigError, FormatError), match=message):
        plan(chains)


def test_an_empty_hubsae_yaml_says_nothing(tmp_path):
    (tmp_path / "hubsae.yaml").touch()
    assert PackageSpec.read(tmp_path / "hubsae.yaml") == PackageSpec.beside(tmp_path) == PackageSpec()


def test_pattern_for_other_naming_schemes(tmp_path):
    for stage, layer in (("early", 3), ("late", 11)):
        chain_file(tmp_path / "runs" / stage / f"L{layer}-k4.pt", layer)
    chain_file(tmp_path / "runs" / "scratch.pt", 0)
    with pytest.warns(PackageWarning, match="does not follow the pattern"):
        release = package(tmp_path / "runs", tmp_path / "out", base_model=BASE, pattern="{stage}/L{layer}-k{k}.pt")
    assert {(e.stage, e.layer, e.k) for e in release} == {("early", 3, 4), ("late", 11, 4)}
    with pytest.raises(ConfigError, match=r"unknown field \{step\}"):
        package(tmp_path / "runs", tmp_path / "out2", pattern="{step}.pt")


def test_grid_names_stay_recognisable_and_folders_keep_their_place(tmp_path):
    g = torch.Generator().manual_seed(0)
    for name in ("BatchTopK_exp4x_k4.pt", "TopK_exp4x_k4.pt"):
        state = {"b_pre": torch.randn(16, generator=g), "encoder.weight": torch.randn(64, 16, generator=g),
                 "encoder.bias": torch.randn(64, generator=g), "decoder.weight": torch.randn(16, 64, generator=g),
                 "decoder.bias": torch.randn(16, generator=g)}  # fmt: skip
        (tmp_path / "grid").mkdir(exist_ok=True)
        torch.save(state, tmp_path / "grid" / name)
    write(
        HubSAE.random(SAEConfig(architecture="topk", d_in=16, d_sae=64, k=4)),
        tmp_path / "grid" / "layers.5",
        "sparsify",
    )
    with pytest.warns(UserWarning, match="depend on it"):
        release = package(tmp_path / "grid", tmp_path / "out", base_model=BASE, hook="model.layers.12")
    assert set(release.ids) == {"grid/BatchTopK_exp4x_k4", "grid/TopK_exp4x_k4", "grid/layers.5"}
    assert {e.architecture for e in release} == {"batch_topk", "topk"}


def test_mixed_widths_need_to_be_wanted(chains, tmp_path):
    chain_file(chains / "sae_other_layer6.pt", 5, d_in=24)
    with pytest.raises(FormatError, match=r"expected d_in 16 as in .* found d_in 24"):
        package(chains, tmp_path / "release", base_model=BASE)
    assert len(package(chains, tmp_path / "release", base_model=BASE, mixed_widths=True)) == 5


def test_failure_in_the_middle_leaves_the_old_release(chains, tmp_path):
    package(chains, tmp_path / "release", base_model=BASE)
    before = (tmp_path / "release" / "config.json").read_bytes()
    broken = torch.load(chains / "sae_ppo_step116_layer18.pt", weights_only=True)
    broken["state_dict"]["decoder.weight"][0, 0] = float("nan")
    torch.save(broken, chains / "sae_ppo_step116_layer18.pt")
    with pytest.raises(FormatError, match="finite numbers in W_dec"):
        package(chains, tmp_path / "release", base_model=BASE, overwrite=True)
    assert (tmp_path / "release" / "config.json").read_bytes() == before
    Release.open(tmp_path / "release").verify()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_overwriting_keeps_the_card_results_and_plots(chains, tmp_path):
    release = package(chains, tmp_path / "release", base_model=BASE)
    (release.path / "README.md").write_text("edited by a person")
    release.add_results("eval", [{"layer": 6, "mse": 0.1}])
    release.add_plot("a.png", b"\x89PNG")
    with pytest.raises(FormatError, match="one with files in it"):
        package(chains, tmp_path / "release", base_model=BASE)
    again = package(chains, tmp_path / "release", base_model=BASE, overwrite=True)
    assert (again.path / "README.md").read_text() == "edited by a person"
    assert {f.path for f in again.manifest.files} == {"results/eval.csv", "plots/a.png"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(FormatError, match="a release to overwrite"):
        package(chains, tmp_path / "mine", base_model=BASE, overwrite=True)
    with pytest.raises(ConfigError, match="lies inside"):
        package(chains, chains / "out", base_model=BASE)


def test_single_file_and_a_release_itself(chains, tmp_path):
    one = package(chains / "sae_instruct_base_layer6.pt", tmp_path / "one", base_model=BASE)
    assert one.ids == ["instruct_base/layer6"] or one.ids == ["sae_instruct_base_layer6"]
    with pytest.raises(FormatError, match="found a release"):
        plan(one.path)


def test_release_is_chosen_from_by_what_is_known(chains, tmp_path):
    release = package(chains, tmp_path / "release", base_model=BASE)
    assert release.load("saes_k64/ppo_step116/layer6").config.k == 4
    assert {e.layer for e in release.select(stage="ppo_step116")} == {6, 18}
    assert len(release.select(layer=[6, 18])) == 4
    with pytest.raises(NotFoundError, match="which one") as caught:
        release.entry(layer=6)
    assert "saes_k64/instruct_base/layer6" in caught.value.message
    with pytest.raises(NotFoundError, match=r"no SAE of .* fits layer=7") as caught:
        release.entry(layer=7)
    assert "6, 18" in caught.value.hint
    with pytest.raises(NotFoundError) as caught:
        release.entry("saes_k64/ppo_step116/layer66")
    assert "layer6" in caught.value.hint


def test_release_grows_and_is_refreshed(tmp_path):
    release = Release.create(tmp_path / "r", name="r", base_model=BASE)
    sae = HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=32, k=2))
    release.add(sae, "a/layer1", also=["sparsify"])
    release.add(sae, "a/layer2")
    record = release.metadata("a/layer1")
    record.set_metrics([Metric(name="mse", value=0.25), Metric(name="mse", value=0.5, scope="no_position_0")])
    record.save(release.folder("a/layer1"))
    with pytest.raises(FormatError, match="bytes as the manifest says"):
        release.verify()
    release.refresh().verify()
    assert release.entry("a/layer1").metrics == {"mse": 0.25, "mse@no_position_0": 0.5}
    release.add(HubSAE.random(sae.config, seed=1), "a/layer1")
    assert release.ids == ["a/layer1", "a/layer2"]
    assert not (release.folder("a/layer1") / "sae.safetensors").exists(), "weights of the old SAE must not stay behind"
    reopened = Release.open(tmp_path / "r")
    assert reopened.manifest == release.manifest
    with pytest.raises(FormatError, match="one with a manifest"):
        Release.create(tmp_path / "r", name="again")


def test_release_with_its_only_sae_at_the_root(tmp_path):
    release = Release.create(tmp_path / "r", name="r", base_model=BASE)
    release.add(HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=32, k=2)), ".")
    (tmp_path / "r" / "README.md").write_text("card")
    release.refresh().verify()
    assert {f.path for f in release.entry(".").files} == {"cfg.json", "metadata.json", "sae_weights.safetensors"}
    assert Release.open(tmp_path / "r").load().d_sae == 32


def test_manifest_from_the_future_is_kept_and_a_broken_one_named(tmp_path):
    release = Release.create(tmp_path / "r", name="r")
    release.add(HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=32, k=2)), "a")
    data = json.loads((tmp_path / "r" / "config.json").read_text())
    future = data | {"format_version": 7, "signature": "xyz"}
    future["saes"][0]["quantised"] = True
    (tmp_path / "r" / "config.json").write_text(json.dumps(future))
    with pytest.warns(ManifestWarning, match="format version 7") as caught:
        opened = Release.open(tmp_path / "r")
    assert len(caught) == 1
    with pytest.warns(ManifestWarning):
        opened.refresh()
        kept = json.loads((tmp_path / "r" / "config.json").read_text())
        Manifest.read(tmp_path / "r")
    assert kept["signature"] == "xyz" and kept["saes"][0]["quantised"] is True and kept["format_version"] == 7
    del data["saes"][0]["d_in"]
    (tmp_path / "r" / "config.json").write_text(json.dumps(data))
    with pytest.raises(MetadataError, match=r"saes\.0\.d_in"):
        Release.open(tmp_path / "r")


MEMORY = """
import resource, sys, torch
from pathlib import Path
from hubsae.formats import package
torch.set_num_threads(1)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
release = package(sys.argv[1], sys.argv[2], base_model="a/b")
print(len(release), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024)
"""


@pytest.mark.parametrize("count", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_packaging_streams_within_four_times_one_sae(count, tmp_path):
    """d_in 896, d_sae 7168: 51 MB each. The peak must not grow with the number of files."""
    one = 4 * (2 * 896 * 7168 + 7168 + 2 * 896)
    chain_file(tmp_path / "saes" / "sae_base_layer0.pt", 0, d_in=896, d_sae=7168, k=64)
    for layer in range(1, count):
        # links to one file keep the disk small; each is read as a file of its own
        (tmp_path / "saes" / f"sae_base_layer{layer}.pt").hardlink_to(tmp_path / "saes" / "sae_base_layer0.pt")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "saes"), str(tmp_path / "release")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    number, peak = (int(v) for v in done.stdout.split())
    assert number == count
    assert peak <= 4 * one, f"peak {peak / one:.2f} times one SAE"
