"""ONNX, plain PyTorch files and raw tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import ConfigError, FormatError
from hubsae.formats import convert, detect, read, write, write_also
from hubsae.formats.kinds import onnx

from .conftest import D_IN, D_SAE, K

CONFIGS = [
    {"architecture": "relu"},
    {"architecture": "topk", "k": K},
    {"architecture": "topk", "k": K, "topk_relu": False},
    {"architecture": "batch_topk", "k": K, "threshold": 0.7},
    {"architecture": "jumprelu"},
    {"architecture": "gated"},
    {"architecture": "topk", "k": K, "token_norm": "layer_norm"},
    {"architecture": "relu", "token_norm": "unit_norm"},
    {"architecture": "relu", "token_norm": "constant_norm"},
]
names = ["-".join(str(v) for v in c.values()) for c in CONFIGS]


def make(fields, rand, subtract=True):
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=subtract, **fields)
    tensors = {n: rand(*config.tensor_shape(n), scale=0.3) for n in config.tensor_names}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    return HubSAE(config, tensors)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("fields", CONFIGS, ids=names)
def test_onnx_gives_the_latents_and_reconstruction_of_torch(fields, subtract, rand, x, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    sae = make(fields, rand, subtract)
    path = write(sae, tmp_path / "sae.onnx", "onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for part in (x, x[:1], x[:7]):
        rebuilt, latents = session.run(["reconstruction", "latents"], {"x": part.numpy()})
        mine = sae.encode(part)
        assert np.array_equal(latents != 0, (mine != 0).numpy())
        assert np.abs(latents - mine.numpy()).max() <= 2e-5
        want = sae(part).numpy()
        assert np.linalg.norm(rebuilt - want) <= 1e-6 * np.linalg.norm(want)


def test_onnx_bytes_depend_on_the_sae_alone(rand, tmp_path):
    sae = make({"architecture": "topk", "k": K}, rand)
    a, b = write(sae, tmp_path / "a.onnx", "onnx"), write(sae, tmp_path / "b.onnx", "onnx")
    assert a.read_bytes() == b.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"], "scratch files must be gone"


def test_onnx_with_weights_beside_the_graph(rand, x, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "EXTERNAL_FROM", 1000)
    sae = make({"architecture": "topk", "k": K}, rand)
    path = write(sae, tmp_path / "big.onnx", "onnx")
    assert (tmp_path / "big.onnx.data").stat().st_size > 4 * D_IN * D_SAE
    assert onnx.check(sae, path) <= 1e-6


def test_onnx_export_that_differs_from_torch_leaves_no_file(rand, tmp_path, monkeypatch):
    sae = make({"architecture": "topk", "k": K}, rand)
    monkeypatch.setattr(onnx, "TOLERANCE", -1.0)
    with pytest.raises(FormatError, match="reconstruction of torch"):
        write(sae, tmp_path / "sae.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_batch_rule_is_not_exported_to_onnx(rand, tmp_path):
    with pytest.raises(ConfigError, match="depends on the whole batch"):
        write(make({"architecture": "batch_topk", "k": K}, rand), tmp_path / "sae.onnx", "onnx")


@pytest.mark.parametrize("form", ["pt", "raw"])
@pytest.mark.parametrize("fields", CONFIGS, ids=names)
def test_plain_files_come_back_bit_for_bit(form, fields, rand, tmp_path):
    sae = make(fields, rand)
    sae.metadata.base_model.id = "Qwen/Qwen3-8B"
    path = write(sae, tmp_path / ("sae.pt" if form == "pt" else "raw"), form)
    assert [r.format for r in detect(path)] == [form]
    again = read(path)
    assert again.config == sae.config and again.metadata.base_model.id == "Qwen/Qwen3-8B"
    for name, tensor in sae.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_pt_is_a_state_dict_for_people_without_hubsae(rand, x, tmp_path):
    sae = make({"architecture": "topk", "k": K}, rand)
    loaded = torch.load(write(sae, tmp_path / "sae.pt", "pt"), weights_only=True)
    t = loaded["state_dict"]
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    top = pre.topk(loaded["config"]["k"])
    z = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    assert torch.allclose(z @ t["W_dec"] + t["b_dec"], sae(x), atol=1e-4)


def test_raw_bytes_without_an_index_ask_for_their_orientation(rand, tmp_path):
    sae = make({"architecture": "topk", "k": K}, rand)
    write(sae, tmp_path / "raw", "raw")
    (tmp_path / "raw" / "tensors.json").unlink()
    choices = {"architecture": "topk", "k": K, "apply_b_dec_to_input": True}
    with pytest.raises(FormatError, match="orientation"):
        read(tmp_path / "raw", **choices)
    again = read(tmp_path / "raw", transposed=False, **choices)
    assert torch.equal(again.W_enc, sae.W_enc) and torch.equal(again.W_dec, sae.W_dec)


def test_raw_index_that_points_elsewhere_or_lies_about_sizes_is_refused(rand, tmp_path):
    write(make({"architecture": "relu"}, rand), tmp_path / "raw", "raw")
    index = json.loads((tmp_path / "raw" / "tensors.json").read_text())
    entries = index["tensors"]
    for bad in ({"../W_enc": entries["W_enc"]}, {"W_enc": {"shape": [10**6, 10**6]}}, {"W_enc": {"shape": [-1, 4]}}):
        (tmp_path / "raw" / "tensors.json").write_text(json.dumps(index | {"tensors": {**entries, **bad}}))
        with pytest.raises(FormatError):
            read(tmp_path / "raw")


def test_convert_between_formats(rand, x, same, tmp_path):
    sae = make({"architecture": "topk", "k": K}, rand)
    write(sae, tmp_path / "a.pt", "pt")
    convert(tmp_path / "a.pt", tmp_path / "s", to="sparsify")
    convert(tmp_path / "s", tmp_path / "n", to="native")
    same(read(tmp_path / "n"), x, sae.encode(x), sae(x))
    assert read(tmp_path / "n").metadata.provenance.source_format == "sparsify"


def test_formats_beside_an_sae(rand, tmp_path):
    sae = make({"architecture": "topk", "k": K}, rand)
    folder = write(sae, tmp_path / "s")
    before = set(folder.rglob("*"))
    write_also(sae, folder, ["onnx", "pt", "raw"])
    found = {p.relative_to(folder).as_posix() for p in set(folder.rglob("*")) - before if p.is_file()}
    assert found == {"model.onnx", "model.pt", "raw/W_enc", "raw/W_dec", "raw/b_enc", "raw/b_dec", "raw/tensors.json"}
    with pytest.raises(ConfigError, match="cannot be written beside"):
        write_also(sae, folder, ["gguf"])


def test_only_some_latents_of_a_wide_sae(rand, x, tmp_path):
    sae = make({"architecture": "jumprelu"}, rand)
    write(sae, tmp_path / "s")
    wanted = [5, 6, 7, 100, 3]
    for path in (tmp_path / "s", write(sae, tmp_path / "s.pt", "pt")):
        part = read(path, features=wanted)
        assert part.d_sae == 5 and part.features == tuple(wanted)
        assert torch.equal(part.W_dec, sae.W_dec[wanted]) and torch.equal(part.W_enc, sae.W_enc[:, wanted])
        assert torch.allclose(part.encode(x), sae.encode(x)[:, wanted], atol=1e-5)
    with pytest.raises(ConfigError, match="do not exist"):
        read(tmp_path / "s", features=[D_SAE])
    half = read(tmp_path / "s", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.config.dtype == "bfloat16"


def test_the_weights_file_of_a_folder_stands_for_the_folder(rand, tmp_path):
    sae = make({"architecture": "topk", "k": K}, rand)
    folder = write(sae, tmp_path / "s")
    for name in ("sae_weights.safetensors", "cfg.json", "metadata.json"):
        assert read(folder / name).config == sae.config
    assert [r.format for r in detect(write(sae, tmp_path / "d", "dictionary_learning") / "ae.pt")] == [
        "dictionary_learning"
    ]
