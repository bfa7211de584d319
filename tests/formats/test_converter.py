"""Stock SAELens reads every format through the converter."""

from __future__ import annotations

import pytest
import torch

import hubsae
from hubsae import HubSAE, SAEConfig
from hubsae.formats import write
from hubsae.formats.converter import saelens_converter

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
