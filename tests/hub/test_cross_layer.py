"""A cross-layer transcoder from a repo: all files of its folder at one commit, and again without a network."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

import hubsae

LAYERS, D, D_SAE = 3, 8, 24


def test_from_a_folder_of_a_repo_and_again_offline(hub, tmp_path):
    folder = tmp_path / "repo" / "clt"
    folder.mkdir(parents=True)
    for n in range(LAYERS):
        encoder = {f"W_enc_{n}": torch.randn(D_SAE, D), f"b_enc_{n}": torch.randn(D_SAE), f"b_dec_{n}": torch.randn(D)}
        save_file(encoder, folder / f"W_enc_{n}.safetensors")
        save_file({f"W_dec_{n}": torch.randn(D_SAE, LAYERS - n, D)}, folder / f"W_dec_{n}.safetensors")
    (folder / "other.safetensors").write_bytes(b"not asked for")
    api = HfApi(endpoint=hub.url, token="hf_me")
    api.create_repo("me/clt")
    api.upload_folder(repo_id="me/clt", folder_path=tmp_path / "repo")
    options = {"cache_dir": tmp_path / "cache"}
    clt = hubsae.read_cross_layer("me/clt", "clt", **options)
    assert not list((tmp_path / "cache").rglob("other.safetensors"))
    with pytest.raises(hubsae.HubSAEError, match="holds no cross-layer transcoder in its root"):
        hubsae.read_cross_layer("me/clt", **options)
    again = hubsae.read_cross_layer("me/clt", "clt", local_files_only=True, **options)
    x = list(torch.randn(LAYERS, 2, D))
    assert all(torch.equal(a, b) for a, b in zip(clt(x), again(x), strict=True))
    one = hubsae.read_cross_layer(folder)
    assert torch.equal(one(x)[2], clt(x)[2])
