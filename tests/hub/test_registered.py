"""Releases by the names that SAELens registers: the SAE that SAELens' own loader gives, and its record."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hubsae import HubSAE, list_saes, localhub
from hubsae.core.errors import NotFoundError, SAENotFoundError
from hubsae.hub import registered
from hubsae.hub.client import HubClient
from hubsae.hub.find import find_saes
from hubsae.localhub.settings import Token

pytest.importorskip("sae_lens")

D, S = 16, 48
OWNERS = ("google", "JoshEngels", "tommmcgrath", "jbloom")


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[localhub.LocalHub]:
    """A hub on which the owners of registered repos have tokens."""
    tokens = [Token.parse(f"{name}=hf_{name}") for name in OWNERS]
    with localhub.running(root=tmp_path_factory.mktemp("hub"), tokens=tokens) as hub:
        yield hub


def put(folder: Path, repo: str, message: str = "as registered") -> str:
    """Upload a folder as the owner of the repo; the commit."""
    client = HubClient(token=f"hf_{repo.partition('/')[0]}")
    client.ensure_repo(repo)
    return client.api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).oid


def saelens_folder(folder: Path, seed: int, **about: object) -> Path:
    """An SAE in SAELens' layout of before 6.0, as the registered repos have it."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(D, S, generator=g), "b_enc": torch.randn(S, generator=g) * 0.1,
        "W_dec": torch.randn(S, D, generator=g), "b_dec": torch.randn(D, generator=g),
    }  # fmt: skip
    save_file(tensors, folder / "sae_weights.safetensors")
    cfg = {
        "architecture": "standard", "d_in": D, "d_sae": S, "dtype": "float32", "device": "cpu",
        "activation_fn_str": "relu",
        "context_size": 128, "prepend_bos": True, "dataset_path": "NeelNanda/c4-10k", "hook_head_index": None,
        "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "sae_lens_training_version": None,
        "normalize_activations": "none", **about,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


SAELENS = """
import sys, torch
from sae_lens import SAE
wanted, x = torch.load(sys.argv[1])
answers = []
for release, id in wanted:
    sae = SAE.from_pretrained(release, id)
    with torch.no_grad():
        z = sae.encode(x)
        answers.append((z, sae(x)))
torch.save(answers, sys.argv[2])
"""

CASES = {
    "a norm for every token": (
        "mistral-7b-res-wg", "blocks.16.hook_resid_pre", {"model_name": "mistral-7b", "hook_layer": 16}, {},
    ),
    "a norm factor": (
        "gpt2-small-mlp-tm", "blocks.3.hook_mlp_out",
        {"model_name": "gpt2-small", "hook_layer": 3, "normalize_activations": "expected_average_only_in"},
        {"token_norm": "none"},
    ),
}  # fmt: skip


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.filterwarnings("error::hubsae.formats.base.ReadWarning")
def test_a_registered_sae_is_the_one_that_saelens_loads(owners, use, tmp_path):
    places, commits = {}, {}
    for name, (release, id, about, _) in CASES.items():
        (places[name],) = (s for s in registered.release(release).saes if s.id == id)
        use(owners, token=f"hf_{places[name].repo_id.partition('/')[0]}")
        saelens_folder(tmp_path / release / places[name].path, seed=3, hook_name=id, **about)
        commits[name] = put(tmp_path / release, places[name].repo_id)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(1)) * 7
    torch.save(([(release, id) for release, id, _, _ in CASES.values()], x), tmp_path / "wanted.pt")
    # in a process of its own, so that it asks this hub
    command = [sys.executable, "-c", SAELENS, str(tmp_path / "wanted.pt"), str(tmp_path / "answers.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for (name, (release, id, _, alone)), (z, x_hat) in zip(
        CASES.items(), torch.load(tmp_path / "answers.pt"), strict=True
    ):
        sae, place = HubSAE.from_pretrained(release, id), places[name]
        assert difference(sae.encode(x), z) < 1e-6, name
        assert difference(sae(x), x_hat) < 1e-6, name
        # without the register the files alone give another function
        other = HubSAE.from_pretrained(place.repo_id, place.path, **alone)
        assert difference(other.encode(x), z) > 1e-2, name
        told = sae.metadata.provenance.registered
        assert told is not None and told["commit"] == commits[name]
        assert (told["release"], told["id"], told["repo"], told["path"]) == (release, id, place.repo_id, place.path)
    assert told["norm_scaling_factor"] == place.norm_factor


def test_factor_overrides_and_dashboard_are_kept_in_the_record(owners, use, tmp_path):
    use(owners, token="hf_jbloom")
    path = "blocks.8.hook_resid_pre"
    about = {"model_name": "gpt2-small", "hook_name": path, "hook_layer": 8}
    saelens_folder(tmp_path / "repo" / path, seed=4, **about)
    first = put(tmp_path / "repo", "jbloom/GPT2-Small-SAEs-Reformatted")
    saelens_folder(tmp_path / "later" / path, seed=5, **about)
    put(tmp_path / "later", "jbloom/GPT2-Small-SAEs-Reformatted", "later")
    # at a pinned commit
    sae = HubSAE.from_pretrained(f"gpt2-small-res-jb@{first}", layer=8)
    expected = HubSAE.from_pretrained(tmp_path / "repo" / path)
    assert torch.equal(sae.W_enc, expected.W_enc)
    sae.save_pretrained(tmp_path / "kept")
    again = HubSAE.from_pretrained(tmp_path / "kept").to_saelens().cfg.metadata
    assert again.neuronpedia_id == "gpt2-small/8-res-jb"
    assert again.model_from_pretrained_kwargs == {"center_writing_weights": True}
    assert sae.metadata.base_model.id == "openai-community/gpt2"
    with pytest.raises(SAENotFoundError, match=r"nearest: .*blocks\.9\.hook_resid_pre"):
        HubSAE.from_pretrained("gpt2-small-res-jb", "blocks.99.hook_resid_pre")
    # registered, but what this hub has of the repo lacks it
    with pytest.raises(NotFoundError, match=r"registered at blocks\.9\.hook_resid_pre of jbloom/GPT2"):
        HubSAE.from_pretrained("gpt2-small-res-jb", "blocks.9.hook_resid_pre")


def test_a_canonical_gemma_scope_sae_by_name(owners, use, tmp_path):
    use(owners, token="hf_google")
    g = np.random.default_rng(0)
    tensors = {
        "W_enc": g.normal(size=(D, S)), "W_dec": g.normal(size=(S, D)), "b_enc": g.normal(size=S),
        "b_dec": g.normal(size=D), "threshold": g.uniform(0.1, 1, size=S),
    }  # fmt: skip
    saes = registered.release("gemma-scope-2b-pt-res-canonical").saes
    (sae_at,) = (s.path for s in saes if s.id == CANONICAL)
    folder = tmp_path / "repo" / sae_at
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{k.lower() if k[0] == "W" else k: v.astype("f4") for k, v in tensors.items()})
    put(tmp_path / "repo", "google/gemma-scope-2b-pt-res")
    sae = HubSAE.from_pretrained("gemma-scope-2b-pt-res-canonical", CANONICAL)
    direct = HubSAE.from_pretrained("google/gemma-scope-2b-pt-res", sae_at)
    assert all(torch.equal(t, direct.state_dict()[name]) for name, t in sae.state_dict().items())
    assert sae.metadata.hook.transformer_lens == "blocks.20.hook_resid_post"
    assert sae.metadata.base_model.id == "google/gemma-2-2b"
    assert (sae.metadata.saelens or {})["metadata"]["neuronpedia_id"] == "gemma-2-2b/20-gemmascope-res-16k"
    listed = [row["id"] for row in list_saes("gemma-scope-2b-pt-res-canonical", layer=20)]
    assert CANONICAL in listed
    assert set(listed) == {s.id for s in saes if s.id.startswith("layer_20/")}


CANONICAL = "layer_20/width_16k/canonical"


def test_the_register_is_read_as_saelens_reads_it():
    from sae_lens.loading.pretrained_saes_directory import get_config_overrides, get_pretrained_saes_directory

    theirs = get_pretrained_saes_directory()
    assert [release.name for release in registered.releases()] == list(theirs)
    for release in registered.releases():
        other = theirs[release.name]
        assert (release.repo_id, release.model) == (other.repo_id, other.model)
        assert {s.id: s.path for s in release.saes} == other.saes_map
        assert {s.id: s.norm_factor for s in release.saes if s.norm_factor is not None} == other.norm_scaling_factor
    one = registered.release("gpt2-small-res-jb").saes[3]
    assert one.overrides == get_config_overrides("gpt2-small-res-jb", one.id)


def test_a_name_that_is_not_registered_gets_the_nearest(owners, use):
    use(owners)
    with pytest.raises(NotFoundError, match="registered release 'gemma-scope-2b-res-canonical'") as info:
        HubSAE.from_pretrained("gemma-scope-2b-res-canonical", CANONICAL)
    assert "gemma-scope-2b-pt-res-canonical" in str(info.value)


def test_without_saelens_the_hint_is_what_to_install(owners, use, monkeypatch):
    use(owners)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(NotFoundError, match=r"pip install 'hubsae\[saelens\]'"):
        HubSAE.from_pretrained("gemma-scope-2b-pt-res-canonical", CANONICAL)
    with pytest.raises(NotFoundError, match="no folder or file"):
        HubSAE.from_pretrained("missing.pt")


def test_names_are_resolved_without_importing_saelens():
    code = (
        "import sys; from hubsae.hub import registered; r = registered.release('mistral-7b-res-wg');"
        "print(len(r.saes), 'sae_lens' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]


def test_find_lists_registered_and_tagged_releases_of_a_model(owners, use, tmp_path):
    use(owners, token="hf_google")
    for name, model in (("a-sae", "google/gemma-2-2b"), ("another-sae", "google/gemma-2-9b")):
        folder = tmp_path / name
        folder.mkdir()
        card = f"---\nlibrary_name: hubsae\ntags: [sparse-autoencoder]\nbase_model: {model}\n---\n"
        (folder / "README.md").write_text(card)
        put(folder, f"google/{name}")
    found = find_saes("gemma-2-2b")
    assert found.base_model == "google/gemma-2-2b"
    releases = {row["name"]: row for row in found.registered}
    assert releases["gemma-scope-2b-pt-res-canonical"]["repo"] == "google/gemma-scope-2b-pt-res"
    assert not [name for name in releases if "9b" in name]
    assert [row["repo"] for row in found.tagged] == ["google/a-sae"]
    command = [sys.executable, "-m", "hubsae.cli.main", "find", "--base-model", "google/gemma-2-2b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gemma-scope-2b-pt-res-canonical" in done.stdout and "google/a-sae" in done.stdout
    assert "9b" not in done.stdout


def test_find_says_what_it_could_not_ask(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = find_saes("gemma-2-2b")
    assert (found.registered, found.tagged) == ([], [])
    assert "pip install 'hubsae[saelens]'" in found.notes[0] and "offline" in found.notes[1]
