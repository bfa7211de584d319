"""Stock SAELens reads every format through the converter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import hubsae
from hubsae import HubSAE, SAEConfig
from hubsae.formats import write
from hubsae.hub.converter import saelens_converter

from .conftest import D_IN, D_SAE, K

sae_lens = pytest.importorskip("sae_lens")


@pytest.fixture
def sae(rand):
    config = SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K)
    made = HubSAE(config, {n: rand(*config.tensor_shape(n), scale=0.3) for n in config.tensor_names})
    made.metadata.base_model.id = "gpt2"
    return made


@pytest.mark.parametrize("form", ["native", "saelens", "sparsify", "dictionary_learning", "pt", "raw"])
def test_load_from_disk_reads_every_format(form, sae, x, same, tmp_path):
    path = write(sae, tmp_path / ("x.pt" if form == "pt" else "x"), form)
    lens = sae_lens.SAE.load_from_disk(path, converter=saelens_converter())
    same(sae, x, lens.encode(x), lens(x))
    double = sae_lens.SAE.load_from_disk(path, dtype="float64", converter=saelens_converter())
    assert double.W_enc.dtype == torch.float64


def test_choices_reach_the_reader(rand, x, same, tmp_path):
    W_enc, W_dec, b_enc, b_dec = rand(D_SAE, D_IN), rand(D_IN, D_SAE), rand(D_SAE), rand(D_IN)
    torch.save({"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}, tmp_path / "layer3.sae.pt")
    lens = sae_lens.SAE.load_from_disk(tmp_path / "layer3.sae.pt", converter=saelens_converter(k=K))
    pre = x @ W_enc.t() + b_enc
    top = pre.topk(K)
    codes = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    assert torch.equal(lens.encode(x) != 0, codes != 0)
    assert lens.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


def test_it_is_a_public_name():
    assert hubsae.saelens_converter is saelens_converter


ON_HUB = """
import sys, warnings
import torch
from huggingface_hub import HfApi
from sae_lens import SAE
import hubsae

warnings.simplefilter("ignore")
folder, first, second = sys.argv[1:]
api = HfApi()
api.create_repo("me/mixed")
api.upload_folder(repo_id="me/mixed", folder_path=first)
api.create_tag("me/mixed", tag="v1")
api.upload_folder(repo_id="me/mixed", folder_path=second)
x = torch.load(folder + "/x.pt", weights_only=True)
for revision in ("v1", "main"):
    expected = torch.load(f"{folder}/{revision}.pt", weights_only=True)
    for id, latents in expected.items():
        options = {"k": 6} if id == "layer3.sae.pt" else {}
        lens = SAE.from_pretrained("me/mixed", id, converter=hubsae.saelens_converter(revision=revision, **options))
        found = lens.encode(x)
        assert torch.equal(found != 0, latents != 0), (revision, id)
        assert (found - latents).abs().max() <= 2e-5 * latents.abs().max(), (revision, id)
        print(revision, id, lens.cfg.architecture())
"""


def test_stock_from_pretrained_reads_every_format_of_a_repo_at_any_revision(rand, x, tmp_path):
    localhub = pytest.importorskip("hubsae.localhub")
    from hubsae.formats import read
    from hubsae.localhub.settings import Token

    config = SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K)
    torch.save(x, tmp_path / "x.pt")
    for folder, revision in (("one", "v1"), ("two", "main")):
        root = tmp_path / folder
        expected = {}
        for form in ("native", "saelens", "sparsify", "dictionary_learning"):
            made = HubSAE(config, {n: rand(*config.tensor_shape(n), scale=0.3) for n in config.tensor_names})
            write(made, root / "saes" / f"{form}_layer3", form)
            expected[f"saes/{form}_layer3"] = made.encode(x)
        state = {"W_enc": rand(D_SAE, D_IN), "W_dec": rand(D_IN, D_SAE), "b_enc": rand(D_SAE), "b_dec": rand(D_IN)}
        torch.save(state, root / "layer3.sae.pt")
        expected["layer3.sae.pt"] = read(root / "layer3.sae.pt", k=K).encode(x)
        chain = {"b_pre": rand(D_IN), "encoder.weight": rand(D_SAE, D_IN), "encoder.bias": rand(D_SAE),
                 "decoder.weight": rand(D_IN, D_SAE), "decoder.bias": rand(D_IN)}  # fmt: skip
        torch.save({"state_dict": chain, "config": {"k": K}}, root / "sae_ppo_step10_layer6.pt")
        expected["sae_ppo_step10_layer6.pt"] = read(root / "sae_ppo_step10_layer6.pt").encode(x).relu()
        torch.save(expected, tmp_path / f"{revision}.pt")
    with localhub.running(root=tmp_path / "hub", tokens=[Token.parse("me=hf_me")]) as hub:
        env = {**os.environ, **hub.env(tmp_path / "home"), "HF_TOKEN": "hf_me"}
        command = [sys.executable, "-c", ON_HUB, str(tmp_path), str(tmp_path / "one"), str(tmp_path / "two")]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 12
