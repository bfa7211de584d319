"""Activations of other origin: read as they are, and rewritten into our format without a changed value."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from hubsae.activations import ActivationDataset, describe
from hubsae.activations.convert import convert
from hubsae.core.errors import DataError, FormatError, NotFoundError


def test_a_pile_of_bare_tensors(tmp_path):
    pile, parts = tmp_path / "pile", {}
    pile.mkdir()
    for stage in ("instruct_base", "ppo_step10"):
        for layer in (6, 18):
            for split in ("train", "val"):
                x = torch.randn(300 if split == "train" else 40, 12).half()
                torch.save(x, pile / f"{stage}_layer{layer}_{split}.pt")
                parts[stage, layer, split] = x
    data = ActivationDataset.open(pile, "ppo_step10.layers.18", split="validation")
    assert torch.equal(data.read_all(), parts["ppo_step10", 18, "val"])
    assert data.configs == [
        "instruct_base.layers.6",
        "instruct_base.layers.18",
        "ppo_step10.layers.6",
        "ppo_step10.layers.18",
    ]
    out = convert(pile, tmp_path / "out", source={"model": "some/model"})
    for (stage, layer, split), x in parts.items():
        again = ActivationDataset.open(out, f"{stage}.layers.{layer}", {"val": "validation"}.get(split, split))
        assert torch.equal(again.read_all(), x)
    assert again.info["stage"] == "ppo_step10" and again.info["hook_point"] == "layers.18"
    assert torch.allclose(again.stats.mean, x.double().mean(0), atol=1e-5)
    with pytest.raises(DataError, match="holds activations already"):
        convert(pile, out)


def test_chunks_with_tokens_and_positions(tmp_path):
    folder = tmp_path / "layer_07"
    folder.mkdir()
    x = torch.randn(60, 8).bfloat16()
    for n in range(2):
        at = slice(30 * n, 30 * n + 30)
        torch.save(
            {"acts": x[at], "tokens": torch.arange(60)[at], "positions": torch.arange(60)[at] % 10,
             "text_ids": torch.arange(60)[at] // 10, "layer": 7}, folder / f"chunk_{n:04d}.pt",
        )  # fmt: skip
    data = ActivationDataset.open(folder.parent, 7)
    assert data.stored_dtype == torch.bfloat16 and torch.equal(data.read_all(), x.float())
    again = ActivationDataset.open(convert(tmp_path, tmp_path / "out"))
    assert torch.equal(again.read_all(), x.half())
    assert again.columns("sample_id")["sample_id"].tolist() == (np.arange(60) // 10).tolist()
    assert again.stats.first_norms.count == 6


def test_numpy_and_safetensors(tmp_path):
    x = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    np.save(tmp_path / "blocks_layer3.npy", x)
    safetensors.torch.save_file({"activation": torch.from_numpy(x).view(10, 10, 6)}, tmp_path / "layer4.safetensors")
    for name in ("blocks_layer3.npy", "layer4.safetensors"):
        data = ActivationDataset.open(tmp_path / name)
        assert np.array_equal(data.read_all().numpy(), x)
        assert sorted(torch.cat(list(data.batches(7))).sum(1).tolist()) == sorted(torch.from_numpy(x).sum(1).tolist())
        again = ActivationDataset.open(convert(tmp_path / name, tmp_path / f"{name}.out"))
        assert np.array_equal(again.read_all().numpy(), x) and again.stored_dtype == torch.float32
    half = ActivationDataset.open(
        convert(tmp_path / "layer4.safetensors", tmp_path / "half", dtype="float16", config="x")
    )
    assert np.array_equal(half.read_all().numpy(), x.astype(np.float16)) and half.config == "x"
    assert describe(tmp_path / "layer4.safetensors")["configs"][0]["splits"] == {"train": 100}


def test_saelens_cached_activations(tmp_path):
    """The layout of SAELens' CacheActivationsRunner: one context per row, Array2D under the hook's name."""
    import datasets

    x = np.random.default_rng(1).normal(size=(40, 16, 8)).astype(np.float32)
    tokens = np.arange(40 * 16).reshape(40, 16)
    hook = "blocks.5.hook_resid_post"
    features = datasets.Features(
        {hook: datasets.Array2D((16, 8), "float32"), "token_ids": datasets.Sequence(datasets.Value("int32"), length=16)}
    )
    cached = datasets.Dataset.from_dict({hook: list(x), "token_ids": tokens.tolist()}, features=features)
    cached.save_to_disk(tmp_path / "cache", num_shards=3)
    data = ActivationDataset.open(tmp_path / "cache", hook)
    assert data.config == "layers.5" and len(data.sources) == 3
    assert np.array_equal(data.read_all().numpy(), x.reshape(-1, 8))
    labels = data.columns()
    assert labels["token_id"].tolist() == list(range(640))
    assert labels["sample_id"].tolist() == (np.arange(640) // 16).tolist()
    assert labels["position"].tolist() == (np.arange(640) % 16).tolist()
    batch = next(iter(data.labelled_batches(["token_id"], 50)))
    assert np.array_equal(batch.x.numpy(), x.reshape(-1, 8)[batch.labels["token_id"]])
    again = ActivationDataset.open(convert(tmp_path / "cache", tmp_path / "out"), 5)
    assert np.array_equal(again.read_all().numpy(), x.reshape(-1, 8))
    assert again.columns("token_id")["token_id"].tolist() == list(range(640))


@pytest.mark.parametrize("layout", ["defaults", "zstd", "v1 pages", "list", "datasets"])
def test_parquet_of_any_encoding_falls_back_to_pyarrow(tmp_path, layout):
    x = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32)
    path = tmp_path / "acts.parquet"
    kind = pa.list_(pa.float32()) if layout == "list" else pa.list_(pa.float32(), 8)
    table = pa.table({"vector": pa.array(list(x), type=kind), "token_id": pa.array(np.arange(5000), pa.int32())})
    if layout == "datasets":
        import datasets

        datasets.Dataset(table).to_parquet(path)
    elif layout == "zstd":
        pq.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=700)
    elif layout == "v1 pages":
        pq.write_table(
            table, path, compression="none", use_dictionary=False, write_page_index=True, data_page_size=4096
        )
    else:
        pq.write_table(table, path, row_group_size=1500)
    data = ActivationDataset.open(path)
    assert np.array_equal(data.read_all().numpy(), x)
    for batch in data.labelled_batches(["token_id"], 300):
        assert np.array_equal(batch.x.numpy(), x[batch.labels["token_id"]])
    again = ActivationDataset.open(convert(path, tmp_path / "out"))
    assert np.array_equal(again.read_all().numpy(), x)


def test_pickles_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"acts": torch.ones(2, 2), "evil": Evil()}, tmp_path / "layer1.pt")
    with pytest.raises(FormatError, match=r"weights_only(.|\n)*ever unpickled"):
        ActivationDataset.open(tmp_path / "layer1.pt")
    assert not (tmp_path / "touched").exists()
    np.save(tmp_path / "layer2.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match="npy"):
        ActivationDataset.open(tmp_path / "layer2.npy")


def test_files_that_hold_something_else(tmp_path):
    torch.save(torch.ones(5), tmp_path / "a_layer1.pt")
    with pytest.raises(FormatError, match=r"matrix \[rows, d\], found Tensor \(5,\)"):
        ActivationDataset.open(tmp_path / "a_layer1.pt")
    torch.save({"x": torch.ones(5, 2), "y": torch.ones(5, 2)}, tmp_path / "b.pt")
    with pytest.raises(DataError, match=r"several tensors(.|\n)*vector=(.|\n)*x"):
        ActivationDataset.open(tmp_path / "b.pt")
    assert len(ActivationDataset.open(tmp_path / "b.pt", vector="y")) == 5
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(FormatError, match="safetensors file"):
        ActivationDataset.open(tmp_path / "c.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="expected activations, found none"):
        ActivationDataset.open(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError):
        convert(tmp_path / "notes.txt", tmp_path / "o")
    header = json.dumps({"x": {"dtype": "F32", "shape": [10, 4], "data_offsets": [0, 160]}}).encode()
    (tmp_path / "d.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 100)
    with pytest.raises(FormatError, match="10 rows of 16 bytes, found 100 bytes"):
        ActivationDataset.open(tmp_path / "d.safetensors")
    with pytest.raises(NotFoundError, match="no split 'validation'"):
        ActivationDataset.open(tmp_path / "b.pt", split="validation", vector="x")
