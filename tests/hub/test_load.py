"""Loading: one commit, only the files needed, checked, from cache at the price of one HEAD."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hubsae import HubSAE, SAEConfig, list_saes, pull, push
from hubsae.core.errors import AmbiguousSAEError, ConfigError, SAENotFoundError
from hubsae.formats import Release
from hubsae.hub.client import HubClient
from hubsae.hub.errors import IntegrityError, OfflineError
from hubsae.hub.listing import describe
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder


@pytest.fixture
def chain(hub: LocalHub, seeds: Path) -> str:
    push(seeds, "me/chain", **ABOUT)
    return "me/chain"


def sent_since(hub: LocalHub, start: int) -> list[tuple[str, str, int]]:
    return hub.requests[start:]


def test_by_id_by_filters_and_by_revision(hub: LocalHub, chain: str):
    by_id = HubSAE.from_pretrained(chain, "saes_k64/ppo_step10/layer12")
    by_filter = HubSAE.from_pretrained(chain, layer=12, stage="ppo_step10", k=4)
    by_folder = HubSAE.from_pretrained(chain, subfolder="saes_k64/ppo_step10", layer=12)
    sha = HubClient().head(chain)
    by_sha = HubSAE.from_pretrained(f"{chain}@{sha}", "saes_k64/ppo_step10/layer12")
    for other in (by_filter, by_folder, by_sha):
        assert torch.equal(other.W_dec, by_id.W_dec)
    assert by_id.metadata.hook.module_path == "model.layers.12"


def test_a_load_from_cache_costs_one_head(hub: LocalHub, chain: str):
    HubSAE.from_pretrained(chain, layer=12, stage="ppo_step10")
    start = len(hub.requests)
    HubSAE.from_pretrained(chain, layer=12, stage="ppo_step10")
    assert [(method, path.partition("/resolve/")[2]) for method, path, _ in sent_since(hub, start)] == [
        ("HEAD", "main/config.json")
    ]
    start, sha = len(hub.requests), HubClient().head(chain)
    start = len(hub.requests)
    HubSAE.from_pretrained(f"{chain}@{sha}", layer=12, stage="ppo_step10")
    assert sent_since(hub, start) == [], "a full commit needs no request at all"


def test_a_first_load_fetches_one_sae(hub: LocalHub, tmp_path: Path, one: HubSAE):
    release = Release.create(tmp_path / "r", name="r", base_model="a/b")
    big = HubSAE.random(SAEConfig(architecture="topk", d_in=64, d_sae=1024, k=8))
    for i in range(24):
        release.add(big, f"r/layer{i}")
    push(release.path, "me/many", check_saelens=False)
    cache = tmp_path / "fresh"
    HubSAE.from_pretrained("me/many", "r/layer7", cache_dir=cache)
    files = [p for p in cache.rglob("*") if p.is_file() and not p.is_symlink()]
    fetched = sum(p.stat().st_size for p in files)
    sae_bytes = (release.path / "r/layer7/sae_weights.safetensors").stat().st_size
    assert fetched - sae_bytes < 200_000
    assert len(list(cache.rglob("*.safetensors"))) == 1


def test_other_formats_beside_an_sae_are_not_downloaded(hub: LocalHub, one: HubSAE, tmp_path: Path):
    one.push_to_hub("me/beside", id="sae", also=["pt", "sparsify"], check_saelens=False)
    HubSAE.from_pretrained("me/beside", cache_dir=tmp_path / "fresh")
    names = sorted(p.name for p in (tmp_path / "fresh").rglob("snapshots/**/*") if p.is_file())
    assert names == ["config.json", "metadata.json", "sae_weights.safetensors"]
    assert (pull("me/beside", cache_dir=tmp_path / "fresh") / "sae" / "model.pt").is_file()


def test_dtype_device_and_features(hub: LocalHub, tmp_path: Path):
    sae = HubSAE.random(SAEConfig(architecture="jumprelu", d_in=16, d_sae=64))
    sae.push_to_hub("me/jump", check_saelens=False)
    half = HubSAE.from_pretrained("me/jump", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    rows = HubSAE.from_pretrained("me/jump", features=[3, 5, 60], device="cpu")
    assert torch.equal(rows.W_dec, sae.W_dec[[3, 5, 60]])
    x = torch.randn(4, 16)
    assert torch.allclose(rows.encode(x), sae.encode(x)[:, [3, 5, 60]])
    with pytest.raises(ConfigError, match="floating-point"):
        HubSAE.from_pretrained("me/jump", dtype="int8")


def test_iter_and_list(hub: LocalHub, chain: str):
    found = dict(HubSAE.iter_pretrained(chain, layer=6))
    assert sorted(found) == ["saes_k64/instruct_base/layer6", "saes_k64/ppo_step10/layer6"]
    rows = list_saes(chain, stage="ppo_step10")
    assert [row["layer"] for row in rows] == [6, 12]
    assert "model.layers.12" in rows.text(all=True) and "<td>" in rows._repr_html_()


def test_describe_reads_headers_only(hub: LocalHub, chain: str, tmp_path: Path):
    start = len(hub.requests)
    found = describe(f"{chain}/saes_k64/ppo_step10/layer6", cache_dir=tmp_path / "empty")
    tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in found.tensors}
    assert tensors["sae_weights.safetensors: W_enc"] == ("F32", (16, 64))
    assert not list((tmp_path / "empty").rglob("*.safetensors"))
    assert found.kind == "sae" and found.config["k"] == 4
    assert not [r for r in sent_since(hub, start) if r[1].endswith("layer12/metadata.json")]
    assert len(describe(chain).saes) == 4


def test_pull_into_a_folder_is_a_release_of_its_own(hub: LocalHub, chain: str, tmp_path: Path):
    where = pull(chain, layer=6, out=tmp_path / "out")
    assert len(list_saes(where)) == 2
    assert HubSAE.from_pretrained(where, stage="ppo_step10").d_sae == 64
    assert not list(where.rglob("*.partial"))


def test_a_local_release_and_a_changed_file(hub: LocalHub, chain: str, tmp_path: Path):
    where = pull(chain, out=tmp_path / "out")
    file = where / "saes_k64/ppo_step10/layer6/sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(IntegrityError, match=r"bytes as config\.json says"):
        HubSAE.from_pretrained(where, layer=6, stage="ppo_step10")


def blob_of(repo: str, path: str) -> Path:
    client = HubClient()
    return (client.cached_snapshot(repo, client.head(repo)) / path).resolve()


def test_a_damaged_cache_is_noticed_and_mended(hub: LocalHub, chain: str, monkeypatch: pytest.MonkeyPatch):
    good = HubSAE.from_pretrained(chain, layer=6, stage="ppo_step10")
    blob = blob_of(chain, "saes_k64/ppo_step10/layer6/sae_weights.safetensors")
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    os.utime(blob, ns=(1, 1))
    assert torch.equal(HubSAE.from_pretrained(chain, layer=6, stage="ppo_step10").W_dec, good.W_dec)
    blob.write_bytes(b"short")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(IntegrityError, match=r"expected .* bytes, found 5"):
        HubSAE.from_pretrained(chain, layer=6, stage="ppo_step10")
    with pytest.raises(OfflineError, match="is not in the cache"):
        HubSAE.from_pretrained(chain, layer=6, stage="ppo_step10")


def test_a_file_that_differs_from_its_manifest_on_the_hub(hub: LocalHub, chain: str):
    path = "saes_k64/ppo_step10/layer6/metadata.json"
    HubClient().api.upload_file(path_or_fileobj=b"{}", path_in_repo=path, repo_id=chain)
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        HubSAE.from_pretrained(chain, layer=6, stage="ppo_step10")


def test_choices_that_leave_none_or_several(hub: LocalHub, chain: str):
    with pytest.raises(AmbiguousSAEError, match="2 SAEs of me/chain fit layer=6") as caught:
        HubSAE.from_pretrained(chain, layer=6)
    assert "saes_k64/ppo_step10/layer6" in str(caught.value) and "stage=" in str(caught.value)
    with pytest.raises(SAENotFoundError, match="layer: 6, 12"):
        HubSAE.from_pretrained(chain, layer=7)
    with pytest.raises(SAENotFoundError, match="nearest: saes_k64/ppo_step10/layer12"):
        HubSAE.from_pretrained(chain, "saes_k64/ppo_step10/layer21")


# -- repos without a manifest ------------------------------------------------------------------------------------


@pytest.fixture
def pile(hub: LocalHub, tmp_path: Path) -> str:
    """The repo as it was published: a pile of pickles and a card."""
    client = HubClient()
    client.ensure_repo("me/pile")
    folder = seed_folder(tmp_path / "pile" / "saes_k64")
    (tmp_path / "pile" / "README.md").write_text("# A pile\n")
    client.api.upload_folder(repo_id="me/pile", folder_path=folder.parent)
    return "me/pile"


def test_a_pile_of_pickles_loads_one_file(hub: LocalHub, pile: str, tmp_path: Path):
    cache = tmp_path / "fresh"
    sae = HubSAE.from_pretrained(pile, layer=12, stage="ppo_step10", cache_dir=cache)
    assert sae.config.selection == "topk(k=4), signed (no ReLU)"
    assert sae.metadata.hook.layer == 12 and sae.metadata.base_model.stage == "ppo_step10"
    assert [p.name for p in cache.rglob("*.pt")] == ["sae_ppo_step10_layer12.pt"]
    same = HubSAE.from_pretrained(pile, "saes_k64/sae_ppo_step10_layer12", cache_dir=cache)
    assert torch.equal(same.W_dec, sae.W_dec)
    flipped = HubSAE.from_pretrained(pile, layer=12, stage="ppo_step10", decode_adds_b_pre=True, cache_dir=cache)
    assert not torch.equal(flipped.b_dec, sae.b_dec)


def test_a_pile_from_cache_costs_one_head_and_loads_offline(hub: LocalHub, pile: str, monkeypatch: pytest.MonkeyPatch):
    HubSAE.from_pretrained(pile, layer=12, stage="ppo_step10")
    start = len(hub.requests)
    HubSAE.from_pretrained(pile, layer=12, stage="ppo_step10")
    assert [method for method, _, _ in sent_since(hub, start)] == ["HEAD"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    HubSAE.from_pretrained(pile, layer=12, stage="ppo_step10")


def test_a_pile_is_listed_by_its_names(hub: LocalHub, pile: str):
    rows = list_saes(pile)
    assert [(row["layer"], row["stage"]) for row in rows] == [
        (6, "instruct_base"), (12, "instruct_base"), (6, "ppo_step10"), (12, "ppo_step10"),
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning"])
def test_other_libraries_folders(hub: LocalHub, format: str, one: HubSAE, tmp_path: Path):
    from hubsae.formats import write

    folder = tmp_path / "tree" / "layers.6"
    write(one, folder, format)
    client = HubClient()
    client.ensure_repo(f"me/{format}")
    client.api.upload_folder(repo_id=f"me/{format}", folder_path=tmp_path / "tree")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = HubSAE.from_pretrained(f"me/{format}", "layers.6")
    x = torch.randn(8, 16)
    assert torch.allclose(sae(x), one(x), atol=1e-5)
    assert list_saes(f"me/{format}")[0]["id"] == "layers.6"


def test_a_gated_repo_and_a_repo_without_saes(hub: LocalHub, use: Callable[..., None]):
    client = HubClient()
    client.ensure_repo("me/none")
    client.api.upload_file(path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id="me/none")
    with pytest.raises(SAENotFoundError, match="holds no SAE"):
        HubSAE.from_pretrained("me/none")
